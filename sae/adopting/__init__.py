"""What `sae.adopt` is made of: where an SAE comes from, what it may read and how, and which of that fits."""
