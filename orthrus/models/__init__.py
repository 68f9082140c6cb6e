"""Models: their configuration, their tensors, their files, and the forward pass."""
