// The upper half of an fp32 number, as gradients may be stored.
#pragma once

#include <cstdint>
#include <cstring>

namespace alto::cpu {

struct Bfloat16 {
    std::uint16_t bits;
};

inline float widened(float value) { return value; }
inline float widened(Bfloat16 value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
}

// To the nearest, of two equally near ones the even, as torch rounds. A NaN stays one: it would else round to infinity.
inline void round_to(float value, float& to) { to = value; }
inline void round_to(float value, Bfloat16& to) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    to.bits = value != value ? 0x7FC0u : static_cast<std::uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace alto::cpu
