// Memory of GPUs apart from the addresses that it is used by: mapped in several places, and by several processes.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <memory>
#include <vector>

namespace alto::cuda {

// What sizes of memory of the current device must be multiples of, in bytes.
std::size_t memory_granularity();

// Memory of a GPU, freed when nobody maps it any more, in whatever process. Errors are thrown; std::bad_alloc where
// memory runs out.
class PhysicalMemory {
  public:
    // New memory of the current device.
    static std::shared_ptr<PhysicalMemory> create(std::size_t bytes);

    // That of another process of this host, `bytes` of it, by a file descriptor of its `share`, which stays open.
    static std::shared_ptr<PhysicalMemory> import(int descriptor, std::size_t bytes);

    PhysicalMemory(CUmemGenericAllocationHandle handle, std::size_t bytes) : handle_(handle), bytes_(bytes) {}
    ~PhysicalMemory();
    PhysicalMemory(const PhysicalMemory&) = delete;
    PhysicalMemory& operator=(const PhysicalMemory&) = delete;

    // Returns a new file descriptor, which another process can have.
    int share() const;

    CUmemGenericAllocationHandle handle() const { return handle_; }
    std::size_t bytes() const { return bytes_; }

  private:
    CUmemGenericAllocationHandle handle_;
    std::size_t bytes_;
};

// Parts side by side in one range of addresses, which the current device reads and writes. The same memory may be in
// several mappings, used one after the other in the order of a stream.
class Mapping {
  public:
    explicit Mapping(std::vector<std::shared_ptr<PhysicalMemory>> parts);
    ~Mapping();  // waits for the device
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    CUdeviceptr address() const { return address_; }
    std::size_t bytes() const { return bytes_; }
    int device() const { return device_; }

  private:
    void map();
    void unmap() noexcept;

    std::vector<std::shared_ptr<PhysicalMemory>> parts_;
    std::size_t bytes_ = 0;
    std::size_t mapped_bytes_ = 0;
    CUdeviceptr address_ = 0;
    int device_ = 0;
};

}  // namespace alto::cuda
