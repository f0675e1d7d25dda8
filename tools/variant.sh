#!/usr/bin/env bash
# Tests of other builds and instruction sets than the usual one, each build in a copy under build/, so that
# the library in python/solera stays as it is.
#
#   tools/variant.sh isa        the usual build, limited to its avx2 kernels, then to those without vector instructions
#   tools/variant.sh sanitize   AddressSanitizer and UBSan, on the sources as aarch64 and macOS compile them
#   tools/variant.sh generic    no x86 instruction sets: what aarch64 and macOS get
#
# `isa` compiles nothing. `sanitize` is a build of one instruction set (see SOLERA_GENERIC in setup.py), the widest of
# this machine: the usual three would be three times the objects, two of which no test would run.
# More arguments go to pytest. PYTHON: the interpreter (.venv's if there is one). JOBS: processes, 2.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)
variant=$1
shift
case $variant in sanitize | generic | isa) ;; *) echo "no such variant: $variant" >&2; exit 2 ;; esac

# What checks values and memory; compilers, interpreters, docs and packaging have their own stage, and two ranks
# are processes that spend their time starting.
tests=(--ignore-glob='tests/test_*.py' -m "not inductor and not slow")
memory="not compile and not opcheck and not ranks and not distributed and not narrower"
export PYTHONPATH=$root/tools
tests+=(-p brief_tests --hypothesis-profile=brief -p no:cacheprovider --capture=sys)
tests+=(-n "${JOBS:-2}" --dist worksteal)
# Another instruction set changes values, and nothing that happens in Python.
values="$memory and not gradgrad and not gradcheck and not bad_ and not pickle"

copy() {
  mkdir -p "build/$1"
  (cd "build/$1" && find . -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +)
  mkdir "build/$1/docs"
  cp -a docs/*.md "build/$1/docs/"  # tests run the calls they print
  cp -a csrc python tests setup.py pyproject.toml README.md LICENSE "build/$1/"
  rm -rf "build/$1"/python/solera/_[Ci]*.so "build/$1/python/solera/triton_kernels"
  cp -a triton_kernels "build/$1/python/solera/triton_kernels"
}

build() { # name VARIABLE=value...
  copy "$1"
  (cd "build/$1" && env SOLERA_WERROR=1 "${@:2}" "$python" setup.py -q build_ext --inplace >build.log) ||
    { tail -40 "build/$1/build.log"; return 1; }
}

has() { grep -qw "$1" /proc/cpuinfo 2>/dev/null; }
if has avx512dq; then widest=avx512; elif has avx2 && has f16c; then widest=avx2; else widest=generic; fi

case $variant in
  sanitize)
    build sanitize SOLERA_SANITIZE=1 SOLERA_GENERIC=$widest
    preload=
    for library in libasan.so libubsan.so; do preload+=" $(realpath "$(${CXX:-g++} -print-file-name=$library)")"; done
    # torch and Python hold memory at exit and register symbols twice: not what is looked for here.
    export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:alloc_dealloc_mismatch=0:abort_on_error=1
    export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
    cd build/sanitize
    export PYTHONPATH=$PWD/python:$PYTHONPATH LD_PRELOAD="${preload# }"
    exec "$python" -m pytest "${tests[@]}" -k "$memory" "$@"
    ;;
  isa)
    # The usual tests were the run on the widest; functions over cores bring no other code than their core.
    export SOLERA_TEST_CORES=1
    [ "$widest" != generic ] || { echo "no narrower instruction set on this machine"; exit 0; }
    if [ "$widest" = avx512 ]; then
      echo SOLERA_ISA=avx2
      SOLERA_ISA=avx2 "$python" -m pytest "${tests[@]}" -k "$values" "$@"
    fi
    echo SOLERA_ISA=generic
    SOLERA_ISA=generic exec "$python" -m pytest "${tests[@]}" -k "$values" "$@"
    ;;
  generic)
    build generic SOLERA_GENERIC=1 SOLERA_OPTIMIZE=0
    echo "SOLERA_GENERIC=1"
    cd build/generic
    PYTHONPATH=$PWD/python:$PYTHONPATH exec "$python" -m pytest "${tests[@]}" -k "$values" "$@"
    ;;
esac
