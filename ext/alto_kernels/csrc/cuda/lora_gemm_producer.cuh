// The producer: one thread that fills the ring of stages by TMA. Included by lora_gemm.cuh.
#pragma once

namespace alto::cuda {

template <bool kBackward>
struct Producer {
    const LoraGemmArguments& arguments;
    const SharedView& shared;
    int block;
    Ring<kStages> ring{};
    Ring<kItemSlots> items{};
    bool all_ready = false;

    // Starts to copy an item to the slot that is next, or puts the end there.
    __device__ __forceinline__ void fetch(int pair, int last) {
        EmptyBarrier::wait(&shared.control->item_empty[items.stage], items.phase ^ 1);
        Item* to = &shared.control->slots[items.stage].item;
        if (pair < last) {
            const auto* from = reinterpret_cast<const int4*>(arguments.items + pair * kClusterSize + block);
#pragma unroll
            for (int i = 0; i < static_cast<int>(sizeof(Item) / sizeof(int4)); ++i)
                copy_async(reinterpret_cast<int4*>(to) + i, from + i);
        } else {
            to->kind = Kind::kEnd;
        }
    }

    // Hands the fetched item to the consumers; returns where it lies, which stays as it is until the fetch after next.
    __device__ __forceinline__ const ItemSlot& hand_over() {
        await_copies();
        ItemSlot& slot = shared.control->slots[items.stage];
        const Item& item = slot.item;
        if (kBackward && (item.kind == Kind::kGradA || item.kind == Kind::kGradB)) {
            for (int part = 0; part < item.part_count; ++part) {
                const SlotPointers* pointers = arguments.modules[item.parts[part].module].slots + item.parts[part].slot;
                slot.gradients[part] = item.kind == Kind::kGradA ? pointers->grad_a : pointers->grad_b;
            }
        }
        EmptyBarrier::arrive(&shared.control->item_full[items.stage]);
        items.advance();
        return slot;
    }

    // Waits until both blocks' consumers are done with the stage, then announces so many boxes; returns the barrier.
    __device__ __forceinline__ std::uint64_t* open(int boxes) {
        EmptyBarrier::wait(&shared.control->empty[ring.stage], ring.phase ^ 1);
        std::uint64_t* barrier = &shared.control->full[ring.stage];
        if (boxes != 0) {
            FullBarrier::arrive_and_expect_tx(barrier, static_cast<std::uint32_t>(boxes) * kBoxBytes);
        } else {
            FullBarrier::arrive(barrier);
        }
        return barrier;
    }

    __device__ __forceinline__ void load(const CUtensorMap& map, std::uint64_t* barrier, int box, int column, int row) {
        load_box(map, barrier, shared.box(ring.stage, box), column, row);
    }
    __device__ __forceinline__ void load_for_both(const CUtensorMap& map, std::uint64_t* barrier, int box, int column,
                                                  int row) {
        load_box_for_both(map, barrier, shared.box(ring.stage, box), column, row);
    }

    // Returns once the S blocks of the tile with token `row`, which must exist, are written.
    __device__ __forceinline__ void await_blocks(int row) {
        if (all_ready) return;
        const int total = arguments.tiles;
        const int tile = row / kTileRows;
        while (load_acquire(arguments.ready + tile) < arguments.ready_target[tile] * arguments.module_count)
            __nanosleep(64);
        all_ready = load_acquire(arguments.ready + total) >= arguments.ready_target[total] * arguments.module_count;
        fence_async_proxy();
    }

