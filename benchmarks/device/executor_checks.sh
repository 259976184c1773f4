#!/usr/bin/env bash
# On a machine with a GPU and PyTorch, transformers, peft and pytest, but not the rest of ALTO: build the kernels, test
# them and the executor that uses them, and measure both. About four minutes. $1: the CUTLASS headers. $2: a folder of
# wheels that the machine lacks (structlog and what it needs). $3: a folder for the results.
set -uo pipefail
cd "$(dirname "$0")/../.."
headers="$1" wheels="$2" results="$3"
export PYTHONPATH="build/device/site:ext:services:clients/python:benchmarks:tests/training/executor" PYTHONUNBUFFERED=1
test_options=(-c /dev/null --rootdir=. --import-mode=importlib -q --maxfail=6 -p no:cacheprovider)
benchmarks/device/wheels.sh "$wheels" || exit 1
time benchmarks/device/kernels_build.sh "$headers" || exit 1
time python3 -m pytest "${test_options[@]}" --noconftest tests/kernels/test_cutlass.py \
  tests/kernels/test_elementwise.py tests/kernels/test_norm.py tests/kernels/test_token_nll.py \
  tests/kernels/test_copies.py tests/kernels/test_mapped_memory.py
time python3 -m pytest "${test_options[@]}" --confcutdir=tests/training/executor tests/training/executor/test_cuda.py \
  tests/training/executor/test_fused_layer.py
time python3 benchmarks/executor_gpu.py --output "$results/executor-h100.json"
time python3 benchmarks/tick_profile.py --device cuda --shape 8b --cell 4x2x256 --output "$results/tick_profile-h100.json"
time python3 benchmarks/parity.py --device cuda --dtype bfloat16 --trials 8 --output "$results/parity-h100.json"
