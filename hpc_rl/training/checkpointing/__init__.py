"""Checkpoints: when they are made, how all ranks make one together, which one may be gone on from."""
