#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "bindings.hpp"
#include "mapped_memory.hpp"

namespace py = pybind11;

namespace alto::cuda {
namespace {

// What a flat tensor of bytes needs of DLPack (dmlc.github.io/dlpack), which frameworks take tensors by. Of the ways to
// give torch memory it is the one that says which device uses it, whichever it lies on.
constexpr std::int32_t kDLCuda = 2;
constexpr std::uint8_t kDLUnsigned = 1;

struct DLTensor {
    void* data;
    struct {
        std::int32_t type, number;
    } device;
    std::int32_t dimensions;
    struct {
        std::uint8_t code, bits;
        std::uint16_t lanes;
    } dtype;
    std::int64_t* shape;
    std::int64_t* strides;
    std::uint64_t byte_offset;
};

struct DLManagedTensor {
    DLTensor tensor;
    void* context;
    void (*deleter)(DLManagedTensor*);
};

// Keeps the mapping as long as a tensor is over it.
struct MappedTensor {
    std::shared_ptr<Mapping> mapping;
    std::int64_t bytes;
    DLManagedTensor managed;
};

py::capsule as_dlpack(std::shared_ptr<Mapping> mapping) {
    auto* owner = new MappedTensor{std::move(mapping), 0, {}};
    owner->bytes = static_cast<std::int64_t>(owner->mapping->bytes());
    owner->managed.tensor = {reinterpret_cast<void*>(owner->mapping->address()),  // NOLINT: an address of the device
                             {kDLCuda, owner->mapping->device()},
                             1,
                             {kDLUnsigned, 8, 1},
                             &owner->bytes,
                             nullptr,
                             0};
    owner->managed.context = owner;
    owner->managed.deleter = [](DLManagedTensor* self) { delete static_cast<MappedTensor*>(self->context); };
    // Who takes the tensor renames the capsule, and calls the deleter later.
    return py::capsule(&owner->managed, "dltensor", [](PyObject* capsule) {
        if (!PyCapsule_IsValid(capsule, "dltensor")) return;
        auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
        managed->deleter(managed);
    });
}

}  // namespace

void bind_mapped_memory(py::module_& module) {
    module.def("memory_granularity", &memory_granularity);
    py::class_<PhysicalMemory, std::shared_ptr<PhysicalMemory>>(module, "PhysicalMemory")
        .def(py::init(&PhysicalMemory::create))
        .def_static("of_descriptor", &PhysicalMemory::import)
        .def("share", &PhysicalMemory::share);
    module.def("mapped", [](std::vector<std::shared_ptr<PhysicalMemory>> parts) {
        return as_dlpack(std::make_shared<Mapping>(std::move(parts)));
    });
}

}  // namespace alto::cuda
