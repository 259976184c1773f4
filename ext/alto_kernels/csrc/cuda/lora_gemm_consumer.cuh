// The consumers: two warpgroups, each with 64 of the tile's 128 rows (or half of a gradient's features), make the
// products. Included by lora_gemm.cuh.
#pragma once

#include "lora_gemm_epilogue.cuh"

namespace alto::cuda {

template <typename Element, bool kBackward>
struct Consumer {
    // The weight's tile has the output features along its contiguous index in backward, across it in forward.
    static constexpr Major kWeightMajor = kBackward ? Major::MN : Major::K;

    const LoraGemmArguments& arguments;
    const SharedView& shared;
    int warpgroup;
    int thread;  // in the warpgroup
    Epilogue<Element, kBackward> epilogue{arguments, shared, warpgroup, thread};
    Ring<kStages> ring{};
    int held = -1;  // the stage that wgmma may still be reading

    __device__ __forceinline__ std::uint32_t box(int index) const {
        return cute::cast_smem_ptr_to_uint(shared.box(ring.stage, index));
    }
    __device__ __forceinline__ void await_full() { FullBarrier::wait(&shared.control->full[ring.stage], ring.phase); }

    // Gives a stage back to the producers of both blocks.
    __device__ __forceinline__ void release(int stage) {
        if (thread < kClusterSize)
            EmptyBarrier::arrive(&shared.control->empty[stage], static_cast<std::uint32_t>(thread), true);
    }

    // sum += rows x weight, 64 deep, of two boxes of the stage, for `count` accumulators from `first` on.
    template <Major major_rows, Major major_weight, int first, int count, int size>
    __device__ __forceinline__ void multiply_boxes(std::uint32_t rows, std::uint32_t weight, float (&sum)[size],
                                                   ScaleOut& keep) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            multiply<Element, major_rows, major_weight, first, count>(operand<major_rows>(rows, i),
                                                                      operand<major_weight>(weight, i), sum, keep);
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

    // The same for steps whose products are short beside their loads: the stage is freed at once.
    __device__ __forceinline__ void complete_step() {
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<0>();
        release(ring.stage);
        ring.advance();
    }

    __device__ __forceinline__ void tile_step(Sum& sum, ScaleOut& keep) {
        fence_registers(sum);
        cute::warpgroup_arrive();
        multiply_boxes<Major::K, kWeightMajor, 0, 128>(box(warpgroup), box(kWeightBox), sum, keep);
        commit_step();
        fence_registers(sum);
    }

    template <int size>
    __device__ __forceinline__ void finish(float (&sum)[size]) {
        cute::warpgroup_wait<0>();
        fence_registers(sum);
        if (held >= 0) release(held);
        held = -1;
    }

