#!/usr/bin/env bash
# All that needs a GPU, in stages of less than two minutes, the most valuable first, in fifteen minutes at most.
#
#   benchmarks/gpu_all.sh OUT [STAGE...] [-- options]     e.g. gpu_all.sh out rates training -- --images photos/
#
#   correct      tests of the kernels and of every decoder but DALI's
#   rates        nvJPEG in order and shuffled, with the host's help and alone; engine, all but decoding, a copy
#   training     ResNet-50 and ViT-S/16: synthetic and fed
#   kernel       the kernels alone, by variant
#   large        photos of 1 and 12 megapixels
#   dali         DALI's own pipeline, and gpuload's decoder on it
#   peers        nvImageCodec, the CPU, torchvision, lance.torch.data
#   batches      of 64 and 256
#   tests        the rest of the tests, and dali-tests, those of DALI
#
# Each stage has a time limit of its own, writes OUT/STAGE.json as it goes, and says what it did in OUT/STAGE.txt;
# OUT/stages.txt has the seconds and the exit status of each. TOTAL is the seconds for all of them together. The options
# are bench_gpu.py's; KERNEL_OPTIONS are bench_kernel.py's, PYTEST_ADDOPTS pytest's. The exit status is 1 where a stage
# failed, 2 where a stage is unknown or gpuload cannot be put together.
#
# PYTHON is the interpreter; where gpuload is not installed in it, this checkout is put together in a temporary folder.
# DEVICE=cpu is for trying this file where there is no GPU: the tests marked gpu are then skipped.
set -uo pipefail
stages=(correct rates training kernel large dali peers batches tests dali-tests)
usage="gpu_all.sh OUT [STAGE...] [-- options], STAGE of: ${stages[*]}"
out=${1:?$usage}
shift
wanted=()
for name in "$@"; do
  [ "$name" = -- ] && break
  case " ${stages[*]} " in
    *" $name "*) wanted+=("$name") ;;
    *) echo "Expected $usage, got $name." >&2 && exit 2 ;;
  esac
done
shift ${#wanted[@]}
options=("${@:2}")
[ ${#wanted[@]} -gt 0 ] || wanted=("${stages[@]}")
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
for i in "${!options[@]}"; do # folders, as seen from here
  [ -d "${options[i]}" ] && options[i]=$(cd "${options[i]}" && pwd)
done
cd "$(dirname "$0")/.." || exit 2
repo=$PWD python=${PYTHON:-python3} device=${DEVICE:-cuda} total=${TOTAL:-840}
export PYTHONUNBUFFERED=1

elsewhere=$(mktemp -d) # from where the checkout's gpuload/, which lacks its kernels, does not hide the whole one
trap 'rm -rf "$elsewhere"' EXIT
if ! (cd "$elsewhere" && "$python" -c 'import gpuload.kernels') 2>/dev/null; then
  echo "gpuload is not installed: taken from $repo"
  cp -a gpuload kernels setup.py pyproject.toml README.md LICENSE "$elsewhere/"
  (cd "$elsewhere" && "$python" setup.py -q build_ext --inplace) >"$out/build.txt" 2>&1
  for part in _cpu _tables; do
    compgen -G "$elsewhere/kernels/$part*.so" >/dev/null ||
      echo "kernels/$part was not compiled, see $out/build.txt: tests and figures of the host's part are slower"
  done
  mv "$elsewhere/kernels" "$elsewhere/gpuload/kernels"
  export PYTHONPATH=$elsewhere${PYTHONPATH:+:$PYTHONPATH}
  (cd / && "$python" -c 'import gpuload.kernels') || exit 2
fi

[ "$device" = cuda ] && export GPULOAD_REQUIRE_GPU=1
fewer=() # cores, so that the many decoders of small tests are made in less time
[ "$(nproc)" -gt 4 ] && command -v taskset >/dev/null && fewer=(taskset -c 0-3)
first=() # what is new on a GPU
for name in planes kernels gpu; do
  [ -e "tests/test_$name.py" ] && first+=("$repo/tests/test_$name.py")
done
# Warnings of other versions than those the tests are held to do not fail here. Stopped by INT, pytest says what it has
# seen so far; where it cannot, -v has the name of the test, and a hang leaves its stacks.
pytest=(-v -m gpu -p no:cacheprovider -rA -W default --timeout=100 --timeout-method=thread
  -c "$repo/pyproject.toml" --rootdir "$repo")
kernel_options=()
read -ra kernel_options <<<"${KERNEL_OPTIONS:-}"

command_of() { # stage, seconds → the array `command`
  local tests=("$python" "$repo/benchmarks/gpu_tests.py" "$out/$1.json" "${pytest[@]}")
  case $1 in
    correct) command=("${tests[@]}" -k "not dali" "${first[@]}") ;;
    tests) command=("${fewer[@]}" "${tests[@]}" -k "not dali" "${first[@]/#/--ignore=}" "$repo/tests") ;;
    dali-tests) command=("${fewer[@]}" "${tests[@]}" -k dali "$repo/tests") ;;
    kernel)
      command=("$python" "$repo/benchmarks/bench_kernel.py" --device "$device" --out "$out/kernel.json" "${kernel_options[@]}")
      ;;
    *)
      command=("$python" "$repo/benchmarks/bench_gpu.py" "$1" --device "$device" --out "$out/$1.json"
        --limit "$(($2 - 10))" "${options[@]}")
      ;;
  esac
}

limit_of() { # stage → seconds
  case $1 in
    kernel) echo 60 ;;
    dali-tests) echo 80 ;;
    *) echo 115 ;;
  esac
}

status=0
: >"$out/stages.txt"
for name in "${wanted[@]}"; do
  seconds=$(limit_of "$name") left=$((total - SECONDS)) began=$SECONDS
  [ "$left" -lt "$seconds" ] && seconds=$left
  if [ "$seconds" -lt 25 ]; then
    echo "$name: left out, $left s are left" | tee -a "$out/stages.txt"
    continue
  fi
  if [ "$name" = dali-tests ] && ! "$python" -c 'import nvidia.dali' 2>/dev/null; then
    echo "$name: left out, DALI is not installed" | tee -a "$out/stages.txt"
    continue
  fi
  command_of "$name" "$seconds"
  (cd "$elsewhere" && exec timeout -s INT -k 10 "$seconds" "${command[@]}") >"$out/$name.txt" 2>&1
  code=$?
  grep -E "^(FAILED|ERROR)|PSNR|[0-9] (passed|failed|skipped|deselected)|left out|[│┃┌└┏]|GB/s" "$out/$name.txt" | cut -c 1-400
  case $name.$code in # pytest's 5: nothing was selected
    *.0 | *tests.5 | correct.5) ;;
    *)
      status=1
      echo "$name ended with $code; the last lines of $out/$name.txt:" && grep -v "^$" "$out/$name.txt" | tail -3 | cut -c 1-400
      ;;
  esac
  echo "$name: $((SECONDS - began)) s, status $code" | tee -a "$out/stages.txt"
done
exit $status
