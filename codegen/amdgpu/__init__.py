"""The same kernels as objects for AMD GPUs: tile IR with grid ops, through LLVM, to gfx942 code. Compiled only."""
