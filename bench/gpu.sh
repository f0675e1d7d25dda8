#!/usr/bin/env bash
# Builds, tests, benches and checks Solera on a CUDA machine in under nine minutes, with nothing installed
# and nothing downloaded: python3 with torch and Triton is enough.
#
#     bash bench/gpu.sh [--dry-run] [--python PYTHON] [OUT]        (OUT: ./out)
#
# Everything is written under OUT: summary.txt, one log a stage, bench.json and bench.png. --dry-run does the
# same stages on the CPU. The build happens in a temporary copy, so the tree stays as it is.
set -euo pipefail

device=cuda
patience=1 # times the limits: the dry run may be on two busy cores
python=${PYTHON:-python3}
out=
while (($#)); do
  case $1 in
    --dry-run) device=cpu patience=3 ;;
    --python) python=$2 && shift ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 0 ;;
    -*) echo "unknown option $1" >&2 && exit 2 ;;
    *) out=$1 ;;
  esac
  shift
done
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "${out:=out}"
out=$(cd "$out" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
summary=$out/summary.txt
: >"$summary"
begun=$SECONDS
failed=0

say() { echo "$*" | tee -a "$summary"; }

# stage NAME SECONDS COMMAND...: runs under a time limit into NAME.log, notes the outcome, never stops the rest.
stage() {
  local name=$1 limit=$(($2 * patience)) start=$SECONDS status=0 lines=6
  shift 2
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  case $status in
    0) say "ok       $name: $((SECONDS - start)) s" && lines=3 ;;
    124 | 137) say "TIMEOUT  $name: stopped after $limit s" && failed=1 ;;
    *) say "FAILED   $name: exit $status after $((SECONDS - start)) s" && failed=1 ;;
  esac
  tail -n "$lines" "$out/$name.log" | cut -c 1-160 | sed 's/^/           /' | tee -a "$summary"
  return "$status"
}

has() { "$python" -c "import $1" >/dev/null 2>&1; }

# The package as an install would lay it out: triton_kernels inside solera, ahead of anything installed.
cp -r "$root/setup.py" "$root/pyproject.toml" "$root/csrc" "$root/python" "$root/triton_kernels" \
  "$root/bench" "$root/tests" "$work"
rm -rf "$work"/python/solera/_C.*so
site=$work/site
assemble() {
  rm -rf "$site" && mkdir -p "$site"
  cp -r "$work/python/solera" "$site/solera"
  cp -r "$work/triton_kernels" "$site/solera/triton_kernels"
}
export PYTHONPATH=$site:$work${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 SOLERA_TEST_DEVICE=$device
cd "$work"

say "device $device; $("$python" - 2>&1 <<'PY' || true
import platform, torch
facts = ["python", platform.python_version(), "torch", torch.__version__, "cuda", str(torch.version.cuda)]
try:
    import triton
    facts += ["triton", triton.__version__]
except ImportError:
    facts += ["no triton"]
if torch.cuda.is_available():
    facts += [str(torch.cuda.get_device_properties(0))]
print(*facts)
PY
)"

# The CPU kernels are built here too: a machine without a compiler goes on without them.
SOLERA_WERROR=1 stage build 100 "$python" setup.py -q build_ext --inplace || true
assemble
stage import 60 "$python" - <<'PY' || true
import os, torch, solera
from solera._ops import compiled_library, load_error
device = os.environ["SOLERA_TEST_DEVICE"]
x = torch.randn(8, 64, device=device, requires_grad=True)
solera.norm.rms_norm(x).sum().backward()
print("solera", solera.__version__, "compiled library:", load_error or compiled_library.name)
print("rms_norm on", x.device, "gradient finite:", bool(x.grad.isfinite().all()))
PY

# One process a folder of tests, all at once where there are cores for it: most of the time is Triton
# compiling. A folder's last line is shown, its whole output comes after.
# shellcheck disable=SC2329  # called through bash -c, where timeout can stop it
run_tests() {
  local status=0 cores folder pids=()
  cores=$(nproc)
  for folder in . norm ensemble sinkhorn weights; do
    (
      files=(tests/"$folder"/test_*.py)
      "$python" -m pytest "${files[@]}" -q -p no:cacheprovider --maxfail=25 -m "not slow" \
        -W default::UserWarning >"tests-${folder/./top}.log" 2>&1 || exit_code=$?
      echo "tests/$folder: $(tail -n 1 "tests-${folder/./top}.log")"
      exit "${exit_code:-0}"
    ) &
    pids+=($!)
    ((cores >= 8)) || wait $! || status=1
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=1; done
  return "$status"
}
export -f run_tests
export python

if has pytest && has hypothesis; then
  stage tests 170 bash -c run_tests || true
  cat tests-*.log >>"$out/tests.log" || true
else
  say "pytest or hypothesis is missing: the values are checked by the benchmark's own check instead"
  stage check 170 "$python" -m bench --device "$device" --check-only --no-showcase || true
fi
stage bench 130 "$python" -m bench --device "$device" --quick --budget 90 --no-showcase \
  --json "$out/bench.json" || true

sanitizer=$(command -v compute-sanitizer || true)
for found in /usr/local/cuda*/bin/compute-sanitizer; do
  [[ -n $sanitizer || ! -x $found ]] || sanitizer=$found
done
check=("$python" -m bench.every_op "$device")
if [[ $device == cuda && -n $sanitizer ]]; then
  # Without its cache every tensor is an allocation of its own, so a read past its end is seen.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage memcheck 70 "$sanitizer" --tool memcheck --error-exitcode 9 \
    "${check[@]}" || true
else
  say "compute-sanitizer is not here: every op runs without it"
  stage every_op 70 "${check[@]}" || true
fi

say "$((SECONDS - begun)) s in all; results in $out"
exit "$failed"
