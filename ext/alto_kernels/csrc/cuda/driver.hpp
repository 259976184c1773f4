// Functions of the CUDA driver, asked of the runtime, so that the module links and imports where there is no driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

namespace alto::cuda {

// Null where the driver has no such function.
template <typename Function>
Function driver_function(const char* name) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t status = cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &result);
    const bool found = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return found ? reinterpret_cast<Function>(entry) : nullptr;
}

// The driver's errors have the runtime's numbers.
inline cudaError_t as_runtime(CUresult status) { return static_cast<cudaError_t>(status); }

}  // namespace alto::cuda
