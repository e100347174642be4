# Two commands do everything: `make demo` and `make test`. Both install what is missing into .venv first.
PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin
OUT ?= runs/demo
SLURM = tests/slurm
RUNS = tests/stages tests/verify tests/launch tests/commands tests/run \
	$(addprefix tests/test_,environment.py launcher.py many_machines.py watchdog.py) # all that start ranks, and balance

unexport PYTHONDONTWRITEBYTECODE  # or each process that a test starts would compile all of torch again

.PHONY: demo test test-others test-runs test-slurm test-slow lint docs clean
.DEFAULT_GOAL := demo

demo: $(VENV)/installed  ## pack, pretrain, kNN, probe, fine-tune, report: minutes on two CPU cores, less on GPUs
	$(BIN)/mae-dist demo --out $(OUT)

test: $(VENV)/installed  ## the suite in three parts side by side: jobs on a real SLURM wait most of the time
	@$(MAKE) --no-print-directory --jobs=3 --keep-going test-slurm test-runs test-others

test-others: $(VENV)/installed
	$(BIN)/python -m pytest $(foreach folder,$(SLURM) $(RUNS),--ignore=$(folder))

test-slurm test-runs: test-%: $(VENV)/installed  ## prints everything at its end
	@output=$$($(BIN)/python -m pytest -p no:cacheprovider $(if $(filter slurm,$*),$(SLURM),$(RUNS)) 2>&1); \
		status=$$?; printf '\n%s\n' "$$output"; exit $$status

test-slow: $(VENV)/installed  ## the tests marked slow, before a release: five seconds to three minutes each
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed  ## what pre-commit and CI hold the code to
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/hadolint docker/*Dockerfile && $(BIN)/shellcheck docker/*.sh launch/*.sh tests/slurm/cluster .ci/run .ci/versions

docs: $(VENV)/installed  ## write the pages of docs/ that follow from the code
	$(BIN)/python -m docs.generate

$(VENV)/installed: pyproject.toml .ci/constraints.txt docker/install.sh
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is too old: Python 3.11 or newer is needed; try make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
		|| { echo "$(PYTHON) cannot make virtual environments: run apt install python3-venv"; exit 2; }
	PYTHON=$(PYTHON) docker/install.sh $(VENV) '.[dev]'
	touch $@

clean:  ## remove the environment and what the tools left
	rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info
