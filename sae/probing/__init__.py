"""What `sae.probe` is made of."""
