#!/usr/bin/env bash
# Make .venv with everything, for GPUs or for CPUs by what the machine has. Does nothing when it is up to date.
#   tools/install.sh [dev]      VENV=.venv PYTHON=python3 ACCELERATOR=auto|cuda|cpu
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv} PYTHON=${PYTHON:-python3} ACCELERATOR=${ACCELERATOR:-auto}
if [ "$ACCELERATOR" = auto ]; then
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then ACCELERATOR=cuda; else ACCELERATOR=cpu; fi
fi
files=(requirements/common.txt "requirements/$ACCELERATOR.txt")
kind=${1:-run}
[ "$kind" = dev ] && files+=(requirements/dev.txt)
hash=$(cat requirements/*.txt tools/install.sh tools/cpu/*.py setup.cfg | sha256sum | cut -c1-16)
# what the tests need includes what a run needs
for done in "$VENV/.installed-dev-$hash" "$VENV/.installed-$kind-$hash"; do [ -e "$done" ] && exit 0; done

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "hpc_rl needs Python 3.11 or newer: make install PYTHON=/path/to/python3.11" >&2; exit 1; }
echo "installing into $VENV for $ACCELERATOR (minutes, about 3 GB for cpu and 10 GB for cuda) ..."
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
args=(); for file in "${files[@]}"; do args+=(-r "$file"); done
"$VENV/bin/python" -m pip install -qq --disable-pip-version-check "${args[@]}"
if [ "$ACCELERATOR" = cpu ]; then
  # linked against CUDA, or slow to compile where there is no GPU; nothing here needs them
  "$VENV/bin/python" -m pip uninstall -qy torchaudio torchcodec triton >/dev/null 2>&1 || true
  packages=$("$VENV/bin/python" -c 'import site; print(site.getsitepackages()[0])')
  cp tools/cpu/hpc_rl_torchvision_hook.py tools/cpu/hpc_rl_torchvision_hook.pth "$packages/"
  "$VENV/bin/python" -m pip show -q vllm >/dev/null 2>&1 || "$VENV/bin/python" -m pip install -qq --disable-pip-version-check --no-deps ./tools/cpu/vllm_alias
fi
"$VENV/bin/python" -m pip install -qq --disable-pip-version-check --no-deps --editable .
rm -f "$VENV"/.installed-*; touch "$VENV/.installed-$kind-$hash"
echo "installed."
