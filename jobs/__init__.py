"""Job bodies: what runs inside an allocation, whoever submitted it. `python -m jobs.NAME --workspace W --round R`."""
