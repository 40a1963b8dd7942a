# Two commands: `make demo` and `make test`. `make help` lists the rest.
VENV ?= .venv
export VENV
# two workers: one waits for the cluster most of the time
PYTEST_ARGS ?= -n 2 --dist loadgroup --no-loadscope-reorder --durations=25

.PHONY: help install demo test lint
help:
	@echo "make install   the environment in $(VENV), for GPUs or CPUs by what the machine has"
	@echo "make demo      a Lewis run on this machine: three rounds"
	@echo "make test      all tests; installs Slurm by apt where it may (PYTEST_ARGS='tests/run -x' for some)"
	@echo "make lint      ruff and mypy"

install:
	@tools/install.sh

demo: install
	$(VENV)/bin/python -m hpc_rl.launch configs/tiny/lewis.yaml --executor local

test: lint
	tests/slurm/install.sh
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

lint:
	@tools/install.sh dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
