# The CUDA part of alto_kernels._kernels. The architecture comes from a variable, never from a GPU that is there.
set(ALTO_CUDA_ARCHITECTURES "90a" CACHE STRING "Architectures to compile the CUDA kernels for")
set(ALTO_CUTLASS_INCLUDE "" CACHE PATH "CUTLASS headers; empty: those of the Python package nvidia-cutlass")

set(CMAKE_CUDA_ARCHITECTURES "${ALTO_CUDA_ARCHITECTURES}")
enable_language(CUDA)
find_package(CUDAToolkit 12.8 REQUIRED)

if(NOT ALTO_CUTLASS_INCLUDE)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
      "import importlib.util as u, pathlib as p; print(p.Path(u.find_spec('cutlass_library').origin).parent / 'source/include')"
    OUTPUT_VARIABLE ALTO_CUTLASS_INCLUDE OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE status)
  if(status)
    message(FATAL_ERROR "CUTLASS headers not found: pip install --no-deps nvidia-cutlass==4.2.0.0, or set ALTO_CUTLASS_INCLUDE")
  endif()
endif()

target_sources(alto_kernels_module PRIVATE
  csrc/cuda/adamw.cu
  csrc/cuda/bindings.cpp
  csrc/cuda/lora_gemm_backward.cu
  csrc/cuda/lora_gemm_forward.cu
  csrc/cuda/pools.cu
  csrc/cuda/schedule.cpp
  csrc/cuda/tensor_map.cpp
)
set_target_properties(alto_kernels_module PROPERTIES
  CUDA_ARCHITECTURES "${ALTO_CUDA_ARCHITECTURES}" CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON)
target_include_directories(alto_kernels_module SYSTEM PRIVATE "${ALTO_CUTLASS_INCLUDE}")
target_compile_definitions(alto_kernels_module PRIVATE ALTO_CUDA)
# Without NDEBUG the compiler serialises wgmma (warning C7510).
target_compile_options(alto_kernels_module PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:-O3 -DNDEBUG --expt-relaxed-constexpr>)
target_link_libraries(alto_kernels_module PRIVATE CUDA::cudart_static)
