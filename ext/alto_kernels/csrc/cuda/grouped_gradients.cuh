// dB += dY^T S and dA += dS^T drop(X): a block has 64 features and 64 columns of one group, over all its tokens.
//
// One block owns an element of a gradient, so there are neither atomics nor partial sums.
#pragma once

#include "sm80.cuh"

namespace alto::cuda {

__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ float widened(__nv_bfloat16 value) { return __bfloat162float(value); }

// A is [rank, K], B is [N, rank]. All old values are read before the first is written: one wait for memory.
template <typename Gradient>
__device__ __forceinline__ void add_to_gradient(Gradient* gradient, const Accumulator& sum, bool of_a, int own_feature,
                                                int features, int chunk, int rank) {
    const std::int64_t feature_stride = of_a ? 1 : rank;
    const std::int64_t column_stride = of_a ? features : 1;
    const auto address = [&](int block, int i) -> Gradient* {
        const int row = own_feature + i / 2 * 8;
        const int column = chunk + block * 8 + accumulator_column() + i % 2;
        return row < features && column < rank ? gradient + row * feature_stride + column * column_stride : nullptr;
    };
    Accumulator old;
#pragma unroll
    for (int block = 0; block < 8; ++block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const Gradient* at = address(block, i);
            old[block][i] = at == nullptr ? 0.0f : widened(*at);
        }
    }
#pragma unroll
    for (int block = 0; block < 8; ++block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            Gradient* at = address(block, i);
            if (at != nullptr) *at = static_cast<Gradient>(old[block][i] + sum[block][i]);
        }
    }
}

// Grid: (64 features of dB and then of dA, 64 columns, groups).
template <typename Element>
__global__ void __launch_bounds__(kGroupedThreads)
    grouped_gradients_kernel(const GroupedModule module, const Element* x, const Element* dy, const Element* s,
                             const Element* ds, int blocks_of_b) {
    extern __shared__ Stage stages[];
    const Group group = module.groups[blockIdx.z];
    const SlotPointers pointers = module.slots[group.slot];
    const int chunk = static_cast<int>(blockIdx.y) * kBoxColumns;
    if (chunk >= group.columns || group.start == group.stop || pointers.a == nullptr) return;

    const bool of_a = static_cast<int>(blockIdx.x) >= blocks_of_b;
    const int feature = (static_cast<int>(blockIdx.x) - (of_a ? blocks_of_b : 0)) * kBoxColumns;
    const int features = of_a ? module.in_features : module.out_features;
    const Element* operand = of_a ? x : dy;
    const Element* saved = of_a ? ds : s;
    const int columns = min(kBoxColumns, group.columns - chunk);
    const bool masked = of_a && drops(group);

    Accumulator sum = {};
    const auto load = [&](Stage& stage, int step) {
        const int token = group.start + step * kBoxRows;
        load_box(stage.left, operand, features, token, group.stop, feature, features);
        load_box(stage.right, saved, module.saved_columns, token, group.stop, chunk, chunk + columns);
    };
    const int own_feature = feature + warp_row() + accumulator_row();
    const auto multiply = [&](Stage& stage, int step) {
        const int token = group.start + step * kBoxRows;
        const int depth = group.stop - token;
        if (!masked) {
            multiply_boxes<Element, true, true>(sum, stage.left, stage.right, columns, depth, NoMask{});
            return;
        }
        const auto mask = [&](std::uint32_t (&words)[4], int k) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int low_token = token + k + accumulator_column() + half * 8;
                const std::uint32_t low = row_bits(module, group, low_token);
                const std::uint32_t high = row_bits(module, group, low_token + 1);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const auto at = static_cast<std::uint32_t>(own_feature + i * 8);
                    select(words[half * 2 + i], dropout_keeps(low, at, group.threshold),
                           dropout_keeps(high, at, group.threshold));
                }
            }
        };
        multiply_boxes<Element, true, true>(sum, stage.left, stage.right, columns, depth, mask);
    };
    pipeline(stages, (group.stop - group.start + kBoxRows - 1) / kBoxRows, load, multiply);

    void* const gradient = of_a ? pointers.grad_a : pointers.grad_b;
    if (module.gradients_are_bfloat16) {
        add_to_gradient(static_cast<__nv_bfloat16*>(gradient), sum, of_a, own_feature, features, chunk, group.rank);
    } else {
        add_to_gradient(static_cast<float*>(gradient), sum, of_a, own_feature, features, chunk, group.rank);
    }
}

template <typename Element>
cudaError_t launch_grouped_gradients(const GroupedModule& module, const Element* x, const Element* dy, const Element* s,
                                     const Element* ds, cudaStream_t stream) {
    const cudaError_t status = cudaFuncSetAttribute(grouped_gradients_kernel<Element>,
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize, kPipelineBytes);
    if (status != cudaSuccess) return status;
    const int blocks_of_b = boxes(module.out_features);
    const dim3 grid(static_cast<unsigned>(blocks_of_b + boxes(module.in_features)),
                    static_cast<unsigned>(boxes(module.saved_columns)), static_cast<unsigned>(module.group_count));
    grouped_gradients_kernel<Element>
        <<<grid, kGroupedThreads, kPipelineBytes, stream>>>(module, x, dy, s, ds, blocks_of_b);
    return cudaGetLastError();
}

}  // namespace alto::cuda
