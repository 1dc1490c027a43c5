"""One emitter for each op of the graph, or region of a kind, that GPUs have kernels for: its launches in order."""
