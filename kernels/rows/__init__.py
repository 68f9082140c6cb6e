"""Kernels that work row by row: embedding, norms, rotary angles, picks, and the upload of a pass."""
