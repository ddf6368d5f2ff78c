"""Training while the model runs: chunks of the corpus through the model, rows through a bounded buffer."""
