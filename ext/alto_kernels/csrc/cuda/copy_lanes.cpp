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

// Asked of the runtime, so that the module links and imports where there is no driver.
WordOperation word_operation(const char* name) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t status = cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &result);
    if (status != cudaSuccess || result != cudaDriverEntryPointSuccess)
        throw std::runtime_error(std::string("the CUDA driver has no ") + name);
    return reinterpret_cast<WordOperation>(entry);
}

// The driver's errors have the runtime's numbers.
cudaError_t wait_for_zero(void* word, cudaStream_t lane) {
    static const WordOperation wait = word_operation("cuStreamWaitValue32");
    return static_cast<cudaError_t>(wait(lane, reinterpret_cast<CUdeviceptr>(word), 0, CU_STREAM_WAIT_VALUE_EQ));
}

cudaError_t write(void* word, cuuint32_t value, cudaStream_t lane) {
    static const WordOperation write = word_operation("cuStreamWriteValue32");
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
    for (const Copy& copy : copies) {
        const cudaStream_t lane = lanes_.at(copy.lane);
        void* const part = target.parts.at(copy.part);
        void* const turn = takes_turns_ ? copy.turn : nullptr;
        if (status == cudaSuccess && turn) status = wait_for_zero(turn, lane);
        if (turn && status == cudaErrorNotSupported) {
            // Some drivers have none of it for some devices. Copies without turns are slower and no less right.
            takes_turns_ = false;
            return gather(number, copies, bytes, stream);
        }
        if (status == cudaSuccess && turn) status = write(turn, 1, lane);
        if (status == cudaSuccess) status = cudaMemcpyAsync(part, copy.from, bytes, cudaMemcpyDefault, lane);
        if (status == cudaSuccess && turn) status = write(turn, 0, lane);
    }
    for (std::size_t lane = 0; lane < lanes_.size(); ++lane)
        if (status == cudaSuccess) status = cudaEventRecord(target.ends[lane], lanes_[lane]);
    return status;
}

cudaError_t CopyLanes::wait(int number, cudaStream_t stream) const {
    cudaError_t status = cudaSuccess;
    for (const cudaEvent_t end : targets_.at(number).ends)
        if (status == cudaSuccess) status = cudaStreamWaitEvent(stream, end);
    return status;
}

void bind_copy_lanes(py::module_& module) {
    using CopyFields = std::tuple<Address, int, int, Address>;  // (from, part, lane, turn)
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
                 for (const auto& [from, part, lane, turn] : fields)
                     copies.push_back({pointer<void>(from), part, lane, pointer<void>(turn)});
                 check(self.gather(target, copies, bytes, pointer<CUstream_st>(stream)), "gather");
             })
        .def("wait", [](const CopyLanes& self, int target, Address stream) {
            check(self.wait(target, pointer<CUstream_st>(stream)), "wait");
        });
}

}  // namespace alto::cuda
