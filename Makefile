# `make run` and `make test` are all a newcomer needs; both start with `make install`.
PYTHON ?= python3
# The torch that the tests were last run with. `make install TORCH=torch` takes the newest.
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: run test install lint types unit docs format clean

run: install
	$(BIN)/equigrad run digits

test: install lint types unit

install: .venv/.installed

.venv/.installed: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "equigrad needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" --editable ".[experiments,search,dev]"
	@touch $@

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: install
	$(BIN)/pyright

# One process a core, each with one thread.
unit: install
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadscope

# The pages in site/: every warning is an error, and every script of the gallery runs.
docs: install
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	$(BIN)/sphinx-build -W --keep-going -b html docs site

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv runs site docs/gallery .pytest_cache .ruff_cache
