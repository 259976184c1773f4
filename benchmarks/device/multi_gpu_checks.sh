#!/usr/bin/env bash
# On a machine with two GPUs or four (GPUS=4), nvcc, PyTorch, transformers, peft and pytest, but not the rest of ALTO:
# build the kernels, profile the host in ticks of one GPU, compare every strategy with one GPU, and measure their speeds.
# Takes 7 minutes at most and keeps what it has at any time. $1: the CUTLASS headers. $2: a folder of wheels that the
# machine lacks (structlog, deepspeed and what they need). $3: a folder for the results.
# LIMIT_S, SHAPE and DEVICE=cpu (a dry run: no build) are for other machines.
set -uo pipefail
cd "$(dirname "$0")/../.."
headers="$1" wheels="$2" results="$3"
limit_s="${LIMIT_S:-420}" gpus="${GPUS:-2}" device="${DEVICE:-cuda}" shape="${SHAPE:-8b}"
mkdir -p "$results" build/device
export PYTHONPATH="build/device/site:ext:services:clients/python:benchmarks" PYTHONUNBUFFERED=1

benchmarks/device/wheels.sh "$wheels" || exit 1
if [ "$device" = cuda ]; then
  ALTO_CUDA_ARCHITECTURES=90a benchmarks/device/kernels_build.sh "$headers" || exit 1
fi
echo "built: ${SECONDS} s"

timeout 90 python3 benchmarks/tick_profile.py --device "$device" --shape "$shape" --cell 4x2x256 \
  --text "$results/tick-profile.txt" --output "$results/tick-profile.json"
echo "profiled: ${SECONDS} s"

# What matters most comes first; 32 trials beside a whole backbone come last, for they may not fit.
cells=8x1x256,8x2x256,8x4x256,8x8x256,8x2x1024
stages="parity,whole,sharded:peer@${cells//,/+}+32x2x256,fsdp_peft@8x1x256+8x2x256,sharded:deepspeed@8x2x256"
# The last two keep a part of the layers whole: in bf16, in fp32.
parity=replicated,sharded:deepspeed,sharded:fsdp2,sharded:peer,sharded:peer+0.15,sharded:peer+0.3
options=()
left_s="$((limit_s - SECONDS - 15))"
if [ "$gpus" -ge 4 ]; then
  # Two "hosts" of one: shared out within each, whole on both.
  options=(--ranks-per-host "$((gpus / 2))")
  parity="$parity,hybrid:peer"
  # peer+13: room for 13 GiB of weights, 24 of an 8B model's 32 layers whole. What small ticks gain by fewer gathers.
  stages="$stages,sharded:peer+13@8x1x256+8x2x256+8x4x256,hybrid:peer@8x1x256+8x2x256+8x8x256"
  left_s="$((left_s - 90))"
fi
python3 benchmarks/multi_gpu.py --device "$device" --gpus "$gpus" --shape "$shape" --cells "$cells" \
  --stages "$stages,whole@32x2x256" --parity "$parity" "${options[@]}" \
  --single-trials 16 --singles shares --silence-s 90 --budget-s "$left_s" --output "$results/multi-gpu.json"
status=$?
echo "measured: ${SECONDS} s"
if [ "$gpus" -ge 4 ] && [ "$device" = cuda ]; then
  python3 benchmarks/multi_gpu.py --gpus "$gpus" --shape 32b --stages sharded:peer+44@8x1x256+8x2x256,sharded:peer@8x1x256+8x2x256,fsdp_peft@8x1x256+8x2x256 \
    --silence-s 60 --budget-s "$((limit_s - SECONDS - 10))" --output "$results/multi-gpu-32b.json" || status=$?
  echo "measured 32b: ${SECONDS} s"
fi
exit $status
