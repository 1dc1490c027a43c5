"""Tile IR and plan IR to LLVM IR text."""
