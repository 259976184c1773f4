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

    // Hands an item to the consumers; returns where it lies, which stays as it is until the next call but three.
    __device__ __forceinline__ const ItemSlot& hand_over(const Item& item) {
        float* gradient = nullptr;
        if (item.kind == Kind::kGradA) gradient = arguments.slots[item.slot].grad_a;
        if (item.kind == Kind::kGradB) gradient = arguments.slots[item.slot].grad_b;
        EmptyBarrier::wait(&shared.control->item_empty[items.stage], items.phase ^ 1);
        ItemSlot& slot = shared.control->slots[items.stage];
        slot.item = item;
        slot.gradient = gradient;
        EmptyBarrier::arrive(&shared.control->item_full[items.stage]);
        items.advance();
        return slot;
    }

    // Waits until both blocks' consumers are done with the stage, then announces `bytes`; returns the barrier to fill.
    __device__ __forceinline__ std::uint64_t* open(std::uint32_t bytes) {
        EmptyBarrier::wait(&shared.control->empty[ring.stage], ring.phase ^ 1);
        std::uint64_t* barrier = &shared.control->full[ring.stage];
        if (bytes != 0) {
            FullBarrier::arrive_and_expect_tx(barrier, bytes);
        } else {
            FullBarrier::arrive(barrier);
        }
        return barrier;
    }

    __device__ __forceinline__ void load(const CUtensorMap& map, std::uint64_t* barrier, int box, int column, int row) {
        load_box(map, barrier, shared.box(ring.stage, box), column, row);
    }

    // Returns once the S blocks of the tile at token `row` (of all tiles: row < 0) are written.
    __device__ __forceinline__ void await_blocks(int row) {
        if (all_ready) return;
        const int total = arguments.tiles;
        const int tile = row < 0 ? total : row / kTileRows;
        if (tile < total || row < 0) {
            while (load_acquire(arguments.ready + tile) < arguments.ready_target[tile]) __nanosleep(64);
        }
        all_ready = row < 0 || load_acquire(arguments.ready + total) >= arguments.ready_target[total];
        fence_async_proxy();
    }

    __device__ __forceinline__ void base_step(const Item& item, int step) {
        std::uint64_t* barrier = open(kStageBytes);
        const int depth = step * kStepDepth;
        load(arguments.operand, barrier, 0, depth, item.row);
        load(arguments.operand, barrier, 1, depth, item.row + 64);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int box = 2 * block + half;
            const int feature = item.column + box * 64;
            load_box_for_both(arguments.weight, barrier, shared.box(ring.stage, kWeightBox + box),
                              kBackward ? feature : depth, kBackward ? depth : feature);
        }
        ring.advance();
    }

    __device__ __forceinline__ void extra_steps(const Item& item) {
        if (item.extra_count > 0) await_blocks(item.row);
        for (int step = 0; step < item.extra_steps; ++step) {
            if (step < item.extra_count) {
                const Extra extra = arguments.extras[item.extra_begin + step];
                std::uint64_t* barrier = open(kStageBytes);
                load(arguments.blocks, barrier, 0, 0, extra.s_row);
                load(arguments.blocks, barrier, 1, 0, extra.s_row + 64);
#pragma unroll
                for (int box = 0; box < 4; ++box) {
                    const int feature = item.column + box * 64;
                    load(arguments.up_pool, barrier, kWeightBox + box, kBackward ? feature : extra.pool_column,
                         kBackward ? extra.pool_column : feature);
                }
            } else {
                open(0);
            }
            ring.advance();
        }
    }

    __device__ __forceinline__ void down(const Item& item) {
        for (int step = 0; step < item.steps; ++step) {
            std::uint64_t* barrier = open(kStageBytes);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int depth = step * kDownDepth + half * 64;
                load(arguments.operand, barrier, 2 * half, depth, item.row);
                load(arguments.operand, barrier, 2 * half + 1, depth, item.row + 64);
                load(arguments.down_pool, barrier, kPoolBox + half, kBackward ? item.column : depth,
                     kBackward ? depth : item.column);
            }
            ring.advance();
        }
    }

    __device__ __forceinline__ void gradient(const Item& item) {
        const bool of_a = item.kind == Kind::kGradA;
        if (of_a) await_blocks(-1);
        const CUtensorMap& rows = of_a ? arguments.input : arguments.operand;
        const CUtensorMap& blocks = of_a ? arguments.blocks : arguments.saved;
        for (int step = 0; step < item.steps; ++step) {
            std::uint64_t* barrier = open(5 * kBoxBytes);
            const int token = item.row + step * 64;
#pragma unroll
            for (int box = 0; box < 4; ++box) load(rows, barrier, box, item.column + box * 64, token);
            load(blocks, barrier, kSavedBox, 0, item.s_row + step * 64);
            ring.advance();
        }
    }
};

template <bool kBackward>
__device__ void produce(const LoraGemmArguments& arguments, const SharedView& shared, int first, int last, int block) {
    Producer<kBackward> producer{arguments, shared, block};
    const bool extra_first = kBackward && arguments.row_keys != nullptr;
    // The next item is read ahead: its latency passes behind the current one.
    Item next{};
    next.kind = Kind::kEnd;
    if (first < last) next = load_item(arguments, first, block);
    for (int pair = first; pair < last; ++pair) {
        const ItemSlot& slot = producer.hand_over(next);
        const Item& item = slot.item;
        next.kind = Kind::kEnd;
        if (pair + 1 < last) next = load_item(arguments, pair + 1, block);
        if (item.kind == Kind::kBase) {
            if (extra_first) producer.extra_steps(item);
            for (int step = 0; step < item.steps; ++step) producer.base_step(item, step);
            if (!extra_first) producer.extra_steps(item);
        } else if (item.kind == Kind::kDown) {
            producer.down(item);
        } else if (kBackward && slot.gradient != nullptr) {
            producer.gradient(item);
        }
    }
    producer.hand_over(next);
}

}  // namespace alto::cuda
