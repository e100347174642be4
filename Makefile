# Two commands do everything: `make demo` and `make test`. Both install what is missing into .venv first.
PYTHON ?= python3
BIN := .venv/bin
OUT ?= runs/demo

.PHONY: demo test lint clean
.DEFAULT_GOAL := demo

demo: .venv/installed  ## pack, pretrain, kNN, probe, fine-tune, report: minutes on two CPU cores, less on GPUs
	$(BIN)/mae-dist demo --out $(OUT)

test: .venv/installed  ## the whole suite
	$(BIN)/python -m pytest

lint: .venv/installed  ## what pre-commit and CI hold the code to
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

.venv/installed: pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is too old: Python 3.11 or newer is needed; try make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
		|| { echo "$(PYTHON) cannot make virtual environments: run apt install python3-venv"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[dev]'
	touch $@

clean:  ## remove the environment and what the tools left
	rm -rf .venv .pytest_cache .ruff_cache *.egg-info
