"""Kernels: graph ops and fused regions as tile IR, one file a family."""
