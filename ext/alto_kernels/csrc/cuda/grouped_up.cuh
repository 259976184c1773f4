// Y += S B^T and dX += drop(dS A), in place: a block has 64 tokens of one group and 64 features of the output.
#pragma once

#include "sm80.cuh"

namespace alto::cuda {

template <typename Element, bool kBackward>
__global__ void __launch_bounds__(kGroupedThreads)
    grouped_up_kernel(const GroupedModule module, const Element* saved, Element* output) {
    __shared__ Box saved_box;
    __shared__ Box pool_box;
    __shared__ Box output_box;
    const TokenTile tile = module.tiles[blockIdx.y];
    const Group group = module.groups[tile.group];
    if (module.slots[group.slot].a == nullptr) return;

    const int feature = static_cast<int>(blockIdx.x) * kBoxColumns;
    const int features = kBackward ? module.in_features : module.out_features;
    const auto* pool = static_cast<const Element*>(kBackward ? module.a_pool : module.b_pool);
    load_box(output_box, output, features, tile.row, group.stop, feature, features);
    Accumulator sum = {};
    for (int chunk = 0; chunk < group.columns; chunk += kBoxColumns) {
        const int last = min(chunk + kBoxColumns, group.columns);
        const int first_column = group.pool_column + chunk;
        const int last_column = group.pool_column + last;
        if (chunk > 0) __syncthreads();
        load_box(saved_box, saved, module.saved_columns, tile.row, group.stop, chunk, last);
        if constexpr (kBackward) {
            load_box(pool_box, pool, features, first_column, last_column, feature, features);
        } else {
            load_box(pool_box, pool, module.pool_columns, feature, features, first_column, last_column);
        }
        cute::cp_async_fence();
        cute::cp_async_wait<0>();
        __syncthreads();
        multiply_boxes<Element, false, kBackward>(sum, saved_box, pool_box, kBoxColumns, last - chunk, NoMask{});
    }

    const bool masked = kBackward && drops(group);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = warp_row() + accumulator_row() + half * 8;
        const std::uint32_t bits = masked ? row_bits(module, group, tile.row + row) : 0;
#pragma unroll
        for (int block = 0; block < 8; ++block) {
            const int column = block * 8 + accumulator_column();
            float2 value{sum[block][half * 2], sum[block][half * 2 + 1]};
            if (masked) {
                const auto at = static_cast<std::uint32_t>(feature + column);
                if (!dropout_keeps(bits, at, group.threshold)) value.x = 0.0f;
                if (!dropout_keeps(bits, at + 1, group.threshold)) value.y = 0.0f;
            }
            std::uint32_t* const word = output_box.pair(row, column);
            const float2 old = unpack(*word, Element{});
            *word = pack(old.x + value.x, old.y + value.y, Element{});
        }
    }
    // A warp stores the rows that it made.
    __syncwarp();
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = warp_row() + i * 4 + lane / kPieces;
        const int column = feature + lane % kPieces * 8;
        if (tile.row + row < group.stop && column < features)
            *reinterpret_cast<uint4*>(output + static_cast<std::int64_t>(tile.row + row) * features + column) =
                *output_box.piece(row, lane % kPieces);
    }
}

template <typename Element>
cudaError_t launch_grouped_up(const GroupedModule& module, bool backward, const Element* saved, Element* output,
                              cudaStream_t stream) {
    const auto kernel = backward ? grouped_up_kernel<Element, true> : grouped_up_kernel<Element, false>;
    const dim3 grid(static_cast<unsigned>(boxes(backward ? module.in_features : module.out_features)),
                    static_cast<unsigned>(module.tile_count));
    kernel<<<grid, kGroupedThreads, 0, stream>>>(module, saved, output);
    return cudaGetLastError();
}

}  // namespace alto::cuda
