"""Scripts that use vLLM, each in a fork of one process that has imported it and no more: that takes ten seconds.

Run by the fixture `run_with_vllm`. It reads a line of JSON for each script, with its path, its arguments and where its
output goes, and answers with its exit code.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

from hpc_rl.engines.vllm_start import import_vllm


def main() -> None:
    """Until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import_vllm()
    from vllm import LLM  # noqa: F401
    from vllm.model_executor.models import registry

    # what a model class can do is looked up in the fork itself; vLLM would import itself once more for each class
    assert hasattr(registry, "_run_in_subprocess")
    registry._run_in_subprocess = lambda look: look()
    for line in sys.stdin:
        script, arguments, log = json.loads(line)
        if (child := os.fork()) == 0:
            _run(script, arguments, log)
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        answers.flush()


def _run(script: str, arguments: list[str], log: str) -> None:
    code = 1
    atexit._clear()  # what the parent does at its end is not ours
    try:
        with Path(log).open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        if code:
            traceback.print_exc()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
