# Two commands: `make demo` and `make test`. `make help` lists the rest.
VENV ?= .venv
export VENV
# more workers than two cores: tests of the cluster, of services and of claims wait much of their time
PYTEST_ARGS ?= -n 3 --dist loadgroup --no-loadscope-reorder -m "not slow" --durations=25

.PHONY: help install demo demo-prosetting test test-slow lint
help:
	@echo "make install   the environment in $(VENV), for GPUs or CPUs by what the machine has"
	@echo "make demo      a Lewis run on this machine: three rounds"
	@echo "make demo-prosetting   a solver that learns sums from teachers that are rules: five rounds"
	@echo "make test      lint and tests; installs Slurm by apt where it may (PYTEST_ARGS='tests/run -x' for some)"
	@echo "make test-slow long tests that have a shorter one beside them"
	@echo "make lint      ruff and mypy"

install:
	@tools/install.sh

# Your own .env sets fields of any config that is launched here. --set wins over it, so that a demo is the same for all.
DEMO = --executor local --set run.workspace=null --set run.continue_on_failure=false \
  --set services.listener.client.url=null --set services.teacher.client.url=null --set services.teacher.client.model=null

demo: install
	$(VENV)/bin/python -m hpc_rl.launch configs/tiny/lewis.yaml $(DEMO)

demo-prosetting: install
	$(VENV)/bin/python -m hpc_rl.launch configs/tiny/prosetting.yaml $(DEMO) \
	  --set solver.path=models/tiny-solver --set questions.file=configs/tiny/sums.json \
	  --set stages.train.ranks_per_node=null

test: lint
	tests/slurm/install.sh
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

test-slow:
	@tools/install.sh dev
	tests/slurm/install.sh
	$(VENV)/bin/python -m pytest -m slow --durations=25

lint:
	@tools/install.sh dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
