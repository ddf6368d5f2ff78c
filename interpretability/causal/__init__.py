"""What features cause: attribution to the next token, ablation, and how well each latent steers."""
