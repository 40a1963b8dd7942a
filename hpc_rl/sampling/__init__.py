"""Sampling at the speed of the engine: tasks with retries, streams of shards, and what tasks say of themselves."""
