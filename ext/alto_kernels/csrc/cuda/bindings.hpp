// What the CUDA build adds to the Python module.
#pragma once

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace alto::cuda {

using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);  // NOLINT: the contract of this module
}

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

void bind(pybind11::module_& module);
// Called by bind.
void bind_copy_lanes(pybind11::module_& module);
void bind_elementwise(pybind11::module_& module);
void bind_grouped(pybind11::module_& module);

}  // namespace alto::cuda
