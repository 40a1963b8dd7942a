"""What `python -m hpc_rl.doctor` looks at (S14), a module for each: each gives findings, and none changes anything."""
