"""hpc_rl: reinforcement learning of language models in rounds of ordinary Slurm jobs."""

__version__ = "0.1.0"
