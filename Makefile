# make demo    sets up everything in .venv and trains a 90 %-sparse network with the whole method beside plain RigL
# make test    sets up everything in .venv, checks style and types, builds with warnings as errors, runs all tests and
#              a short fuzz
# make fuzz    calls every op with random, wrong and damaged arguments under sanitizers, for FUZZ_SECONDS=600
# make docs    builds the pages of docs/ as a site, in build/site
# make gpu-check   on a machine with a GPU: builds, tests, sanitizes, measures, in ten minutes, with what is installed
# make dist    builds the sdist and from it the wheel, installs that into an empty environment and tries it from another folder
#
# PYTHON=python3.12 chooses the interpreter, VENV=path another environment (one that is there is used as it is).

PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
# torch wants a compiler and ninja on the PATH.
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP := $(BIN)/python -m pip install -q

.PHONY: demo test lint dist clean

demo: $(VENV)/demo.done fashion-mnist
	$(BIN)/python -m training demo

test: $(VENV)/test.done lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8  # tests of threads set their number
	$(MAKE) docs
	$(MAKE) fuzz FUZZ_SECONDS=30
	$(MAKE) dist

# FUZZ_OPTIONS="--first 1000000" begins with another seed.
.PHONY: fuzz
fuzz: FUZZ_SECONDS ?= 600
fuzz: $(VENV)/test.done
	$(BIN)/python python_tests/fuzz_ops.py --seconds $(FUZZ_SECONDS) $(FUZZ_OPTIONS)

# A link that leads nowhere, and a name that the API page has and the package has not, fail. The theme's note on its
# successor is no warning of ours.
.PHONY: docs
docs: $(VENV)/test.done
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict

lint: $(VENV)/test.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: gpu-check
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(if $(OUT),--folder $(OUT))

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; call make with PYTHON=python3.12, say." >&2; exit 1; }
	@command -v $${CXX:-c++} > /dev/null || { \
	  echo "A C++ compiler is needed (Debian, Ubuntu: apt-get install g++)." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { \
	  echo "The venv module is needed (Debian, Ubuntu: apt-get install python3-venv python3-dev)." >&2; exit 1; }

$(VENV)/torch.done: $(VENV)/bin/python
	@echo "Installing torch (some minutes the first time) ..."
	$(PIP) "torch>=2.11" torchvision numpy "setuptools>=64" wheel ninja
	@touch $@

# The demo on a machine without a GPU leaves the CUDA parts out, for time.
$(VENV)/demo.done: $(VENV)/torch.done $(SOURCES)
	@echo "Building the kernels ..."
	UASPARSE_BUILD_CUDA=$${UASPARSE_BUILD_CUDA:-$$($(BIN)/python -c 'import torch; print("auto" if torch.cuda.is_available() else 0)')} \
	  $(PIP) --no-build-isolation -e '.[training]'
	@touch $@

$(VENV)/test.done: $(VENV)/torch.done $(SOURCES)
	UASPARSE_WERROR=1 $(PIP) --no-build-isolation -e '.[training,benchmark,test,docs]'
	@touch $@

# Debian and Ubuntu carry the images; elsewhere the demo downloads them.
.PHONY: fashion-mnist
fashion-mnist:
	@test -d /usr/share/datasets/fashion-mnist || test "$$(id -u)" != 0 || ! command -v apt-get > /dev/null || { \
	  echo "Installing the images (package dataset-fashion-mnist) ..."; \
	  apt-get -qq update && apt-get -qq install -y dataset-fashion-mnist > /dev/null; } || true

# CPU parts only, for time; "empty" but for torch and ninja, borrowed from $(VENV) to spare a second download of gigabytes.
dist: $(VENV)/test.done
	rm -rf dist build/dist-check
	UASPARSE_BUILD_CUDA=0 $(BIN)/python -m build -q --no-isolation
	$(PYTHON) -m venv build/dist-check
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
	  > "$$(build/dist-check/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/borrowed.pth"
	build/dist-check/bin/python -m pip install -q --no-deps --force-reinstall dist/*.whl
	cp python_tests/smoke.py build/dist-check/smoke.py
	cd build/dist-check && bin/python -I smoke.py

clean:
	rm -rf build dist *.egg-info uasparse_kernels/*.so $(VENV)
