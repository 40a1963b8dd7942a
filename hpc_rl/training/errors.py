"""What ends a training with a message for its user."""

from __future__ import annotations


class UnusableData(ValueError):
    """Data that cannot be trained on; the message names the row."""


class Diverged(RuntimeError):
    """A loss or a gradient is no finite number; the message names the batch, and the checkpoint before it."""
