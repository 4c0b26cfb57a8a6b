"""The model on this rank and its forward pass."""
