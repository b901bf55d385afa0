#!/usr/bin/env bash
# All that needs a GPU, in under nine minutes: the gpu tests, then the benchmarks. A short table comes last.
#
#   benchmarks/gpu_all.sh OUT [options of bench_gpu.py]     e.g. --images photos/ --sweep
#
# OUT gets tests.txt, gpu.json (machine, versions, settings, figures) and table.txt. The exit status is the tests'.
# PYTHON is the interpreter; without DALI, which the tests insist on, they run without it and say so. DEVICE=cpu is for
# trying this file where there is no GPU: the tests marked gpu are then skipped.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: gpu_all.sh OUT [options of bench_gpu.py]}
shift
mkdir -p "$out"
python=${PYTHON:-python3} device=${DEVICE:-cuda} chosen=()
export PYTHONUNBUFFERED=1

if [ "$device" = cuda ]; then
  export GPULOAD_REQUIRE_GPU=1
  "$python" -c 'import nvidia.dali' 2>/dev/null || { echo "DALI is not installed: its tests are left out"; chosen=(-k "not dali"); }
fi
timeout 240 "$python" -m pytest -q -m gpu -p no:cacheprovider -rA "${chosen[@]}" tests >"$out/tests.txt" 2>&1
status=$?
grep -E "^(FAILED|ERROR)|PSNR|passed|failed|skipped" "$out/tests.txt" | cut -c 1-200
[ $status -eq 124 ] && echo "the tests ran past four minutes and were stopped"
timeout 280 "$python" benchmarks/bench_gpu.py --device "$device" --out "$out/gpu.json" "$@" 2>"$out/bench.err" >"$out/table.txt"
[ $? -eq 0 ] || { echo "bench_gpu.py did not finish:"; tail -5 "$out/bench.err"; }
grep "left out" "$out/bench.err"
cat "$out/table.txt"
exit $status
