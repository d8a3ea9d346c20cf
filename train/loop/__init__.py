"""The training loop: from a configuration to a run folder with a trained model."""
