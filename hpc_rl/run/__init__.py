"""A run on disk: paths, atomic files, manifests, leases, the ledger. No Slurm and no machine learning in here."""
