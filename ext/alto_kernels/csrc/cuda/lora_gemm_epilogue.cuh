// What becomes of the accumulators: outputs, S blocks and gradients. Included by lora_gemm_consumer.cuh.
#pragma once

namespace alto::cuda {

// The accumulators of a thread, the same registers for items of all kinds: each kind's own would all stay alive, since
// wgmma reads them before they are written.
using Sum = float[128];

// Of one warpgroup. What leaves the accumulators goes through its staging area, from where the copy engine takes
// outputs while the next item's products are made.
template <typename Element, bool kBackward>
struct Epilogue {
    const LoraGemmArguments& arguments;
    const SharedView& shared;
    int warpgroup;
    int thread;  // in the warpgroup

    // The first of the two rows (the other is 8 below) of the accumulator that this thread holds, in [0, 64).
    __device__ __forceinline__ int accumulator_row() const { return thread / 32 * 16 + thread % 32 / 4; }
    __device__ __forceinline__ int accumulator_column() const { return thread % 4 * 2; }

    // Returns once nothing is read from the staging area any more.
    __device__ __forceinline__ void await_staging() {
        cute::tma_store_wait<0>();
        warpgroup_barrier(warpgroup);
    }
    __device__ __forceinline__ unsigned char* staging() const { return shared.staging + warpgroup * kStagingBytes; }
    // One of two buffers of this warp alone: its 16 rows of the accumulators by 64 16-bit columns.
    __device__ __forceinline__ unsigned char* warp_buffer(int which) const {
        return staging() + (thread / 32 * 2 + which) * kWarpBufferBytes;
    }

    // Writes this warpgroup's 64 x 256 of the output, each warp its own rows, half of the columns at a time.
    __device__ __forceinline__ void store_output(const Item& item, const Sum& sum) {
        const ModuleArguments& module = arguments.modules[kBackward ? 0 : item.module];
        const CUtensorMap& output = kBackward ? arguments.input_grads : module.rows;
        const int features = kBackward ? arguments.in_features : module.out_features;
        const int lane = thread % 32;
        const int row = lane % 16;
        const int first_row = item.row + warpgroup * 64 + thread / 32 * kWarpRows;
        await_staging();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (half == 1) {
                if (lane == 0) cute::tma_store_wait<0>();
                __syncwarp();
            }
#pragma unroll
            for (int pair = 0; pair < 8; ++pair) {
                std::uint32_t packed[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int at = (half * 16 + pair * 2 + i / 2) * 4 + i % 2 * 2;
                    packed[i] = rounded_pair(sum[at], sum[at + 1], Element{});
                }
                const int piece = pair % 4 * 2 + lane / 16;
                store_matrices(cute::cast_smem_ptr_to_uint(warp_buffer(pair / 4)) +
                                   static_cast<std::uint32_t>(row * 128 + (piece ^ (row & 7)) * 16),
                               packed[0], packed[1], packed[2], packed[3]);
            }
            fence_async_shared();
            __syncwarp();
            if (lane == 0) {
#pragma unroll
                for (int quarter = 0; quarter < 2; ++quarter) {
                    const int column = item.column + half * 128 + quarter * 64;
                    if (column >= features) continue;
                    if (kBackward && arguments.adds_to_output) {
                        add_box(output, warp_buffer(quarter), column, first_row);
                    } else {
                        store_box(output, warp_buffer(quarter), column, first_row);
                    }
                }
                cute::tma_store_arrive();
            }
        }
    }

    // Forward. Apart from store_output, which is short without it: most layers have no bias.
    __device__ __forceinline__ void add_bias(const Item& item, const Element* bias, Sum& sum) const {
        const int features = arguments.modules[item.module].out_features;
#pragma unroll
        for (int block = 0; block < 32; ++block) {
            const int column = item.column + block * 8 + accumulator_column();
            if (column >= features) continue;
            const float one = to_float(bias[column]);
            const float two = to_float(bias[column + 1]);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                sum[block * 4 + half * 2] += one;
                sum[block * 4 + half * 2 + 1] += two;
            }
        }
    }

    // One bit for each 16 columns of the parts: whether their owner's weights are not finite. Asked before the
    // products, so that nobody waits for the answer after them; the owners are then in the L1 cache too.
    __device__ __forceinline__ std::uint32_t bad_owners(const Item& item) const {
        const int lane = thread % 32;
        bool bad = false;
        if (lane < item.block_count * kGranules && item.parts[lane / kGranules].detail >= 0) {
            const Owner* owner = arguments.owners + item.parts[lane / kGranules].detail * kGranules + lane % kGranules;
            bad = owner->start < owner->stop && arguments.slot_is_bad[owner->slot] != 0;
        }
        return __ballot_sync(0xFFFFFFFFu, bad);
    }

    // Writes S blocks, each warp its own 16 rows, and counts them as done: other blocks of threads read them by TMA.
    __device__ __forceinline__ void write_blocks(const Item& item, std::uint32_t bad, const Sum& sum) {
        int written = 0;
        await_staging();
#pragma unroll
        for (int index = 0; index < kMaxParts; ++index) {
            if (index >= item.block_count || item.parts[index].detail < 0) continue;
            const Part& part = item.parts[index];
            // Two buffers in turn: this one was read before the warp met for the other.
            unsigned char* buffer = warp_buffer(written % 2);
            fill_block(item, part, bad >> (index * kGranules), index * 32, sum, reinterpret_cast<Element*>(buffer));
            __syncwarp();
            store_rows(part, buffer);
            ++written;
        }
        if (written == 0) return;
        // Plain stores, which other blocks read by the copy engine: each lane orders its own before what goes by way of
        // that engine, the warp meets, and one lane releases; the reader acquires the counter and orders once more.
        fence_async_proxy();
        __syncwarp();
        if (thread % 32 == 0) {
            fence_release();
            add_to(arguments.ready + item.row / kTileRows, written);
            add_to(arguments.ready + arguments.tiles, written);
        }
    }

    // Plain stores, sooner to be seen than the copy engine's: whoever made the block waits until it is in memory.
    __device__ __forceinline__ void store_rows(const Part& part, const unsigned char* buffer) const {
        const int first_row = part.s_row + warpgroup * 64 + thread / 32 * kWarpRows;
        auto* const to = reinterpret_cast<uint4*>(static_cast<Element*>(arguments.modules[part.module].block_data) +
                                                  static_cast<std::int64_t>(first_row) * kStepDepth);
#pragma unroll
        for (int i = 0; i < kWarpBufferBytes / 512; ++i)
            to[i * 32 + thread % 32] = reinterpret_cast<const uint4*>(buffer)[i * 32 + thread % 32];
    }

    // This warp's 16 rows of an S block: each owner's columns for its own tokens, zero elsewhere.
    __device__ __forceinline__ void fill_block(const Item& item, const Part& part, std::uint32_t bad_owners,
                                               const int first, const Sum& sum, Element* buffer) {
        const int row = accumulator_row();
        Element* to = buffer + row % kWarpRows * kStepDepth + accumulator_column();
#pragma unroll
        for (int granule = 0; granule < kGranules; ++granule) {
            const Owner owner = arguments.owners[part.detail * kGranules + granule];
            const float factor = owner.scale * (kBackward ? 1.0f : owner.keep_factor);
            const bool bad = (bad_owners >> granule & 1) != 0;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int token = item.row + warpgroup * 64 + row + half * 8;
                const bool inside = token >= owner.start && token < owner.stop;
#pragma unroll
                for (int block = 0; block < 2; ++block) {
                    const int column = block * 8 + accumulator_column();
                    const int at = first + (granule * 2 + block) * 4 + half * 2;
                    float2 value{sum[at] * factor, sum[at + 1] * factor};
                    if (bad) value.x = value.y = __int_as_float(0x7FC00000);
                    if (!inside || column >= owner.columns) value.x = 0.0f;
                    if (!inside || column + 1 >= owner.columns) value.y = 0.0f;
                    *reinterpret_cast<std::uint32_t*>(to + half * 8 * kStepDepth + granule * kGranule + block * 8) =
                        rounded_pair(value.x, value.y, Element{});
                }
            }
        }
    }

    // Turns a product of 64 features by the 64 columns of an S block in the staging area, so that whole lines can go
    // out from there: A has a row for each rank column, B one for each feature.
    template <int size>
    __device__ __forceinline__ void turn(const Item& item, const int first, const float (&sum)[size]) {
        const bool of_a = item.kind == Kind::kGradA;
        const int row_stride = of_a ? 1 : kGradientRow;
        const int column_stride = of_a ? kGradientRow : 1;
        float* const at =
            reinterpret_cast<float*>(staging()) + accumulator_row() * row_stride + accumulator_column() * column_stride;
        const float factor = of_a ? item.keep_factor : 1.0f;
        const std::uint32_t eighths = item.eighths >> (first / 32 * 8);
        await_staging();
#pragma unroll
        for (int block = 0; block < 8; ++block) {
            if ((eighths >> block & 1) == 0) continue;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float one = sum[first + block * 4 + half * 2] * factor;
                const float two = sum[first + block * 4 + half * 2 + 1] * factor;
                float* const here = at + half * 8 * row_stride + block * 8 * column_stride;
                if (of_a) {
                    here[0] = one;
                    here[kGradientRow] = two;
                } else {
                    *reinterpret_cast<float2*>(here) = float2{one, two};
                }
            }
        }
    }

    // Adds (or writes) what was turned to the gradients of the item's parts [first_part, last_part), which lie in that
    // block. Each element is added to once a launch: deterministic.
    __device__ __forceinline__ void add_gradients(const ItemSlot& slot, int first_part, int last_part,
                                                  int first_feature) {
        const Item& item = slot.item;
        const bool of_a = item.kind == Kind::kGradA;
        const int all_features =
            of_a ? arguments.in_features : arguments.modules[item.parts[first_part].module].out_features;
        const int features = min(64, all_features - first_feature);
        auto* const tile = reinterpret_cast<float*>(staging());
        warpgroup_barrier(warpgroup);
#pragma unroll 1
        for (int index = first_part; index < last_part; ++index) {
            const Part& part = item.parts[index];
            if (slot.gradients[index] == nullptr) continue;
            const int columns = columns_of(part);
            const int rows = of_a ? columns : features;
            const int width = of_a ? features : columns;
            const std::int64_t stride = of_a ? arguments.in_features : part.rank;
            const std::int64_t to = of_a ? part.detail * stride + first_feature : first_feature * stride + part.detail;
            const float* const from = tile + part.column * (of_a ? kGradientRow : 1);
            if (arguments.gradients_are_bfloat16) {
                put(item, static_cast<__nv_bfloat16*>(slot.gradients[index]) + to, stride, from, rows, width);
            } else {
                put(item, static_cast<float*>(slot.gradients[index]) + to, stride, from, rows, width);
            }
        }
    }

    // The rank columns of a gradient's part.
    __device__ __forceinline__ static int columns_of(const Part& part) {
        return min(part.rank - part.detail, kStepDepth);
    }

    // Adds, or writes where the gradient is fresh, `rows` x `width` elements of the staging area, by 16 bytes where
    // that goes up in the gradient's rows.
    template <typename Gradient>
    __device__ __forceinline__ void put(const Item& item, Gradient* to, std::int64_t stride, const float* tile,
                                        int rows, int width) {
        constexpr int kVector = 16 / static_cast<int>(sizeof(Gradient));
        if (width % kVector == 0 && stride % kVector == 0 && reinterpret_cast<std::uintptr_t>(to) % 16 == 0) {
            put_rows<kVector>(item, to, stride, tile, rows, width);
        } else {
            put_rows<1>(item, to, stride, tile, rows, width);
        }
    }

    // Threads side by side in a row and on to the next: rows of a gradient of B lie behind each other in memory,
    // however few columns they have.
    template <int vector, typename Gradient>
    __device__ __forceinline__ void put_rows(const Item& item, Gradient* to, std::int64_t stride, const float* tile,
                                             int rows, int width) {
        if (width <= 0) return;  // features beyond the last
        const auto threads_of_row = static_cast<unsigned>(width / vector);
        const auto rows_at_once = static_cast<int>(128u / threads_of_row);
        const int first_row = static_cast<int>(static_cast<unsigned>(thread) / threads_of_row);
        const int column = static_cast<int>(static_cast<unsigned>(thread) % threads_of_row) * vector;
        if (first_row >= rows_at_once) return;
        const bool fresh = (item.flags & kFresh) != 0;
#pragma unroll 4
        for (int row = first_row; row < rows; row += rows_at_once) {
            Gradient* const here = to + row * stride + column;
            const auto value = stored<vector>(tile + row * kGradientRow + column, here);
            if (fresh) {
                *reinterpret_cast<std::remove_const_t<decltype(value)>*>(here) = value;
            } else {
                add_to(here, value);
            }
        }
    }

    // `vector` numbers of the staging area as they are stored in a gradient: 16 bytes, or one.
    template <int vector>
    __device__ __forceinline__ static auto stored(const float* from, const float* /*format*/) {
        if constexpr (vector == 4) {
            return *reinterpret_cast<const float4*>(from);
        } else {
            return *from;
        }
    }
    template <int vector>
    __device__ __forceinline__ static auto stored(const float* from, const __nv_bfloat16* /*format*/) {
        if constexpr (vector == 8) {
            const float4 low = *reinterpret_cast<const float4*>(from);
            const float4 high = *reinterpret_cast<const float4*>(from + 4);
            return uint4{rounded_pair(low.x, low.y, __nv_bfloat16{}), rounded_pair(low.z, low.w, __nv_bfloat16{}),
                         rounded_pair(high.x, high.y, __nv_bfloat16{}), rounded_pair(high.z, high.w, __nv_bfloat16{})};
        } else {
            return __float2bfloat16_rn(*from);
        }
    }
};

}  // namespace alto::cuda