    // 256 features of a weight or pool for both blocks of the cluster, of which this block loads its half.
    __device__ __forceinline__ void load_weight(const CUtensorMap& map, std::uint64_t* barrier, int feature,
                                                int depth) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int box = 2 * block + half;
            const int at = feature + box * 64;
            load_for_both(map, barrier, kWeightBox + box, kBackward ? at : depth, kBackward ? depth : at);
        }
    }

    __device__ __forceinline__ void base_steps(const Item& item, const CUtensorMap& operand, const CUtensorMap& weight,
                                               int steps) {
        for (int step = 0; step < steps; ++step) {
            std::uint64_t* barrier = open(6);
            const int depth = step * kStepDepth;
            load(operand, barrier, 0, depth, item.row);
            load(operand, barrier, 1, depth, item.row + 64);
            load_weight(weight, barrier, item.column, depth);
            ring.advance();
        }
    }

    __device__ __forceinline__ void extra_steps(const Item& item, const ModuleArguments& module) {
        for (int step = 0; step < item.extra_steps; ++step) {
            if (step < item.extra_count) {
                const Extra extra = arguments.extras[item.extra_begin + step];
                std::uint64_t* barrier = open(6);
                load(module.blocks, barrier, 0, 0, extra.s_row);
                load(module.blocks, barrier, 1, 0, extra.s_row + 64);
                if (item.flags & kShared) {
                    load_weight(module.up_pool, barrier, item.column, extra.pool_column);
                } else {
#pragma unroll
                    for (int box = 0; box < 4; ++box) {
                        const int feature = item.column + box * 64;
                        load(module.up_pool, barrier, kWeightBox + box, kBackward ? feature : extra.pool_column,
                             kBackward ? extra.pool_column : feature);
                    }
                }
            } else {
                open(0);
            }
            ring.advance();
        }
    }

    __device__ __forceinline__ void all_extra_steps(const Item& item) {
        if (item.extra_count > 0) await_blocks(item.row);
        const int first = kBackward ? 0 : item.module;
        const int last = kBackward ? arguments.module_count : item.module + 1;
        for (int m = first; m < last; ++m) extra_steps(item, arguments.modules[m]);
    }

    // Forward: a tile of one module's output. Backward: of dX, whose contraction runs through all modules.
    __device__ __forceinline__ void base(const Item& item) {
        if constexpr (kBackward) {
            const bool extra_first = drops_in_backward(arguments);
            if (extra_first) all_extra_steps(item);
            for (int m = 0; m < arguments.module_count; ++m) {
                const ModuleArguments& module = arguments.modules[m];
                base_steps(item, module.rows, module.weight, (module.out_features + kStepDepth - 1) / kStepDepth);
            }
            if (!extra_first) all_extra_steps(item);
        } else {
            base_steps(item, arguments.input, arguments.modules[item.module].weight, item.steps);
            all_extra_steps(item);
        }
    }

    __device__ __forceinline__ void load_pool(const Item& item, const Part& part, std::uint64_t* barrier, int box,
                                              int depth, bool for_both) {
        const CUtensorMap& map = arguments.modules[part.module].down_pool;
        const int column = kBackward ? part.column : depth;
        const int row = kBackward ? depth : part.column;
        if (for_both) {
            load_for_both(map, barrier, box, column, row);
        } else {
            load(map, barrier, box, column, row);
        }
    }

    __device__ __forceinline__ void down(const Item& item) {
        const CUtensorMap& operand = kBackward ? arguments.modules[item.parts[0].module].rows : arguments.input;
        const int parts = item.block_count;
        if (parts == 2) return down_of_two(item, operand);
        const bool for_both = (item.flags & kShared) != 0;
        int boxes = 2;
        for (int part = 0; part < parts; ++part) boxes += item.parts[part].detail >= 0 ? 1 : 0;
        if (parts == 1) boxes *= 2;
        for (int step = 0; step < item.steps; ++step) {
            std::uint64_t* barrier = open(boxes);
            const int depth = step * down_depth(parts);
            load(operand, barrier, 0, depth, item.row);
            load(operand, barrier, 1, depth, item.row + 64);
            if (parts == 1) {
                load(operand, barrier, 2, depth + 64, item.row);
                load(operand, barrier, 3, depth + 64, item.row + 64);
                if (item.parts[0].detail >= 0) {
                    for (int half = 0; half < 2; ++half)
                        if (!for_both || half == block)
                            load_pool(item, item.parts[0], barrier, pool_box(1) + half, depth + half * 64, for_both);
                }
            } else {
                for (int part = 0; part < parts; ++part)
                    if (item.parts[part].detail >= 0 && (!for_both || ((part + step) & 1) == block))
                        load_pool(item, item.parts[part], barrier, pool_box(parts) + part, depth, for_both);
            }
            ring.advance();
        }
    }

    // Two parts: a stage of the operand, then one of the pools.
    __device__ __forceinline__ void down_of_two(const Item& item, const CUtensorMap& operand) {
        constexpr int kBoxes = down_depth(2) / kStepDepth;
        const bool for_both = (item.flags & kShared) != 0;
        const int real_parts = (item.parts[0].detail >= 0 ? 1 : 0) + (item.parts[1].detail >= 0 ? 1 : 0);
        for (int step = 0; step < item.steps; ++step) {
            const int depth = step * down_depth(2);
            std::uint64_t* barrier = open(2 * kBoxes);
            for (int i = 0; i < kBoxes; ++i) {
                load(operand, barrier, 2 * i, depth + i * kStepDepth, item.row);
                load(operand, barrier, 2 * i + 1, depth + i * kStepDepth, item.row + 64);
            }
            ring.advance();
            barrier = open(real_parts * kBoxes);
            for (int part = 0; part < 2; ++part) {
                if (item.parts[part].detail < 0 || (for_both && part != block)) continue;
                for (int i = 0; i < kBoxes; ++i)
                    load_pool(item, item.parts[part], barrier, 2 * i + part, depth + i * kStepDepth, for_both);
            }
            ring.advance();
        }
    }

    // The S blocks are the same for both blocks of the cluster, which take turns to load them.
    __device__ __forceinline__ void gradient(const Item& item) {
        const bool of_a = item.kind == Kind::kGradA;
        const CUtensorMap& rows = of_a ? arguments.input : arguments.modules[item.parts[0].module].rows;
        const int boxes = gradient_boxes(item.block_count);
        for (int step = 0; step < item.steps; ++step) {
            const int token = item.row + step * 64;
            if (of_a) await_blocks(token);
            std::uint64_t* barrier = open(boxes + item.block_count);
            for (int box = 0; box < boxes; ++box) load(rows, barrier, box, item.column + box * 64, token);
            for (int part = 0; part < item.block_count; ++part) {
                if (((part + step) & 1) != block) continue;
                const ModuleArguments& module = arguments.modules[item.parts[part].module];
                load_for_both(of_a ? module.blocks : module.saved, barrier, boxes + part, 0,
                              item.parts[part].s_row + step * 64);
            }
            ring.advance();
        }
    }
};

