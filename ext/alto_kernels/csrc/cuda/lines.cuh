// 16 bytes at once, and fp32 between: how elementwise kernels read and write 16-bit tensors.
#pragma once

#include <cstdint>

namespace alto::cuda {

constexpr int kLine = 8;  // elements that a thread reads or writes at once

template <typename Element>
struct alignas(16) Line {
    Element elements[kLine];
};

template <typename Element>
__device__ __forceinline__ void load(float (&values)[kLine], const void* from, std::int64_t at) {
    const auto line = *reinterpret_cast<const Line<Element>*>(static_cast<const Element*>(from) + at);
#pragma unroll
    for (int i = 0; i < kLine; ++i) values[i] = static_cast<float>(line.elements[i]);
}

template <typename Element>
__device__ __forceinline__ void store(void* to, std::int64_t at, const float (&values)[kLine]) {
    Line<Element> line;
#pragma unroll
    for (int i = 0; i < kLine; ++i) line.elements[i] = static_cast<Element>(values[i]);
    *reinterpret_cast<Line<Element>*>(static_cast<Element*>(to) + at) = line;
}

}  // namespace alto::cuda