    // Zeroes, in a box that is this warpgroup's, the row of this thread where it is outside of the
    // segment, and the elements that dropout drops. Set to zero, never multiplied: what is masked may be NaN. The box
    // holds `feature` and the 63 behind it. masked() ends the masking of a stage.
    __device__ __forceinline__ void mask_box(unsigned char* box, bool inside, std::uint32_t row_bits,
                                             std::int32_t threshold, int feature) {
        // Opaque, or the compiler would hash all features before the loop over steps and spill them.
        asm volatile("" : "+r"(feature));
        const int row = thread / 2;
        const bool drops = threshold != std::numeric_limits<std::int32_t>::min();
        if (!inside || drops) {
#pragma unroll 1
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

    __device__ __forceinline__ void masked() {
        fence_async_shared();
        warpgroup_barrier(warpgroup);
    }

    // The low-rank part of dX goes through the mask of the forward pass.
    __device__ __forceinline__ void drop_low_rank(const Item& item, Sum& sum) {
        std::uint32_t row_bits[2] = {};
        std::int32_t threshold[2];
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int token = item.row + warpgroup * 64 + epilogue.accumulator_row() + half * 8;
            const bool real = token < arguments.tokens;
            threshold[half] = real ? arguments.thresholds[token] : std::numeric_limits<std::int32_t>::min();
            factor[half] = real ? arguments.keep_factors[token] : 1.0f;
            if (real) row_bits[half] = dropout_row(arguments.row_keys[token], arguments.modules[0].module);
        }
        const int first_feature = item.column + epilogue.accumulator_column();
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

    // All of a warpgroup have seen the stage before it is given back: else a warp that lags would find it filled again.
    __device__ __forceinline__ void skip_step() {
        await_full();
        warpgroup_barrier(warpgroup);
        release(ring.stage);
        ring.advance();
    }

    // Where the peer of the cluster has more extra steps, this block idles through them; first it gives back the stage
    // that it holds, or both would wait for it once they have gone round the ring.
    __device__ __forceinline__ void extra_steps(const Item& item, Sum& sum, ScaleOut& keep) {
#pragma unroll 1
        for (int m = 0; m < (kBackward ? arguments.module_count : 1); ++m) {
#pragma unroll 1
            for (int index = 0; index < item.extra_count; ++index) {
                await_full();
                tile_step(sum, keep);
            }
            if (item.extra_count == item.extra_steps) continue;
            finish(sum);
#pragma unroll 1
            for (int index = item.extra_count; index < item.extra_steps; ++index) skip_step();
        }
    }

    // With dropout, backward has the extra depth first: its product is masked before the frozen part is added.
    __device__ __forceinline__ void base(const Item& item, Sum& sum) {
        ScaleOut keep = ScaleOut::Zero;
        const bool extra_first = drops_in_backward(arguments);
        if (kBackward && extra_first) {
            if (item.extra_count == 0) {
#pragma unroll
                for (int i = 0; i < 128; ++i) sum[i] = 0.0f;
                keep = ScaleOut::One;
            }
            extra_steps(item, sum, keep);
            finish(sum);
            drop_low_rank(item, sum);
        }
#pragma unroll 1
        for (int index = 0; index < item.steps; ++index) {
            await_full();
            tile_step(sum, keep);
        }
        if (!kBackward || !extra_first) extra_steps(item, sum, keep);
        finish(sum);
    }

    // S blocks from one pass over the operand.
    template <int blocks>
    __device__ __forceinline__ void down(const Item& item, Sum& sum) {
        const bool drops = !kBackward && (item.flags & kMasked) != 0;
        std::uint32_t row_bits = 0;
        std::int32_t threshold = std::numeric_limits<std::int32_t>::min();
        if (drops) {
            const int token = item.row + warpgroup * 64 + thread / 2;
            if (token < arguments.tokens) {
                row_bits = dropout_row(arguments.row_keys[token], arguments.modules[item.parts[0].module].module);
                threshold = arguments.thresholds[token];
            }
        }
        ScaleOut keep = ScaleOut::Zero;
#pragma unroll 1
        for (int index = 0; index < item.steps; ++index) {
            await_full();
            if (drops) {
                // The operand's boxes, 64 features after 64.
                const int feature = index * down_depth(blocks);
                mask_box(shared.box(ring.stage, warpgroup), true, row_bits, threshold, feature);
                if constexpr (blocks <= 2)
                    mask_box(shared.box(ring.stage, 2 + warpgroup), true, row_bits, threshold, feature + 64);
                if constexpr (blocks == 2)
                    mask_box(shared.box(ring.stage, 4 + warpgroup), true, row_bits, threshold, feature + 128);
                masked();
            }
            if constexpr (blocks == 2) {
                const int operand_stage = ring.stage;
                const std::uint32_t operand = box(warpgroup);
                ring.advance();
                await_full();
                fence_registers(sum);
                cute::warpgroup_arrive();
#pragma unroll
                for (int i = 0; i < down_depth(2) / kStepDepth; ++i)
                    multiply_boxes<Major::K, kWeightMajor, 0, 64>(operand + i * 2 * kBoxBytes, box(2 * i), sum, keep);
                complete_step();
                release(operand_stage);
            } else {
                fence_registers(sum);
                cute::warpgroup_arrive();
                multiply_boxes<Major::K, kWeightMajor, 0, 32 * blocks>(box(warpgroup), box(pool_box(blocks)), sum,
                                                                       keep);
                if constexpr (blocks == 1)
                    multiply_boxes<Major::K, kWeightMajor, 0, 32>(box(2 + warpgroup), box(pool_box(1) + 1), sum, keep);
                blocks == 1 ? complete_step() : commit_step();
            }
            fence_registers(sum);
        }
        finish(sum);
    }

    template <int size>
    __device__ __forceinline__ static bool all_finite(const float (&sum)[size]) {
        float poison = 0.0f;  // NaN as soon as anything is not finite
#pragma unroll
        for (int i = 0; i < size; ++i) poison = fmaf(sum[i], 0.0f, poison);
        return poison == 0.0f;
    }

    // Makes the gradients of adapters that share an S block each from its own tokens alone: a neighbour's row that is
    // not finite was multiplied by zeros. The same products in the same order, so that nobody else's sums change by a
    // bit, but one box of each operand at a time, in the staging area: for ticks in which an adapter breaks.
    __device__ __forceinline__ void make_apart(const ItemSlot& slot, int first_feature) {
        unsigned char* const rows = epilogue.staging();
        unsigned char* const columns = rows + kBoxBytes;
        static_assert(2 * kBoxBytes <= kStagingBytes);
        const Item& item = slot.item;
        const bool of_a = item.kind == Kind::kGradA;
        const ModuleArguments& module = arguments.modules[item.parts[0].module];
        const auto* const row_data = static_cast<const Element*>(of_a ? arguments.input_data : module.row_data);
        const auto* const block_data = static_cast<const Element*>(of_a ? module.block_data : module.saved_data);
        const int features = of_a ? arguments.in_features : module.out_features;
        const std::int32_t threshold = of_a ? item.threshold : std::numeric_limits<std::int32_t>::min();
        const bool drops = threshold != std::numeric_limits<std::int32_t>::min();
        float own[32] = {};
#pragma unroll 1
        for (int index = 0; index < 2 * item.part_count; ++index) {
            const Part& part = item.parts[index / 2];
            const int feature = first_feature + index % 2 * 64;
            ScaleOut keep = ScaleOut::Zero;
#pragma unroll 1
            for (int first = part.start / 64 * 64; first < part.stop; first += 64) {
                const int token = first + thread / 2;
                const bool inside = token >= part.start && token < part.stop;
                const auto* const row = row_data + static_cast<std::int64_t>(token) * features + feature;
                const auto* const block =
                    block_data + static_cast<std::int64_t>(part.s_row + token - item.row) * kStepDepth;
                epilogue.await_staging();
#pragma unroll 1
                for (int i = 0; i < 4; ++i) {
                    const int piece = thread % 2 * 4 + i;
                    const int at = thread / 2 * 128 + (piece ^ (thread / 2 & 7)) * 16;
                    const bool real = inside && feature + piece * 8 < features;
                    *reinterpret_cast<uint4*>(rows + at) =
                        real ? __ldcg(reinterpret_cast<const uint4*>(row) + piece) : uint4{0, 0, 0, 0};
                    *reinterpret_cast<uint4*>(columns + at) = __ldcg(reinterpret_cast<const uint4*>(block) + piece);
                }
                if (drops && inside)
                    mask_box(rows, inside, dropout_row(arguments.row_keys[token], module.module), threshold, feature);
                masked();
                fence_registers(own);
                cute::warpgroup_arrive();
                multiply_boxes<Major::MN, Major::MN, 0, 32>(cute::cast_smem_ptr_to_uint(rows),
                                                            cute::cast_smem_ptr_to_uint(columns), own, keep);
                cute::warpgroup_commit_batch();
                cute::warpgroup_wait<0>();
                fence_registers(own);
            }
            epilogue.turn(item, 0, own);
            epilogue.add_gradients(slot, index / 2, index / 2 + 1, feature);
        }
    }

    template <int blocks>
    __device__ __forceinline__ void gradient(const ItemSlot& slot, Sum& sum) {
        constexpr int kOwnBoxes = gradient_boxes(blocks) / 2;
        const Item& item = slot.item;
        const std::int32_t threshold =
            item.kind == Kind::kGradA ? item.threshold : std::numeric_limits<std::int32_t>::min();
        const bool drops = threshold != std::numeric_limits<std::int32_t>::min();
        const int feature = item.column + warpgroup * kOwnBoxes * 64;
        [[maybe_unused]] float first[32] = {};
        [[maybe_unused]] float second[32] = {};
        ScaleOut keep = ScaleOut::Zero;
#pragma unroll 1
        for (int index = 0; index < item.steps; ++index) {
            const int token = item.row + index * 64;
            await_full();
            if (drops || token < item.start || token + 64 > item.stop) {
                const int own_token = token + thread / 2;
                const bool inside = own_token >= item.start && own_token < item.stop;
                const std::uint32_t row_bits =
                    drops && inside
                        ? dropout_row(arguments.row_keys[own_token], arguments.modules[item.parts[0].module].module)
                        : 0;
#pragma unroll
                for (int own = 0; own < kOwnBoxes; ++own)
                    mask_box(shared.box(ring.stage, warpgroup * kOwnBoxes + own), inside, row_bits, threshold,
                             feature + own * 64);
                masked();
            }
            if constexpr (blocks == 1) {
                // Accumulators of their own, set to zero: two chains within the shared ones make ptxas wait for each.
                fence_registers(first);
                fence_registers(second);
                cute::warpgroup_arrive();
                ScaleOut keep_second = keep;
                multiply_boxes<Major::MN, Major::MN, 0, 32>(box(2 * warpgroup), box(4), first, keep);
                multiply_boxes<Major::MN, Major::MN, 0, 32>(box(2 * warpgroup + 1), box(4), second, keep_second);
                complete_step();
                fence_registers(first);
                fence_registers(second);
            } else {
                fence_registers(sum);
                cute::warpgroup_arrive();
                multiply_boxes<Major::MN, Major::MN, 0, 32 * blocks>(box(warpgroup), box(2), sum, keep);
                complete_step();
                fence_registers(sum);
            }
        }
        if constexpr (blocks == 1) {
            finish(first);
            fence_registers(second);
            if (item.part_count > 1 && warpgroup_any(warpgroup, !all_finite(first) || !all_finite(second))) {
                make_apart(slot, feature);
            } else {
                epilogue.turn(item, 0, first);
                epilogue.add_gradients(slot, 0, item.part_count, feature);
                epilogue.turn(item, 0, second);
                epilogue.add_gradients(slot, 0, item.part_count, feature + 64);
            }
            // Or else the shared ones would stay alive through all of this, and others be spilled. (Without the wait
            // ptxas takes them for accumulators in flight, and then waits for each wgmma of the kernel.)
            cute::warpgroup_wait<0>();
            fence_registers(sum);
#pragma unroll
            for (float& value : sum) value = 0.0f;
        } else {
            finish(sum);
        }
    }

    // Of S blocks that were multiplied together.
    __device__ __forceinline__ void add_gradients(const ItemSlot& slot, const Sum& sum) {
        const int feature = slot.item.column + warpgroup * 64;
#pragma unroll
        for (int part = 0; part < kMaxParts; ++part)
            if (part < slot.item.part_count && slot.gradients[part] != nullptr) {
                epilogue.turn(slot.item, part * 32, sum);
                epilogue.add_gradients(slot, part, part + 1, feature);
            }
    }

    __device__ __forceinline__ void work(const ItemSlot& slot, Sum& sum) {
        const Item& item = slot.item;
        if (item.kind == Kind::kBase) {
            base(item, sum);
            if constexpr (!kBackward) {
                const auto* bias = static_cast<const Element*>(arguments.modules[item.module].bias);
                if (bias != nullptr) epilogue.add_bias(item, bias, sum);
            }
            epilogue.store_output(item, sum);
        } else if (item.kind == Kind::kDown) {
            const std::uint32_t bad = epilogue.bad_owners(item);
            if (item.block_count == 1) down<1>(item, sum);
            if (item.block_count == 2) down<2>(item, sum);
            if (item.block_count == 3) down<3>(item, sum);
            if (item.block_count == 4) down<4>(item, sum);
            epilogue.write_blocks(item, bad, sum);
        } else if (kBackward && adds_anything(slot)) {
            if (item.block_count == 1) gradient<1>(slot, sum);
            if (item.block_count == 2) gradient<2>(slot, sum);
            if (item.block_count == 3) gradient<3>(slot, sum);
            if (item.block_count == 4) gradient<4>(slot, sum);
            if (item.block_count > 1) add_gradients(slot, sum);
        }
    }
};

template <typename Element, bool kBackward>
__device__ void consume(const LoraGemmArguments& arguments, const SharedView& shared, int warpgroup) {
    Consumer<Element, kBackward> consumer{arguments, shared, warpgroup, static_cast<int>(threadIdx.x % 128)};
    Ring<kItemSlots> items{};
    Sum sum;
#pragma unroll 1
    for (;;) {
        EmptyBarrier::wait(&shared.control->item_full[items.stage], items.phase);
        const ItemSlot& slot = shared.control->slots[items.stage];
        if (slot.item.kind == Kind::kEnd) break;
        consumer.work(slot, sum);
        __syncwarp();
        if (threadIdx.x % 32 == 0) EmptyBarrier::arrive(&shared.control->item_empty[items.stage]);
        items.advance();
    }
    cute::tma_store_wait<0>();
}

}  // namespace alto::cuda
