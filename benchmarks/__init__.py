"""Measurements behind the project's performance claims. Each script measures side by side in one run."""
