"""Checkpoints in, graph IR out. `frontends.huggingface.import_model(directory)` is the entry; see there."""
