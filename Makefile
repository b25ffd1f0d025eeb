# `make demo` and `make test` do all the set-up on a fresh machine with Python 3.11+, pip and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# The CPU build of torch; without a route to this index the plain package of the same version is taken.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH  := $(shell grep '^torch==' constraints.txt)

.PHONY: install demo test check docs catalogue replicate sanitize wheels clean

install: $(STAMP)

NATIVE := CMakeLists.txt $(wildcard rarefy/kernels/native/*)

$(STAMP): pyproject.toml constraints.txt requirements-demo.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(TORCH)+cpu --no-deps --retries 0 --timeout 20 --index-url $(TORCH_INDEX) 2>/dev/null || $(PIP) install -q $(TORCH)
	$(PIP) install -q -c constraints.txt -e '.[hub,tasks,dev,release]'
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

# The heavier checks whose sources changed since their committed result; `make catalogue` afterwards.
replicate: install
	$(BIN)/python -m replications.run

# The kernels under the address and undefined-behaviour sanitizers.
sanitize: install
	rm -rf build/sanitized && $(PIP) wheel -q . --no-deps -w build/sanitized -C cmake.define.RAREFY_SANITIZE=ON -C build-dir=build/sanitize
	$(BIN)/python -m zipfile -e build/sanitized/rarefy-*.whl build/sanitized
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
	  RAREFY_REQUIRE_NATIVE=1 $(BIN)/python .ci/against.py build/sanitized -m pytest tests/test_kernels.py tests/test_kernels_sparse.py tests/test_kernels_columns.py --noconftest -k "not openmp and not compiled"

# What a release uploads, in dist/: a wheel with the kernels, and one of pure Python, which is also what an install without a
# C++ compiler makes. Each is tried in a fresh environment. torch's OpenMP runtime must stay the only one: none is bundled.
wheels: install
	rm -rf dist build/wheels && $(PIP) wheel -q . --no-deps -w build/wheels
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 -w dist build/wheels/rarefy-*.whl
	CXX=/bin/false CC=/bin/false $(PIP) wheel -q . --no-deps -w dist
	$(BIN)/python .ci/try_wheels.py dist

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache
