#!/usr/bin/env bash
# Everything that the kernels must pass on a GPU before they are trusted: build, tests, compute-sanitizer on a small set,
# benchmark. $1: the CUTLASS headers; $2: a folder for the results. About seven minutes with 16 cores.
set -uo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
cd "$root"
export PYTHONUNBUFFERED=1 PYTHONPATH=ext
tests=(python3 -m pytest -c /dev/null --rootdir=. --noconftest --import-mode=importlib -q -p no:cacheprovider)
benchmarks/device/kernels_build.sh "$1" || exit 1
# A kernel that hangs holds its process in the driver, where no timeout of pytest's reaches it: this one does.
timeout -k 5 180 "${tests[@]}" -n 12 -v tests/kernels/test_cutlass.py tests/kernels/test_elementwise.py \
  tests/kernels/test_norm.py tests/kernels/test_token_nll.py tests/kernels/test_copies.py \
  tests/kernels/test_mapped_memory.py tests/kernels/test_schedule.py \
  > "$2/tests.log" 2>&1 || { tail -40 "$2/tests.log"; exit 1; }
tail -1 "$2/tests.log"
# racecheck takes ten times as long: it has one format. Our kernels alone: torch's run in these tests too.
for check in "memcheck hopper and (odd or unequal or neighbours) or (cuda and values)" \
  "racecheck hopper-bf16 and not bf16-gradients and (sizes or addresses or share_their_work and both) or (cuda and values)"; do
  tool="${check%% *}"
  timeout -k 5 180 compute-sanitizer --tool "$tool" --kernel-regex kns=_ZN4alto4cuda --error-exitcode 1 \
    "${tests[@]}" tests/kernels/test_cutlass.py tests/kernels/test_norm.py tests/kernels/test_token_nll.py \
    -k "${check#* }" > "$2/$tool.log" 2>&1 \
    || { tail -20 "$2/$tool.log"; exit 1; }
  tail -2 "$2/$tool.log"
done
python3 benchmarks/kernels.py --output "$2/kernels-h100.json"
