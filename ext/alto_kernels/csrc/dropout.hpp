// The dropout stream of an adapter, the same bits on every device.
//
// A token's 32-bit row key carries the trial's seed, its sequence and its position; two rounds of the murmur3 finaliser
// mix in the module and the feature. Nothing depends on where a token lies in the packed batch, so a trial's mask is
// the same alone or among others, in forward and in backward. `reference.keep_mask` says the same in torch.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ALTO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ALTO_HOST_DEVICE inline
#endif

namespace alto {

ALTO_HOST_DEVICE std::uint32_t dropout_row(std::uint32_t row_key, std::uint32_t module) {
    const std::uint32_t row = (row_key ^ module) * 0x85EBCA6Bu;
    return row ^ (row >> 15);
}

// True where `feature` is kept; `row` comes from dropout_row, `threshold` from dropout_threshold.
ALTO_HOST_DEVICE bool dropout_keeps(std::uint32_t row, std::uint32_t feature, std::int32_t threshold) {
    std::uint32_t bits = (row ^ (feature * 0x9E3779B1u)) * 0x85EBCA6Bu;
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35u;
    bits ^= bits >> 16;
    return static_cast<std::int32_t>(bits) >= threshold;
}

// The lowest share `probability` of the signed 32-bit integers is dropped.
inline std::int32_t dropout_threshold(double probability) {
    return static_cast<std::int32_t>(static_cast<std::int64_t>(probability * 4294967296.0) - 2147483648LL);
}

}  // namespace alto
