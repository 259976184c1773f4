#include "mapped_memory.hpp"

#include <cuda_runtime.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <utility>

#include "address.hpp"
#include "driver.hpp"

namespace alto::cuda {
namespace {

template <typename Function, typename... Arguments>
CUresult call(Function function, Arguments... arguments) {
    return function ? function(arguments...) : CUDA_ERROR_NOT_SUPPORTED;
}

void require(CUresult status, const char* what) {
    if (status == CUDA_ERROR_OUT_OF_MEMORY) throw std::bad_alloc();
    check(as_runtime(status), what);
}

int current_device() {
    int device = 0;
    check(cudaGetDevice(&device), "current device");
    return device;
}

CUmemAllocationProp properties(int device) {
    CUmemAllocationProp wanted{};
    wanted.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    wanted.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    wanted.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device}};
    return wanted;
}

}  // namespace

std::size_t memory_granularity() {
    static const auto ask = driver_function<decltype(&cuMemGetAllocationGranularity)>("cuMemGetAllocationGranularity");
    const CUmemAllocationProp wanted = properties(current_device());
    std::size_t found = 0;
    require(call(ask, &found, &wanted, CU_MEM_ALLOC_GRANULARITY_MINIMUM), "memory_granularity");
    return found;
}

std::shared_ptr<PhysicalMemory> PhysicalMemory::create(std::size_t bytes) {
    static const auto create = driver_function<decltype(&cuMemCreate)>("cuMemCreate");
    if (bytes == 0 || bytes % memory_granularity() != 0)
        throw std::invalid_argument("bytes: must be a multiple of memory_granularity()");
    const CUmemAllocationProp wanted = properties(current_device());
    CUmemGenericAllocationHandle handle{};
    require(call(create, &handle, bytes, &wanted, 0ull), "PhysicalMemory");
    return std::make_shared<PhysicalMemory>(handle, bytes);
}

std::shared_ptr<PhysicalMemory> PhysicalMemory::import(int descriptor, std::size_t bytes) {
    static const auto import =
        driver_function<decltype(&cuMemImportFromShareableHandle)>("cuMemImportFromShareableHandle");
    CUmemGenericAllocationHandle handle{};
    void* named = reinterpret_cast<void*>(static_cast<std::intptr_t>(descriptor));  // NOLINT: the driver's contract
    require(call(import, &handle, named, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR), "PhysicalMemory.import");
    return std::make_shared<PhysicalMemory>(handle, bytes);
}

// At the end of a process the driver may be gone already; errors have nobody to go to.
PhysicalMemory::~PhysicalMemory() {
    static const auto release = driver_function<decltype(&cuMemRelease)>("cuMemRelease");
    call(release, handle_);
}

int PhysicalMemory::share() const {
    static const auto share = driver_function<decltype(&cuMemExportToShareableHandle)>("cuMemExportToShareableHandle");
    int descriptor = -1;
    require(call(share, static_cast<void*>(&descriptor), handle_, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0ull),
            "PhysicalMemory.share");
    return descriptor;
}

Mapping::Mapping(std::vector<std::shared_ptr<PhysicalMemory>> parts)
    : parts_(std::move(parts)), device_(current_device()) {
    for (const auto& part : parts_) bytes_ += part->bytes();
    if (bytes_ == 0) throw std::invalid_argument("parts: must not be empty");
    try {
        map();
    } catch (...) {
        unmap();
        throw;
    }
}

Mapping::~Mapping() {
    int current = device_;
    cudaGetDevice(&current);
    cudaSetDevice(device_);
    cudaDeviceSynchronize();  // what is launched may still use it
    cudaSetDevice(current);
    unmap();
}

void Mapping::map() {
    static const auto reserve = driver_function<decltype(&cuMemAddressReserve)>("cuMemAddressReserve");
    static const auto map_part = driver_function<decltype(&cuMemMap)>("cuMemMap");
    static const auto set_access = driver_function<decltype(&cuMemSetAccess)>("cuMemSetAccess");
    require(call(reserve, &address_, bytes_, std::size_t{0}, CUdeviceptr{0}, 0ull), "Mapping: reserve");
    for (const auto& part : parts_) {
        require(call(map_part, address_ + mapped_bytes_, part->bytes(), std::size_t{0}, part->handle(), 0ull),
                "Mapping: map");
        mapped_bytes_ += part->bytes();
    }
    CUmemAccessDesc access{};
    access.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device_}};
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    require(call(set_access, address_, bytes_, &access, std::size_t{1}), "Mapping: set access");
}

void Mapping::unmap() noexcept {
    static const auto unmap_range = driver_function<decltype(&cuMemUnmap)>("cuMemUnmap");
    static const auto free_range = driver_function<decltype(&cuMemAddressFree)>("cuMemAddressFree");
    if (mapped_bytes_ != 0) call(unmap_range, address_, mapped_bytes_);
    if (address_ != 0) call(free_range, address_, bytes_);
}

}  // namespace alto::cuda
