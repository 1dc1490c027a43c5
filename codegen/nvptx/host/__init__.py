"""What the CPU beside a GPU computes: experts that are not in the GPU's memory, from the very bytes that lie for it."""
