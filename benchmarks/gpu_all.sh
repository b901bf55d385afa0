#!/usr/bin/env bash
# All that needs a GPU, in under nine minutes: the gpu tests, then the benchmarks. A short table comes last.
#
#   benchmarks/gpu_all.sh OUT [options of bench_gpu.py]     e.g. --images photos/ --sweep
#
# OUT gets tests-first.txt, tests.txt, gpu.json (machine, versions, settings, figures) and table.txt. The exit status is the tests'.
# PYTHON is the interpreter; where gpuload is not installed in it, this checkout is put together in a temporary folder.
# Without DALI, which the tests insist on, they run without it and say so. DEVICE=cpu is for trying this file where
# there is no GPU: the tests marked gpu are then skipped.
set -uo pipefail
out=${1:?usage: gpu_all.sh OUT [options of bench_gpu.py]}
shift
mkdir -p "$out" && out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
repo=$PWD
python=${PYTHON:-python3} device=${DEVICE:-cuda} chosen=()
export PYTHONUNBUFFERED=1

elsewhere=$(mktemp -d)  # from where the checkout's gpuload/, which lacks its kernels, does not hide the whole one
trap 'rm -rf "$elsewhere"' EXIT
if ! (cd "$elsewhere" && "$python" -c 'import gpuload.kernels') 2>/dev/null; then
  echo "gpuload is not installed: taken from $repo"
  cp -r gpuload "$elsewhere/" && cp -r kernels "$elsewhere/gpuload/"
  flags=$("$python" -c 'import runpy; print(*runpy.run_path("kernels/flags.py")["CXX"])')
  for name in resize:resize_cpu jpeg:jpeg_region; do
    # shellcheck disable=SC2086
    g++ $flags -fPIC -shared -o "$elsewhere/gpuload/kernels/_${name%:*}.so" "kernels/${name#*:}.cpp" ||
      echo "kernels/${name#*:}.cpp was not compiled: the CPU's part of the tests and figures is slower"
  done
  export PYTHONPATH=$elsewhere${PYTHONPATH:+:$PYTHONPATH}
  (cd / && "$python" -c 'import gpuload.kernels') || exit 2
fi

if [ "$device" = cuda ]; then
  export GPULOAD_REQUIRE_GPU=1
  if ! "$python" -c 'import nvidia.dali' 2>/dev/null; then
    echo "DALI is not installed: its tests are left out"
    chosen=(-k "not dali" --ignore "$repo/tests/test_dali.py")
  fi
fi
# warnings of other versions than those the tests are held to do not fail here; what is new on a GPU comes first; -s INT
# lets pytest say what it has seen so far
gpu_tests() {  # seconds, file of the output, what pytest is to run
  local seconds=$1 log=$2
  shift 2
  (cd "$elsewhere" && timeout -s INT -k 10 "$seconds" "$python" -m pytest -q -m gpu -p no:cacheprovider -rA -W default \
    "${chosen[@]}" -c "$repo/pyproject.toml" --rootdir "$repo" "$@") >"$out/$log" 2>&1
  local code=$?
  grep -E "^(FAILED|ERROR)|PSNR|passed|failed|skipped" "$out/$log" | cut -c 1-200
  [ $code -ne 124 ] || echo "the tests of $log ran past $seconds seconds and were stopped"
  return $code
}
first=("$repo/tests/test_kernels.py" "$repo/tests/test_gpu.py")
gpu_tests 150 tests-first.txt "${first[@]}"
status=$?
gpu_tests 120 tests.txt "${first[@]/#/--ignore=}" "$repo/tests" || status=$?
left=$((530 - SECONDS))
timeout -s INT -k 10 $left "$python" benchmarks/bench_gpu.py --device "$device" --out "$out/gpu.json" "$@" \
  2>"$out/bench.err" >"$out/table.txt"
[ $? -eq 0 ] || { echo "bench_gpu.py did not finish:"; tail -5 "$out/bench.err"; }
grep "left out" "$out/bench.err"
cat "$out/table.txt"
exit $status
