#include "copy_lanes.hpp"

#include <cuda.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "bindings.hpp"

namespace py = pybind11;

namespace alto::cuda {
namespace {

cudaEvent_t make_event() {
    cudaEvent_t event;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "CopyLanes");
    return event;
}

using WordOperation = CUresult (*)(CUstream, CUdeviceptr, cuuint32_t, unsigned int);

// Asked of the runtime, so that the module links and imports where there is no driver. Null where it has none.
WordOperation word_operation(const char* name) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t status = cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &result);
    const bool found = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return found ? reinterpret_cast<WordOperation>(entry) : nullptr;
}

// The driver's errors have the runtime's numbers.
cudaError_t wait_for_zero(void* word, cudaStream_t lane) {
    static const WordOperation wait = word_operation("cuStreamWaitValue32");
    if (!wait) return cudaErrorNotSupported;
    return static_cast<cudaError_t>(wait(lane, reinterpret_cast<CUdeviceptr>(word), 0, CU_STREAM_WAIT_VALUE_EQ));
}

cudaError_t write(void* word, cuuint32_t value, cudaStream_t lane) {
    static const WordOperation write = word_operation("cuStreamWriteValue32");
    if (!write) return cudaErrorNotSupported;
    return static_cast<cudaError_t>(
        write(lane, reinterpret_cast<CUdeviceptr>(word), value, CU_STREAM_WRITE_VALUE_DEFAULT));
}

}  // namespace

CopyLanes::CopyLanes(int lanes) {
    if (lanes < 1) throw std::invalid_argument("lanes: must be at least 1");
    begin_ = make_event();
    for (int lane = 0; lane < lanes; ++lane) {
        cudaStream_t stream;
        check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "CopyLanes");
        lanes_.push_back(stream);
    }
}

// What was launched still runs to its end; errors have nobody to go to.
CopyLanes::~CopyLanes() {
    for (const Target& target : targets_)
        for (const cudaEvent_t end : target.ends) cudaEventDestroy(end);
    for (const cudaStream_t lane : lanes_) cudaStreamDestroy(lane);
    cudaEventDestroy(begin_);
}

int CopyLanes::add_target(std::vector<void*> parts) {
    Target target{std::move(parts), {}};
    for (std::size_t lane = 0; lane < lanes_.size(); ++lane) target.ends.push_back(make_event());
    targets_.push_back(std::move(target));
    return static_cast<int>(targets_.size()) - 1;
}

cudaError_t CopyLanes::gather(int number, const std::vector<Copy>& copies, std::size_t bytes, cudaStream_t stream) {
    const Target& target = targets_.at(number);
    cudaError_t status = cudaEventRecord(begin_, stream);
    for (const cudaStream_t lane : lanes_)
        if (status == cudaSuccess) status = cudaStreamWaitEvent(lane, begin_);
    for (const Copy& copy : copies)
        if (status == cudaSuccess) status = launch(copy, target.parts.at(copy.part), bytes);
    for (std::size_t lane = 0; lane < lanes_.size(); ++lane)
        if (status == cudaSuccess) status = cudaEventRecord(target.ends[lane], lanes_[lane]);
    return status;
}

cudaError_t CopyLanes::launch(const Copy& copy, void* to, std::size_t bytes) {
    const cudaStream_t lane = lanes_.at(copy.lane);
    bool in_turn = takes_turns_ && copy.busy != nullptr;
    if (in_turn) {
        const cudaError_t waited = wait_for_zero(copy.busy, lane);
        if (waited == cudaErrorNotSupported)
            in_turn = takes_turns_ = false;  // slower, and no less right
        else if (waited != cudaSuccess)
            return waited;
    }
    if (in_turn)
        if (const cudaError_t begun = write(copy.busy, 1, lane); begun != cudaSuccess) return begun;
    const cudaError_t copied = cudaMemcpyAsync(to, copy.from, bytes, cudaMemcpyDefault, lane);
    // After a failure too: others wait for it.
    const cudaError_t ended = in_turn ? write(copy.busy, 0, lane) : cudaSuccess;
    return copied != cudaSuccess ? copied : ended;
}

cudaError_t CopyLanes::wait(int number, cudaStream_t stream) const {
    cudaError_t status = cudaSuccess;
    for (const cudaEvent_t end : targets_.at(number).ends)
        if (status == cudaSuccess) status = cudaStreamWaitEvent(stream, end);
    return status;
}

void bind_copy_lanes(py::module_& module) {
    using CopyFields = std::tuple<Address, int, int, Address>;  // (from, part, lane, busy)
    py::class_<CopyLanes>(module, "CopyLanes")
        .def(py::init<int>())
        .def("add_target",
             [](CopyLanes& self, const std::vector<Address>& parts) {
                 std::vector<void*> pointers;
                 for (const Address part : parts) pointers.push_back(pointer<void>(part));
                 return self.add_target(std::move(pointers));
             })
        .def("gather",
             [](CopyLanes& self, int target, const std::vector<CopyFields>& fields, std::size_t bytes, Address stream) {
                 std::vector<Copy> copies;
                 for (const auto& [from, part, lane, busy] : fields)
                     copies.push_back({pointer<void>(from), part, lane, pointer<void>(busy)});
                 check(self.gather(target, copies, bytes, pointer<CUstream_st>(stream)), "gather");
             })
        .def("wait", [](const CopyLanes& self, int target, Address stream) {
            check(self.wait(target, pointer<CUstream_st>(stream)), "wait");
        });
}

}  // namespace alto::cuda
