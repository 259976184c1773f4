// S = scale drop(X) A^T and dS = scale dY B: a block has 64 tokens of one group and 64 of its columns.
#pragma once

#include "sm80.cuh"

namespace alto::cuda {

template <typename Element, bool kBackward>
__global__ void __launch_bounds__(kGroupedThreads)
    grouped_down_kernel(const GroupedModule module, const Element* operand, Element* saved) {
    extern __shared__ Stage stages[];
    const TokenTile tile = module.tiles[blockIdx.x];
    const Group group = module.groups[tile.group];
    const int chunk = static_cast<int>(blockIdx.y) * kBoxColumns;
    if (chunk >= group.columns || module.slots[group.slot].a == nullptr) return;

    const int columns = min(kBoxColumns, group.columns - chunk);
    const int first_column = group.pool_column + chunk;
    const int features = kBackward ? module.out_features : module.in_features;
    const auto* pool = static_cast<const Element*>(kBackward ? module.b_pool : module.a_pool);
    const int row = warp_row() + accumulator_row();
    const bool masked = !kBackward && drops(group);
    std::uint32_t bits[2] = {};
    if (masked) {
        bits[0] = row_bits(module, group, tile.row + row);
        bits[1] = row_bits(module, group, tile.row + row + 8);
    }

    Accumulator sum = {};
    const auto load = [&](Stage& stage, int step) {
        const int feature = step * kBoxColumns;
        load_box(stage.left, operand, features, tile.row, group.stop, feature, features);
        if constexpr (kBackward) {
            load_box(stage.right, pool, module.pool_columns, feature, features, first_column, first_column + columns);
        } else {
            load_box(stage.right, pool, features, first_column, first_column + columns, feature, features);
        }
    };
    const auto multiply = [&](Stage& stage, int step) {
        if (!masked) {
            multiply_boxes<Element, false, kBackward>(sum, stage.left, stage.right, columns, kBoxColumns, NoMask{});
            return;
        }
        const auto mask = [&](std::uint32_t (&words)[4], int k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const auto feature =
                    static_cast<std::uint32_t>(step * kBoxColumns + k + accumulator_column() + i / 2 * 8);
                select(words[i], dropout_keeps(bits[i % 2], feature, group.threshold),
                       dropout_keeps(bits[i % 2], feature + 1, group.threshold));
            }
        };
        multiply_boxes<Element, false, kBackward>(sum, stage.left, stage.right, columns, kBoxColumns, mask);
    };
    pipeline(stages, (features + kBoxColumns - 1) / kBoxColumns, load, multiply);

    const bool bad = module.slot_is_bad[group.slot] != 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int token = tile.row + row + half * 8;
        if (token >= group.stop) continue;
        Element* to = saved + static_cast<std::int64_t>(token) * module.saved_columns + chunk + accumulator_column();
#pragma unroll
        for (int block = 0; block < 8; ++block) {
            if (block * 8 >= columns) break;
            float2 value{sum[block][half * 2] * group.scale, sum[block][half * 2 + 1] * group.scale};
            if (bad) value.x = value.y = __int_as_float(0x7FC00000);
            *reinterpret_cast<std::uint32_t*>(to + block * 8) = pack(value.x, value.y, Element{});
        }
    }
}

template <typename Element>
cudaError_t launch_grouped_down(const GroupedModule& module, bool backward, const Element* operand, Element* saved,
                                cudaStream_t stream) {
    const auto kernel = backward ? grouped_down_kernel<Element, true> : grouped_down_kernel<Element, false>;
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kPipelineBytes);
    if (status != cudaSuccess) return status;
    const dim3 grid(static_cast<unsigned>(module.tile_count), static_cast<unsigned>(boxes(module.saved_columns)));
    kernel<<<grid, kGroupedThreads, kPipelineBytes, stream>>>(module, operand, saved);
    return cudaGetLastError();
}

}  // namespace alto::cuda
