"""What is known of a latent from activations: top sentences, a background sample, n-grams, coactivation, promoted tokens."""
