"""What `sae.evaluate` is made of."""
