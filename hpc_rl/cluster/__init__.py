"""Where jobs run: Slurm through submitit, processes on this machine, or this very process."""
