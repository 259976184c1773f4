// The tensor cores of Ampere as the grouped kernels use them: boxes of 64 x 64 in shared memory, four warps a block.
//
// A box holds 64 rows of 64 two-byte elements, eight of them (a piece) in each 16 bytes. Pieces are swizzled by row, so
// that neither cp.async nor ldmatrix meets a bank twice.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm80.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <limits>

#include "../dropout.hpp"
#include "grouped.hpp"

namespace alto::cuda {

constexpr int kGroupedThreads = 128;
constexpr int kPieces = kBoxColumns / 8;

struct alignas(128) Box {
    uint4 pieces[kBoxRows * kPieces];

    __device__ __forceinline__ uint4* piece(int row, int column_piece) {
        return pieces + row * kPieces + (column_piece ^ (row & 7));
    }
    // The two elements from an even `column` on.
    __device__ __forceinline__ std::uint32_t* pair(int row, int column) {
        return reinterpret_cast<std::uint32_t*>(piece(row, column / 8)) + column % 8 / 2;
    }
};

// Starts to copy rows [first_row, last_row) and columns [first_column, last_column) of a matrix; the rest of the box,
// beyond those ends, becomes zero and is not read. Columns come in multiples of 8.
template <typename Element>
__device__ __forceinline__ void load_box(Box& box, const Element* matrix, std::int64_t stride, int first_row,
                                         int last_row, int first_column, int last_column) {
#pragma unroll
    for (int i = 0; i < kBoxRows * kPieces / kGroupedThreads; ++i) {
        const int index = i * kGroupedThreads + static_cast<int>(threadIdx.x);
        const int row = index / kPieces;
        const int piece = index % kPieces;
        const bool real = first_row + row < last_row && first_column + piece * 8 < last_column;
        const Element* from = real ? matrix + (first_row + row) * stride + first_column + piece * 8 : matrix;
        cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint4>::copy(*reinterpret_cast<const uint4*>(from),
                                                           *box.piece(row, piece), real);
    }
}

template <bool kTransposed>
__device__ __forceinline__ void load_matrices(Box& box, int row, int piece, std::uint32_t (&to)[4]) {
    const cute::uint128_t& from = *reinterpret_cast<const cute::uint128_t*>(box.piece(row, piece));
    if constexpr (kTransposed) {
        cute::SM75_U16x8_LDSM_T::copy(from, to[0], to[1], to[2], to[3]);
    } else {
        cute::SM75_U32x4_LDSM_N::copy(from, to[0], to[1], to[2], to[3]);
    }
}

// The 16 x 16 of the left operand from row `m` and depth `k` on. The box has m as rows, or k where it is transposed.
template <bool kTransposed>
__device__ __forceinline__ void load_left(Box& box, int m, int k, std::uint32_t (&to)[4]) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if constexpr (kTransposed) {
        load_matrices<true>(box, k + lane % 8 + lane / 16 * 8, m / 8 + lane / 8 % 2, to);
    } else {
        load_matrices<false>(box, m + lane % 16, k / 8 + lane / 16, to);
    }
}

// The 16 x 16 of the right operand from column `n` and depth `k` on: words 0-1 are columns n to n + 7, words 2-3 the
// next eight. The box has n as rows, or k where it is transposed.
template <bool kTransposed>
__device__ __forceinline__ void load_right(Box& box, int n, int k, std::uint32_t (&to)[4]) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if constexpr (kTransposed) {
        load_matrices<true>(box, k + lane % 8 + lane / 8 % 2 * 8, n / 8 + lane / 16, to);
    } else {
        load_matrices<false>(box, n + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2, to);
    }
}

__device__ __forceinline__ void multiply_add(float (&sum)[4], const std::uint32_t (&left)[4], std::uint32_t right_0,
                                             std::uint32_t right_1, __nv_bfloat16) {
    cute::SM80_16x8x16_F32BF16BF16F32_TN::fma(sum[0], sum[1], sum[2], sum[3], left[0], left[1], left[2], left[3],
                                              right_0, right_1, sum[0], sum[1], sum[2], sum[3]);
}

__device__ __forceinline__ void multiply_add(float (&sum)[4], const std::uint32_t (&left)[4], std::uint32_t right_0,
                                             std::uint32_t right_1, __half) {
    cute::SM80_16x8x16_F32F16F16F32_TN::fma(sum[0], sum[1], sum[2], sum[3], left[0], left[1], left[2], left[3], right_0,
                                            right_1, sum[0], sum[1], sum[2], sum[3]);
}

