"""Training from rollouts: ranks that find each other, batches, the GRPO update, checkpoints. Only for job bodies."""
