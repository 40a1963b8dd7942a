"""The example of docs/sampling.md: several engines as one, outside Slurm, on a tiny model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from .conftest import pictures

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "sampling.md"


def test_the_example_of_the_docs_samples(speaker_folder: Path, tmp_path: Path) -> None:
    """On transformers: two engines of vLLM take a minute of two cores to start, and test_pool_engines has them."""
    (script,) = [
        text for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "open_pool(" in text
    ]
    picture = tmp_path / "picture.png"
    pictures()[0].save(picture)
    for there, here in {
        r"MODEL, PICTURE, ENGINES = .*": f'MODEL, PICTURE, ENGINES = "{speaker_folder}", Path("{picture}"), 2',
        r'EngineSpec\("vllm"': 'EngineSpec("transformers"',
        r"print\(completion\.text\)": "print('tokens', len(completion.token_ids))",
    }.items():
        script, found = re.subn(there, here, script)
        assert found == 1
    program = tmp_path / "example.py"
    program.write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(
        [sys.executable, str(program)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    lengths = [int(number) for number in re.findall(r"^tokens (\d+)$", ended.stdout, re.M)]
    assert len(lengths) == 64 and all(0 < length <= 64 for length in lengths)
