"""Kernels for NVIDIA GPUs: tile IR with grid ops, through LLVM, to PTX and machine code."""
