"""Training: what needs models and data together."""
