# The CUDA part of alto_kernels._kernels. Architectures come from a variable, never from a GPU that is there: one build
# serves Ampere and Ada ("80") and Hopper ("90a"). The grouped kernels are compiled for all that are listed, the
# persistent kernel for 90a where that is listed.
set(ALTO_CUDA_ARCHITECTURES "80;90a" CACHE STRING "Architectures to compile the CUDA kernels for")
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

function(alto_cuda_settings target)
  set_target_properties(${target} PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON)
  target_include_directories(${target} SYSTEM PRIVATE "${ALTO_CUTLASS_INCLUDE}")
  # Without NDEBUG the compiler serialises wgmma (warning C7510).
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-O3 -DNDEBUG --expt-relaxed-constexpr>)
endfunction()

target_sources(alto_kernels_module PRIVATE
  csrc/cuda/adamw.cu
  csrc/cuda/bindings.cpp
  csrc/cuda/copy_lane.cpp
  csrc/cuda/decoder_layer.cpp
  csrc/cuda/decoder_layer_bindings.cpp
  csrc/cuda/elementwise.cu
  csrc/cuda/elementwise_bindings.cpp
  csrc/cuda/grouped_bindings.cpp
  csrc/cuda/grouped_down_bfloat16.cu
  csrc/cuda/grouped_down_float16.cu
  csrc/cuda/grouped_gradients_bfloat16.cu
  csrc/cuda/grouped_gradients_float16.cu
  csrc/cuda/grouped_up_bfloat16.cu
  csrc/cuda/grouped_up_float16.cu
  csrc/cuda/launch.cpp
  csrc/cuda/mapped_memory.cpp
  csrc/cuda/mapped_memory_bindings.cpp
  csrc/cuda/norm.cu
  csrc/cuda/pools.cu
  csrc/cuda/schedule.cpp
  csrc/cuda/tensor_map.cpp
  csrc/cuda/tick_layout.cpp
  csrc/cuda/token_nll.cu
)
alto_cuda_settings(alto_kernels_module)
set_target_properties(alto_kernels_module PROPERTIES CUDA_ARCHITECTURES "${ALTO_CUDA_ARCHITECTURES}")
target_compile_definitions(alto_kernels_module PRIVATE
  ALTO_CUDA ALTO_CUDA_ARCHITECTURES="$<JOIN:${ALTO_CUDA_ARCHITECTURES},$<COMMA>>")
target_link_libraries(alto_kernels_module PRIVATE CUDA::cudart_static)

if(ALTO_CUDA_ARCHITECTURES MATCHES "90a")
  add_library(alto_kernels_hopper OBJECT
    csrc/cuda/lora_gemm_backward_bfloat16.cu
    csrc/cuda/lora_gemm_backward_float16.cu
    csrc/cuda/lora_gemm_forward_bfloat16.cu
    csrc/cuda/lora_gemm_forward_float16.cu
  )
  alto_cuda_settings(alto_kernels_hopper)
  set_target_properties(alto_kernels_hopper PROPERTIES CUDA_ARCHITECTURES "90a")
  target_link_libraries(alto_kernels_module PRIVATE alto_kernels_hopper)
else()
  target_sources(alto_kernels_module PRIVATE csrc/cuda/lora_gemm_missing.cpp)
endif()
