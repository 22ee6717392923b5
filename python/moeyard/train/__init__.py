"""Training: what needs models and data together. Needs `pip install moeyard[train]`."""
