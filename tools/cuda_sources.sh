#!/usr/bin/env bash
# Compiles every .cu file to cubins for the GPUs supported, printing its registers; a spill is an error.
set -euo pipefail
cd "$(dirname "$0")/.."
files=$(find csrc -name '*.cu')
[ -n "$files" ] || { echo "there are no .cu files: nothing to compile"; exit 0; }
command -v nvcc >/dev/null || { echo "nvcc is not on this machine: .cu files not compiled"; exit 0; }
mkdir -p build/cubin
for file in $files; do
  for arch in sm_80 sm_90 sm_100; do
    log=$(nvcc -std=c++17 -O3 -Icsrc -cubin -arch=$arch -Xptxas -v -o "build/cubin/$(basename "$file").$arch" "$file" 2>&1) ||
      { echo "$log"; exit 1; }
    echo "$file $arch"
    grep -E 'registers|spill' <<<"$log"
    ! grep -qE '[1-9][0-9]* bytes spill' <<<"$log" || { echo "$file spills on $arch"; exit 1; }
  done
done
