"""Measurements behind the project's performance claims. Each script prints a ratio, measured side by side in one run."""
