# `make demo` and `make test` do all the set-up on a fresh machine with Python 3.11+, pip and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# The CPU build of torch; without a route to this index the plain package of the same version is taken.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH  := $(shell grep '^torch==' constraints.txt)

.PHONY: install demo test check docs catalogue replicate sanitized hostile sanitize races aarch64 wheels clean

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
	$(BIN)/python -m benchmarks.page --check
	$(BIN)/python -m replications.page --check

docs: install
	$(BIN)/mkdocs build --strict --site-dir build/docs

catalogue: install
	$(BIN)/python -m pytest -m evidence --record-evidence
	$(BIN)/rarefy catalogue --write

# The heavier checks whose sources changed since their committed result; `make catalogue` afterwards.
replicate: install
	$(BIN)/python -m replications.run

# A build of the kernels with the address and undefined-behaviour sanitizers, and a Python that runs under them.
SANITIZERS = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 \
  OMP_NUM_THREADS=1 RAREFY_REQUIRE_NATIVE=1 $(BIN)/python .ci/against.py build/sanitized

sanitized: install
	rm -rf build/sanitized && $(PIP) wheel -q . --no-deps -w build/sanitized -C cmake.define.RAREFY_SANITIZE=ON -C build-dir=build/sanitize
	$(BIN)/python -m zipfile -e build/sanitized/rarefy-*.whl build/sanitized

# So many hostile byte strings through every layout; a line of JSON.
CASES ?= 1000
hostile: sanitized
	$(SANITIZERS) -c "from rarefy.testing.hostile import report; raise SystemExit(report($(CASES)))"

sanitize: hostile
	$(SANITIZERS) -m pytest tests/test_kernels.py tests/test_kernels_sparse.py tests/test_kernels_columns.py tests/test_kernels_experts.py --noconftest -k "not openmp and not compiled"

# The kernels without Python: where threads race, and on another processor (needs g++-aarch64-linux-gnu and qemu-user-static).
CHECK := tests/native/check.cpp rarefy/kernels/native/generic.cpp rarefy/kernels/native/decoder.cpp
races:
	mkdir -p build && g++ -std=c++17 -O1 -g -fsanitize=thread -DRAREFY_STD_THREADS -pthread $(CHECK) -o build/races
	TSAN_OPTIONS=halt_on_error=1 build/races

aarch64:
	mkdir -p build && aarch64-linux-gnu-g++ -std=c++17 -O2 -static -DRAREFY_STD_THREADS -pthread $(CHECK) -o build/aarch64
	qemu-aarch64-static build/aarch64

# What a release uploads, in dist/: a wheel with the kernels, and one of pure Python, which is also what an install without a
# C++ compiler makes. Each is tried in a fresh environment. torch's OpenMP runtime must stay the only one: none is bundled.
wheels: install
	rm -rf dist build/wheels && $(PIP) wheel -q . --no-deps -w build/wheels
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 -w dist build/wheels/rarefy-*.whl
	CXX=/bin/false CC=/bin/false $(PIP) wheel -q . --no-deps -w dist
	$(BIN)/python .ci/try_wheels.py dist

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache
