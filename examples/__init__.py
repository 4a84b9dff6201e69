"""Code of one's own: hand-written models in plain PyTorch, and their twins that call `genfuse.ops`."""
