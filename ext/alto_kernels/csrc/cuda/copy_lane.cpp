#include "copy_lane.hpp"

#include <pybind11/stl.h>

#include <tuple>
#include <utility>

#include "bindings.hpp"
#include "driver.hpp"

namespace py = pybind11;

namespace alto::cuda {
namespace {

cudaEvent_t make_event() {
    cudaEvent_t event;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "CopyLane");
    return event;
}

using WordOperation = CUresult (*)(CUstream, CUdeviceptr, cuuint32_t, unsigned int);

cudaError_t wait_for_zero(void* word, cudaStream_t stream) {
    static const auto wait = driver_function<WordOperation>("cuStreamWaitValue32");
    if (!wait) return cudaErrorNotSupported;
    return as_runtime(wait(stream, reinterpret_cast<CUdeviceptr>(word), 0, CU_STREAM_WAIT_VALUE_EQ));
}

cudaError_t write(void* word, cuuint32_t value, cudaStream_t stream) {
    static const auto write = driver_function<WordOperation>("cuStreamWriteValue32");
    if (!write) return cudaErrorNotSupported;
    return as_runtime(write(stream, reinterpret_cast<CUdeviceptr>(word), value, CU_STREAM_WRITE_VALUE_DEFAULT));
}

}  // namespace

CopyLane::CopyLane() : begin_(make_event()) {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "CopyLane");
}

// What was launched still runs to its end; errors have nobody to go to.
CopyLane::~CopyLane() {
    for (const Target& target : targets_) cudaEventDestroy(target.end);
    cudaStreamDestroy(stream_);
    cudaEventDestroy(begin_);
}

int CopyLane::add_target(std::vector<void*> parts) {
    targets_.push_back({std::move(parts), make_event()});
    return static_cast<int>(targets_.size()) - 1;
}

cudaError_t CopyLane::gather(int number, const std::vector<Copy>& copies, std::size_t bytes, cudaStream_t stream) {
    const Target& target = targets_.at(number);
    cudaError_t status = cudaEventRecord(begin_, stream);
    if (status == cudaSuccess) status = cudaStreamWaitEvent(stream_, begin_);
    for (const Copy& copy : copies)
        if (status == cudaSuccess) status = launch(copy, target.parts.at(copy.part), bytes);
    return status == cudaSuccess ? cudaEventRecord(target.end, stream_) : status;
}

cudaError_t CopyLane::launch(const Copy& copy, void* to, std::size_t bytes) {
    bool in_turn = takes_turns_ && copy.busy != nullptr;
    if (in_turn) {
        const cudaError_t waited = wait_for_zero(copy.busy, stream_);
        if (waited == cudaErrorNotSupported)
            in_turn = takes_turns_ = false;  // slower, and no less right
        else if (waited != cudaSuccess)
            return waited;
    }
    if (in_turn)
        if (const cudaError_t begun = write(copy.busy, 1, stream_); begun != cudaSuccess) return begun;
    const cudaError_t copied = cudaMemcpyAsync(to, copy.from, bytes, cudaMemcpyDefault, stream_);
    // After a failure too: others wait for it.
    const cudaError_t ended = in_turn ? write(copy.busy, 0, stream_) : cudaSuccess;
    return copied != cudaSuccess ? copied : ended;
}

cudaError_t CopyLane::wait(int number, cudaStream_t stream) const {
    return cudaStreamWaitEvent(stream, targets_.at(number).end);
}

void bind_copy_lane(py::module_& module) {
    using CopyFields = std::tuple<Address, int, Address>;  // (from, part, busy)
    py::class_<CopyLane>(module, "CopyLane")
        .def(py::init<>())
        .def("add_target",
             [](CopyLane& self, const std::vector<Address>& parts) {
                 std::vector<void*> pointers;
                 for (const Address part : parts) pointers.push_back(pointer<void>(part));
                 return self.add_target(std::move(pointers));
             })
        .def("gather",
             [](CopyLane& self, int target, const std::vector<CopyFields>& fields, std::size_t bytes, Address stream) {
                 std::vector<Copy> copies;
                 for (const auto& [from, part, busy] : fields)
                     copies.push_back({pointer<void>(from), part, pointer<void>(busy)});
                 check(self.gather(target, copies, bytes, pointer<CUstream_st>(stream)), "gather");
             })
        .def("wait", [](const CopyLane& self, int target, Address stream) {
            check(self.wait(target, pointer<CUstream_st>(stream)), "wait");
        });
}

}  // namespace alto::cuda
