"""Steps on NVIDIA GPUs: what a GPU runs (`program`), without importing the compiler."""
