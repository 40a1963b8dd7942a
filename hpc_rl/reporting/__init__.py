"""What `python -m hpc_rl.report` says: `gather` reads a run into a `Report`, `text` and `plain` are its two forms."""
