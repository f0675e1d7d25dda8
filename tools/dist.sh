#!/usr/bin/env bash
# Builds the sdist, from it the wheel, looks at what they hold, and installs the wheel into a new environment
# that borrows torch from this one. PYTHON: the interpreter (.venv's if there is one).
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)
fail() { echo "dist: $*" >&2; exit 1; }

rm -rf dist build/lib* build/bdist* build/dist
mkdir -p dist build/dist
"$python" setup.py -q sdist >build/dist/sdist.log
# The sdist's sources are as old as the tree's and the objects list what they were made of, so what `make build`
# compiled serves here too; a source that the sdist lacks or changed is compiled, and fails.
objects=$("$python" -c "import sys, sysconfig; print(f'temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}')")
printf '[build_ext]\nbuild_temp = %s\n' "$root/build/$objects" >build/dist/objects.cfg
DIST_EXTRA_CONFIG=$root/build/dist/objects.cfg SOLERA_WERROR=1 "$python" -m pip wheel -q --no-build-isolation \
  --no-deps -w dist dist/solera-*.tar.gz
sdist=$(echo dist/solera-*.tar.gz)
wheel=$(echo dist/solera-*.whl)
echo "$sdist $wheel"

held=$(tar tzf "$sdist" | cut -d/ -f2-)
for file in LICENSE $(find csrc triton_kernels python/solera -type f ! -path '*__pycache__*' ! -name '_C*' ! -name '_io*'); do
  grep -qxF "$file" <<<"$held" || fail "the sdist lacks $file"
done
held=$("$python" -m zipfile -l "$wheel" | awk '{print $1}')
for file in solera/_C.abi3.so solera/py.typed solera/triton_kernels/norm/row_norm.py; do
  grep -qx "$file" <<<"$held" || fail "the wheel lacks $file"
done
! grep -qE '^csrc|\.cpp$|^triton_kernels' <<<"$held" || fail "the wheel holds sources or a top-level triton_kernels"
case $wheel in *-cp311-abi3-*) ;; *) fail "the wheel is not tagged cp311-abi3: $wheel" ;; esac

"$python" -m venv build/dist/env
site=$(build/dist/env/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
build/dist/env/bin/python -m pip install -q --no-deps --no-index "$wheel"
# Appended to the path after the new environment's own packages, whose solera therefore comes first.
"$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))" >"$site/borrowed.pth"
cd build/dist
env -u PYTHONPATH env/bin/python -W error::UserWarning - <<'CHECK'
import importlib.util
import torch
import solera

assert "build/dist/env" in solera.__file__, solera.__file__
assert importlib.util.find_spec("solera.triton_kernels.norm.row_norm")
x = torch.randn(3, 64)
torch.testing.assert_close(solera.norm.rms_norm(x), torch.nn.functional.rms_norm(x, (64,)))
CHECK
env -u PYTHONPATH env/bin/solera info