// A warp's 16 x 64 of a product. Element i of block b is row accumulator_row() + i / 2 * 8 of the warp's 16 and column
// b * 8 + accumulator_column() + i % 2.
using Accumulator = float[8][4];

__device__ __forceinline__ int accumulator_row() { return static_cast<int>(threadIdx.x) % 32 / 4; }
__device__ __forceinline__ int accumulator_column() { return static_cast<int>(threadIdx.x) % 4 * 2; }
__device__ __forceinline__ int warp_row() { return static_cast<int>(threadIdx.x) / 32 * 16; }

// Adds the product of two boxes, `columns` and `depth` of them (both are rounded up to 16). `mask(words, k)` may clear
// elements of the left operand.
template <typename Element, bool kLeftTransposed, bool kRightTransposed, typename Mask>
__device__ __forceinline__ void multiply_boxes(Accumulator& sum, Box& left, Box& right, int columns, int depth,
                                               Mask mask) {
#pragma unroll
    for (int k = 0; k < kBoxColumns; k += 16) {
        if (k >= depth) break;
        std::uint32_t left_words[4];
        load_left<kLeftTransposed>(left, warp_row(), k, left_words);
        mask(left_words, k);
#pragma unroll
        for (int n = 0; n < kBoxColumns; n += 16) {
            if (n >= columns) break;
            std::uint32_t right_words[4];
            load_right<kRightTransposed>(right, n, k, right_words);
            multiply_add(sum[n / 8], left_words, right_words[0], right_words[1], Element{});
            multiply_add(sum[n / 8 + 1], left_words, right_words[2], right_words[3], Element{});
        }
    }
}

struct NoMask {
    __device__ __forceinline__ void operator()(std::uint32_t (&)[4], int) const {}
};

// Clears, in a word of two elements, those that are not kept. Selected, never multiplied: what is dropped may be NaN.
__device__ __forceinline__ void select(std::uint32_t& word, bool keeps_low, bool keeps_high) {
    if (!keeps_low) word &= 0xFFFF0000u;
    if (!keeps_high) word &= 0x0000FFFFu;
}

__device__ __forceinline__ std::uint32_t row_bits(const GroupedModule& module, const Group& group, int token) {
    return token < group.stop ? dropout_row(module.row_keys[token], module.module) : 0;
}

__device__ __forceinline__ bool drops(const Group& group) {
    return group.threshold != std::numeric_limits<std::int32_t>::min();
}

__device__ __forceinline__ std::uint32_t pack(float low, float high, __nv_bfloat16) {
    const __nv_bfloat162 rounded = __float22bfloat162_rn(float2{low, high});
    return *reinterpret_cast<const std::uint32_t*>(&rounded);
}
__device__ __forceinline__ std::uint32_t pack(float low, float high, __half) {
    const __half2 rounded = __float22half2_rn(float2{low, high});
    return *reinterpret_cast<const std::uint32_t*>(&rounded);
}
__device__ __forceinline__ float2 unpack(std::uint32_t word, __nv_bfloat16) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&word));
}
__device__ __forceinline__ float2 unpack(std::uint32_t word, __half) {
    return __half22float2(*reinterpret_cast<const __half2*>(&word));
}

// Two boxes for each step, and as many steps in flight as there are stages but one.
constexpr int kGroupedStages = 4;
struct Stage {
    Box left;
    Box right;
};
constexpr int kPipelineBytes = kGroupedStages * static_cast<int>(sizeof(Stage));

// Runs `multiply(stage, step)` for every step after `load(stage, step)` filled its stage.
template <typename Load, typename Multiply>
__device__ __forceinline__ void pipeline(Stage* stages, int steps, Load load, Multiply multiply) {
#pragma unroll
    for (int step = 0; step < kGroupedStages - 1; ++step) {
        if (step < steps) load(stages[step], step);
        cute::cp_async_fence();
    }
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        cute::cp_async_wait<kGroupedStages - 2>();
        __syncthreads();
        const int ahead = step + kGroupedStages - 1;
        if (ahead < steps) load(stages[ahead % kGroupedStages], ahead);
        cute::cp_async_fence();
        multiply(stages[step % kGroupedStages], step);
    }
}

inline int boxes(int features) { return (features + kBoxColumns - 1) / kBoxColumns; }

}  // namespace alto::cuda
