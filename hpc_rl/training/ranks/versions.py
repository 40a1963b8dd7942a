"""What software a rank runs, and on which nodes it is another than on the others."""

from __future__ import annotations

import os
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch

from hpc_rl.cluster.entry import CODE

PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "deepspeed", "numpy")
MAY_DIFFER = ("GPU",)
"""What is only warned of: the slowest sets the pace, and memory runs out on the smallest."""
_DRIVER = Path("/proc/driver/nvidia/version")


def here() -> dict[str, str]:
    """What this process runs, by name; nothing heavy is imported for it."""
    found = {"Python": platform.python_version(), "the code": os.environ.get(CODE, "")}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    if torch.cuda.is_available():
        driver = re.search(r"\d+\.\d+(?:\.\d+)?", _DRIVER.read_text()) if _DRIVER.exists() else None
        nccl = getattr(torch.cuda, "nccl", None)
        found |= {
            "the GPU driver": driver[0] if driver else "unknown",
            "NCCL": ".".join(map(str, nccl.version())) if nccl else "none",
            "GPU": torch.cuda.get_device_name(),
        }
    return found


def differences(nodes: Sequence[str], found: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What is not the same on all ranks, by name: which nodes have what others have not.

    Parameters
    ----------
    nodes, found
        Of each rank its node's name, and what `here` said there.
    """
    texts = {}
    for name in dict.fromkeys(name for one in found for name in one):
        values = [one.get(name, "none") for one in found]
        usual = Counter(values).most_common(1)[0][0]
        odd: dict[str, list[str]] = {}
        for node, value in zip(nodes, values, strict=True):
            if value != usual and node not in odd.setdefault(value, []):
                odd[value].append(node)
        if odd:
            said = ", ".join(f"{value!r} on {', '.join(where)}" for value, where in odd.items())
            texts[name] = f"{name} is {said} and {usual!r} on the others"
    return texts
