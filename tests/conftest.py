"""Settings of the whole test session: one thread per process, none that spins, nothing from a hub."""

from __future__ import annotations

import os

# before anything imports torch; processes that tests start inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
