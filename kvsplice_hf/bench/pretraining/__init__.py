"""Models trained from scratch: text, settings, the trainer, and what is fitted to a trained model."""
