"""What ends a training with a message for its user."""

from __future__ import annotations


class UnusableData(ValueError):
    """Data that cannot be trained on; the message names the row."""


class NothingToLearn(UnusableData):
    """Nothing is left to train on, or nothing that could move the weights."""


class Diverged(RuntimeError):
    """A loss or a gradient is no finite number; the message names the batch, and the checkpoint before it."""


class CheckpointFailed(RuntimeError):
    """A checkpoint could not be written, or not be read back; the message names the one before it, which is kept."""
