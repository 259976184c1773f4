// Copies on a stream of their own, beside the computation: all of a gather in one call of the host.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <vector>

namespace alto::cuda {

// What is copied to a part of a target. Where others read from the same GPU, all of them name the same int32 by `busy`:
// one while somebody reads, zero else. Two that come at once may both go: slower, and no error.
struct Copy {
    const void* from;
    int part;
    void* busy;  // null where nobody else reads
};

// A stream of the current device, and targets: memory in parts that copies go to, by one gather at a time.
class CopyLane {
  public:
    CopyLane();
    ~CopyLane();
    CopyLane(const CopyLane&) = delete;
    CopyLane& operator=(const CopyLane&) = delete;

    // Returns the new target's number.
    int add_target(std::vector<void*> parts);

    // Launches copies of `bytes` each, one after another, which begin when all that `stream` has been given is done.
    cudaError_t gather(int target, const std::vector<Copy>& copies, std::size_t bytes, cudaStream_t stream);

    // Has what `stream` is given from here on wait for the target's last gather.
    cudaError_t wait(int target, cudaStream_t stream) const;

  private:
    struct Target {
        std::vector<void*> parts;
        cudaEvent_t end;  // of the last gather
    };

    // Launches one copy, in turn with those of others.
    cudaError_t launch(const Copy& copy, void* to, std::size_t bytes);

    cudaStream_t stream_ = nullptr;
    std::vector<Target> targets_;
    cudaEvent_t begin_ = nullptr;
    bool takes_turns_ = true;  // until the driver says that it cannot
};

}  // namespace alto::cuda
