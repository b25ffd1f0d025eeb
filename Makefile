# `make demo` and `make test` do all the set-up on a fresh machine with Python 3.11+, pip and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# The CPU build of torch; without a route to this index the plain package of the same version is taken.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH  := $(shell grep '^torch==' constraints.txt)

.PHONY: install demo test check docs catalogue clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt requirements-demo.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(TORCH)+cpu --no-deps --retries 0 --timeout 20 --index-url $(TORCH_INDEX) 2>/dev/null || $(PIP) install -q $(TORCH)
	$(PIP) install -q -c constraints.txt -e '.[hub,tasks,dev]'
	$(PIP) install -q --no-deps -r requirements-demo.txt
	touch $@

demo: install
	$(BIN)/rarefy demo

test: install
	$(BIN)/python -m pytest -n 2 --cov=rarefy --cov-report=term:skip-covered

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/rarefy catalogue --check

docs: install
	$(BIN)/mkdocs build --strict --site-dir build/docs

catalogue: install
	$(BIN)/python -m pytest -m evidence --record-evidence
	$(BIN)/rarefy catalogue --write

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache
