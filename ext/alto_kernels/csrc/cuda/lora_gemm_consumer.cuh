// The consumers: two warpgroups, each with 64 of the tile's 128 rows (or of a gradient's 128 features). Included by
// lora_gemm.cuh.
#pragma once

namespace alto::cuda {

template <bool kBackward>
struct Consumer {
    // The weight's tile has the output features along its contiguous index in backward, across it in forward.
    static constexpr Major kWeightMajor = kBackward ? Major::MN : Major::K;

    const LoraGemmArguments& arguments;
    const SharedView& shared;
    int warpgroup;
    int thread;  // in the warpgroup
    Ring<kStages> ring{};
    int held = -1;  // the stage that wgmma may still be reading

    __device__ __forceinline__ std::uint32_t box(int index) const {
        return cute::cast_smem_ptr_to_uint(shared.box(ring.stage, index));
    }
    // The first of the two rows (the other is 8 below) of the accumulator that this thread holds, in [0, 64).
    __device__ __forceinline__ int accumulator_row() const { return thread / 32 * 16 + thread % 32 / 4; }
    __device__ __forceinline__ int accumulator_column() const { return thread % 4 * 2; }

    __device__ __forceinline__ void await_full() { FullBarrier::wait(&shared.control->full[ring.stage], ring.phase); }

    // Gives a stage back to the producers of both blocks.
    __device__ __forceinline__ void release(int stage) {
        if (thread < kClusterSize)
            EmptyBarrier::arrive(&shared.control->empty[stage], static_cast<std::uint32_t>(thread), true);
    }

    // sum += rows x weight, 64 deep, of two boxes of the stage.
    template <Major major_rows, Major major_weight, int count>
    __device__ __forceinline__ void multiply_boxes(std::uint32_t rows, std::uint32_t weight, float (&sum)[count],
                                                   ScaleOut& keep) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            multiply<major_rows, major_weight>(operand<major_rows>(rows, i), operand<major_weight>(weight, i), sum,
                                               keep);
            keep = ScaleOut::One;
        }
    }

    // What multiply_boxes was asked since begin() is left in flight, and the stage before it freed.
    __device__ __forceinline__ void commit_step() {
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<1>();
        if (held >= 0) release(held);
        held = ring.stage;
        ring.advance();
    }

    __device__ __forceinline__ void tile_step(float (&sum)[128], ScaleOut& keep) {
        fence_registers(sum);
        cute::warpgroup_arrive();
        multiply_boxes<Major::K, kWeightMajor>(box(warpgroup), box(kWeightBox), sum, keep);
        commit_step();
        fence_registers(sum);
    }

    template <int count>
    __device__ __forceinline__ void finish(float (&sum)[count]) {
        cute::warpgroup_wait<0>();
        fence_registers(sum);
        if (held >= 0) release(held);
        held = -1;
    }

    // Zeroes, in two boxes of the stage that are this warpgroup's, the row of this thread where it is outside of the
    // segment, and the elements that dropout drops. Set to zero, never multiplied: what is masked may be NaN. The first
    // box holds `feature` and the 63 behind it, the second the next 64.
    __device__ __forceinline__ void mask_boxes(int first_box, int second_box, bool inside, std::uint32_t row_bits,
                                               std::int32_t threshold, int feature) {
        mask_box(shared.box(ring.stage, first_box), inside, row_bits, threshold, feature);
        mask_box(shared.box(ring.stage, second_box), inside, row_bits, threshold, feature + 64);
        fence_async_shared();
        warpgroup_barrier(warpgroup);
    }

    __device__ __forceinline__ void mask_box(unsigned char* box, bool inside, std::uint32_t row_bits,
                                             std::int32_t threshold, int feature) {
        // Opaque, or the compiler would hash all features before the loop over steps and spill them.
        asm volatile("" : "+r"(feature));
        const int row = thread / 2;
        const bool drops = threshold != std::numeric_limits<std::int32_t>::min();
        if (!inside || drops) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int piece = thread % 2 * 4 + i;
                uint4* at = reinterpret_cast<uint4*>(box + row * 128 + (piece ^ (row & 7)) * 16);
                uint4 value = inside ? *at : uint4{0, 0, 0, 0};
                if (inside) {
                    auto* words = reinterpret_cast<std::uint32_t*>(&value);
#pragma unroll
                    for (int w = 0; w < 4; ++w) {
                        const auto at_feature = static_cast<std::uint32_t>(feature + piece * 8 + w * 2);
                        if (!dropout_keeps(row_bits, at_feature, threshold)) words[w] &= 0xFFFF0000u;
                        if (!dropout_keeps(row_bits, at_feature + 1, threshold)) words[w] &= 0x0000FFFFu;
                    }
                }
                *at = value;
            }
        }
    }

    __device__ __forceinline__ void extra_steps(const Item& item, float (&sum)[128], ScaleOut& keep) {
#pragma unroll 1
        for (int index = 0; index < item.extra_count; ++index) {
            await_full();
            tile_step(sum, keep);
        }
        finish(sum);
        // The peer has more of them.
        for (int index = item.extra_count; index < item.extra_steps; ++index) {
            await_full();
            release(ring.stage);
            ring.advance();
        }
    }

    // The low-rank part of dX goes through the mask of the forward pass.
    __device__ __forceinline__ void drop_low_rank(const Item& item, float (&sum)[128]) {
        std::uint32_t row_bits[2] = {};
        std::int32_t threshold[2];
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int token = item.row + warpgroup * 64 + accumulator_row() + half * 8;
            const bool real = token < arguments.tokens;
            threshold[half] = real ? arguments.thresholds[token] : std::numeric_limits<std::int32_t>::min();
            factor[half] = real ? arguments.keep_factors[token] : 1.0f;
            if (real) row_bits[half] = dropout_row(arguments.row_keys[token], arguments.module);
        }
        const int first_feature = item.column + accumulator_column();
        // Rows and not features in the inner loop: the hash of a feature is used twice and not kept.
#pragma unroll
        for (int i = 0; i < 64; ++i) {
            const auto feature = static_cast<std::uint32_t>(first_feature + i / 2 * 8 + i % 2);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float& value = sum[i / 2 * 4 + half * 2 + i % 2];
                value = dropout_keeps(row_bits[half], feature, threshold[half]) ? value * factor[half] : 0.0f;
            }
        }
    }

    // Writes this warpgroup's 64 x 256 of the output, 64 columns at a time, through shared memory and TMA.
    __device__ __forceinline__ void store_output(const Item& item, const float (&sum)[128]) {
        const int lane = thread % 32;
        const int row = thread / 32 * 16 + lane % 8 + lane / 8 % 2 * 8;
        const bool biased = !kBackward && arguments.bias != nullptr;
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter) {
            unsigned char* staging = shared.staging + (warpgroup * 2 + quarter % 2) * kBoxBytes;
            const std::uint32_t row_address =
                cute::cast_smem_ptr_to_uint(staging) + static_cast<std::uint32_t>(row) * 128;
            if (thread == 0) cute::tma_store_wait<1>();
            warpgroup_barrier(warpgroup);
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {
                std::uint32_t packed[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int column_block = quarter * 8 + pair * 2 + i / 2;
                    const int index = column_block * 4 + i % 2 * 2;
                    float2 value{sum[index], sum[index + 1]};
                    if (biased) {
                        const int column = item.column + column_block * 8 + accumulator_column();
                        if (column < arguments.out_features) {
                            value.x += __bfloat162float(arguments.bias[column]);
                            value.y += __bfloat162float(arguments.bias[column + 1]);
                        }
                    }
                    const __nv_bfloat162 rounded = __float22bfloat162_rn(value);
                    packed[i] = *reinterpret_cast<const std::uint32_t*>(&rounded);
                }
                const int piece = pair * 2 + lane / 16;
                store_matrices(row_address + static_cast<std::uint32_t>((piece ^ (row & 7)) * 16), packed[0], packed[1],
                               packed[2], packed[3]);
            }
            fence_async_shared();
            warpgroup_barrier(warpgroup);
            const int column = item.column + quarter * 64;
            if (thread == 0 && column < (kBackward ? arguments.in_features : arguments.out_features)) {
                const int row_in_output = item.row + warpgroup * 64;
                if (kBackward && arguments.adds_to_output) {
                    add_box(arguments.output, staging, column, row_in_output);
                } else {
                    store_box(arguments.output, staging, column, row_in_output);
                }
            }
            if (thread == 0) cute::tma_store_arrive();
        }
    }

    __device__ __forceinline__ void base(const Item& item, bool extra_first) {
        float sum[128];
        ScaleOut keep = ScaleOut::Zero;
        if (extra_first) {
            if (item.extra_count == 0) {
#pragma unroll
                for (int i = 0; i < 128; ++i) sum[i] = 0.0f;
                keep = ScaleOut::One;
            }
            extra_steps(item, sum, keep);
            drop_low_rank(item, sum);
        }
#pragma unroll 1
        for (int index = 0; index < item.steps; ++index) {
            await_full();
            tile_step(sum, keep);
        }
        if (!extra_first) {
            extra_steps(item, sum, keep);
        } else {
            finish(sum);
        }
        store_output(item, sum);
    }

    __device__ __forceinline__ void down(const Item& item) {
        const int own_token = item.row + warpgroup * 64 + thread / 2;
        const bool drops = !kBackward && item.threshold != std::numeric_limits<std::int32_t>::min();
        const std::uint32_t row_bits =
            drops && own_token < arguments.tokens ? dropout_row(arguments.row_keys[own_token], arguments.module) : 0;
        const bool bad = arguments.slot_is_bad[item.slot] != 0;
        float sum[32];
        ScaleOut keep = ScaleOut::Zero;
#pragma unroll 1
        for (int index = 0; index < item.steps; ++index) {
            await_full();
            if (drops) mask_boxes(warpgroup, 2 + warpgroup, true, row_bits, item.threshold, index * kDownDepth);
            fence_registers(sum);
            cute::warpgroup_arrive();
            multiply_boxes<Major::K, kWeightMajor>(box(warpgroup), box(kPoolBox), sum, keep);
            multiply_boxes<Major::K, kWeightMajor>(box(2 + warpgroup), box(kPoolBox + 1), sum, keep);
            commit_step();
            fence_registers(sum);
        }
        finish(sum);
        if (item.valid == 0) return;

        const float factor = item.scale * (kBackward ? 1.0f : item.keep_factor);
        const int columns = item.rank - item.chunk;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = warpgroup * 64 + accumulator_row() + half * 8;
            const int token = item.row + row;
            const bool inside = token >= item.start && token < item.stop;
            __nv_bfloat16* to = arguments.block_data + static_cast<std::int64_t>(item.s_row + row) * kStepDepth;
#pragma unroll
            for (int block = 0; block < 8; ++block) {
                const int column = block * 8 + accumulator_column();
                float2 value{sum[block * 4 + half * 2] * factor, sum[block * 4 + half * 2 + 1] * factor};
                if (bad) value.x = value.y = __int_as_float(0x7FC00000);
                if (!inside || column >= columns) value.x = 0.0f;
                if (!inside || column + 1 >= columns) value.y = 0.0f;
                *reinterpret_cast<__nv_bfloat162*>(to + column) = __float22bfloat162_rn(value);
            }
        }
        // The block is read by TMA in other blocks: order these stores before it, then count this half as done.
        fence_async_proxy();
        __threadfence();
        warpgroup_barrier(warpgroup);
        if (thread == 0) {
            add_release(arguments.ready + item.row / kTileRows, 1);
            add_release(arguments.ready + arguments.tiles, 1);
        }
    }

    // Adds this warpgroup's product, 64 features by 64 rank columns, to the gradient.
    __device__ __forceinline__ void add_gradient(const Item& item, float* gradient, int first_feature,
                                                 const float (&sum)[32]) {
        const bool of_a = item.kind == Kind::kGradA;
        const int features = of_a ? arguments.in_features : arguments.out_features;
        const float factor = of_a ? item.keep_factor : 1.0f;
        const int columns = item.rank - item.chunk - accumulator_column();
        const int feature = first_feature + accumulator_row();
        const std::int64_t row_stride = of_a ? 1 : item.rank;
        const std::int64_t column_stride = of_a ? features : 1;
        float* at = gradient + feature * row_stride + (item.chunk + accumulator_column()) * column_stride;
        const bool paired = !of_a && item.rank % 2 == 0 && reinterpret_cast<std::uintptr_t>(gradient) % 8 == 0;
#pragma unroll
        for (int block = 0; block < 8; ++block) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float first = sum[block * 4 + half * 2] * factor;
                const float second = sum[block * 4 + half * 2 + 1] * factor;
                float* const here = at + half * 8 * row_stride;
                if (feature + half * 8 < features && block * 8 < columns) {
                    if (paired) {
                        add_to(here, first, second);
                    } else {
                        add_to(here, first);
                        if (block * 8 + 1 < columns) add_to(here + column_stride, second);
                    }
                }
            }
            // Opaque: one address at a time, not all of them in registers.
            at += 8 * column_stride;
            asm volatile("" : "+l"(at));
        }
    }

    __device__ __forceinline__ void gradient(const Item& item, float* gradient) {
        const bool of_a = item.kind == Kind::kGradA;
        const std::int32_t threshold = of_a ? item.threshold : std::numeric_limits<std::int32_t>::min();
        const bool drops = threshold != std::numeric_limits<std::int32_t>::min();
        const int feature = item.column + warpgroup * 128;
        float first_sum[32];
        float second_sum[32];
        ScaleOut keep = ScaleOut::Zero;
#pragma unroll 1
        for (int index = 0; index < item.steps; ++index) {
            const int token = item.row + index * 64;
            await_full();
            if (drops || token < item.start || token + 64 > item.stop) {
                const int own_token = token + thread / 2;
                const bool inside = own_token >= item.start && own_token < item.stop;
                const std::uint32_t row_bits =
                    drops && inside ? dropout_row(arguments.row_keys[own_token], arguments.module) : 0;
                mask_boxes(2 * warpgroup, 2 * warpgroup + 1, inside, row_bits, threshold, feature);
            }
            fence_registers(first_sum);
            fence_registers(second_sum);
            cute::warpgroup_arrive();
            ScaleOut keep_second = keep;
            multiply_boxes<Major::MN, Major::MN>(box(2 * warpgroup), box(kSavedBox), first_sum, keep);
            multiply_boxes<Major::MN, Major::MN>(box(2 * warpgroup + 1), box(kSavedBox), second_sum, keep_second);
            commit_step();
            fence_registers(first_sum);
            fence_registers(second_sum);
        }
        finish(first_sum);
        fence_registers(second_sum);
        add_gradient(item, gradient, feature, first_sum);
        add_gradient(item, gradient, feature + 64, second_sum);
    }
};

template <bool kBackward>
__device__ void consume(const LoraGemmArguments& arguments, const SharedView& shared, int warpgroup) {
    Consumer<kBackward> consumer{arguments, shared, warpgroup, static_cast<int>(threadIdx.x % 128)};
    const bool extra_first = kBackward && arguments.row_keys != nullptr;
    Ring<kItemSlots> items{};
#pragma unroll 1
    for (;;) {
        EmptyBarrier::wait(&shared.control->item_full[items.stage], items.phase);
        const ItemSlot& slot = shared.control->slots[items.stage];
        const Kind kind = slot.item.kind;
        if (kind == Kind::kEnd) break;
        if (kind == Kind::kBase) {
            consumer.base(slot.item, extra_first);
        } else if (kind == Kind::kDown) {
            consumer.down(slot.item);
        } else if (kBackward && slot.gradient != nullptr) {
            consumer.gradient(slot.item, slot.gradient);
        }
        __syncwarp();
        if (threadIdx.x % 32 == 0) EmptyBarrier::arrive(&shared.control->item_empty[items.stage]);
        items.advance();
    }
    if (consumer.thread == 0) cute::tma_store_wait<0>();
}

}  // namespace alto::cuda
