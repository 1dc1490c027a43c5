"""Kernels for GPUs, one family a file."""
