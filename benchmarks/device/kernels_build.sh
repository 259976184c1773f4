#!/usr/bin/env bash
# Build alto_kernels with its CUDA part into ./build/device and put the module beside its package; for a machine with
# nvcc, PyTorch, pybind11, CMake and ninja. $1: the CUTLASS headers. ALTO_CUDA_ARCHITECTURES narrows what it is for.
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
work="$root/build/device"
mkdir -p "$work/source"
cat > "$work/source/CMakeLists.txt" <<CMAKE
cmake_minimum_required(VERSION 3.25)
project(alto_kernels_only LANGUAGES CXX)
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
find_package(Python 3.11 REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG REQUIRED)
add_subdirectory("$root/ext/alto_kernels" alto_kernels)
CMAKE
python3="$(command -v python3)"
cmake -G Ninja -S "$work/source" -B "$work/out" -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$python3" \
  -Dpybind11_DIR="$("$python3" -m pybind11 --cmakedir)" -DALTO_CUDA=ON -DALTO_CUTLASS_INCLUDE="$1" \
  ${ALTO_CUDA_ARCHITECTURES:+"-DALTO_CUDA_ARCHITECTURES=$ALTO_CUDA_ARCHITECTURES"} > "$work/cmake.log" 2>&1 \
  || { cat "$work/cmake.log"; exit 1; }
cmake --build "$work/out" > "$work/build.log" 2>&1 || { grep -E "error|FAILED" -A3 "$work/build.log"; exit 1; }
cp "$work"/out/alto_kernels/_kernels*.so "$root/ext/alto_kernels/"
