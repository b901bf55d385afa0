#!/usr/bin/env bash
# All that needs a GPU, in under nine minutes: the gpu tests, then the benchmarks. A short table comes last.
#
#   benchmarks/gpu_all.sh OUT [options of bench_gpu.py]     e.g. --images photos/ --sweep
#
# OUT gets tests-*.txt, gpu.json (machine, versions, settings, figures) and table.txt. The exit status is the tests'.
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
# Warnings of other versions than those the tests are held to do not fail here. What is new on a GPU comes first. Stopped by
# INT, pytest says what it has seen so far; where it cannot, -v has the name of the test, and a hang leaves its stacks.
fewer=()  # cores, so that the many decoders of small tests are made in less time
[ "$(nproc)" -gt 4 ] && command -v taskset >/dev/null && fewer=(taskset -c 0-3)
gpu_tests() {  # seconds, file of the output, what pytest is to run
  local seconds=$1 log=$out/$2
  shift 2
  (cd "$elsewhere" && timeout -s INT -k 10 "$seconds" "$@" -v -m gpu -p no:cacheprovider -rA -W default \
    --timeout=100 --timeout-method=thread "${chosen[@]}" -c "$repo/pyproject.toml" --rootdir "$repo") >"$log" 2>&1
  local code=$?
  grep -E "^(FAILED|ERROR)|PSNR|[0-9] (passed|failed|skipped|deselected)" "$log" | cut -c 1-200
  case $code in
    0 | 1 | 5) ;;
    *) echo "pytest ended with $code; the last lines of $log:" && grep -v "^$" "$log" | tail -3 | cut -c 1-200 ;;
  esac
  return $code
}
first=("$repo/tests/test_kernels.py" "$repo/tests/test_gpu.py") many=$repo/tests/test_errors.py
gpu_tests 150 tests-first.txt "$python" -m pytest "${first[@]}"
status=$?
gpu_tests 90 tests-rest.txt "${fewer[@]}" "$python" -m pytest "${first[@]/#/--ignore=}" "--ignore=$many" "$repo/tests" ||
  status=$?
gpu_tests 60 tests-errors.txt "${fewer[@]}" "$python" -m pytest "$many" || status=$?
left=$((530 - SECONDS))
timeout -s INT -k 10 $left "$python" benchmarks/bench_gpu.py --device "$device" --out "$out/gpu.json" "$@" \
  2>"$out/bench.err" >"$out/table.txt"
[ $? -eq 0 ] || { echo "bench_gpu.py did not finish:"; tail -5 "$out/bench.err"; }
grep "left out" "$out/bench.err"
cat "$out/table.txt"
exit $status