// Lets the maps be fetched before their first use; for a warp.
template <bool kBackward>
__device__ void prefetch_maps(const LoraGemmArguments& arguments) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const auto prefetch = [](const CUtensorMap& map) {
        asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<std::uint64_t>(&map)) : "memory");
    };
    if (lane < arguments.module_count) {
        const ModuleArguments& module = arguments.modules[lane];
        prefetch(module.rows);
        prefetch(module.weight);
        prefetch(module.down_pool);
        prefetch(module.up_pool);
        prefetch(module.blocks);
        if (kBackward) prefetch(module.saved);
    } else if (lane == kMaxModules) {
        prefetch(arguments.input);
        if (kBackward) prefetch(arguments.input_grads);
    }
}

template <bool kBackward>
__device__ void produce(const LoraGemmArguments& arguments, const SharedView& shared, int first, int last, int block) {
    Producer<kBackward> producer{arguments, shared, block};
    // The next item is fetched ahead: its latency passes behind the current one.
    producer.fetch(first, last);
    for (int pair = first; pair < last; ++pair) {
        const ItemSlot& slot = producer.hand_over();
        const Item& item = slot.item;
        producer.fetch(pair + 1, last);
        if (item.kind == Kind::kBase) {
            producer.base(item);
        } else if (item.kind == Kind::kDown) {
            producer.down(item);
        } else if (kBackward && adds_anything(slot)) {
            producer.gradient(item);
        }
    }
    producer.hand_over();
}

}  // namespace alto::cuda
