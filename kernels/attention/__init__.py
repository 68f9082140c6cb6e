"""Attention of a pass: the work list, the plain version, and the kernels."""
