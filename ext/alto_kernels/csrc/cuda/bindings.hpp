// What the CUDA build adds to the Python module.
#pragma once

#include <pybind11/pybind11.h>

#include "address.hpp"

namespace alto::cuda {

void bind(pybind11::module_& module);
// Called by bind.
void bind_copy_lane(pybind11::module_& module);
void bind_decoder_layer(pybind11::module_& module);
void bind_elementwise(pybind11::module_& module);
void bind_grouped(pybind11::module_& module);
void bind_mapped_memory(pybind11::module_& module);

}  // namespace alto::cuda
