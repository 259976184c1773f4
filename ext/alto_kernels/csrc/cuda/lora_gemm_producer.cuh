// The producer: one thread that fills the ring of stages by TMA. Included by lora_gemm.cuh.
#pragma once

namespace alto::cuda {

template <bool kBackward>
struct Producer {
  const LoraGemmArguments& arguments;
  const SharedView& shared;
  int block;
  Ring ring{};

  // Waits until both blocks' consumers are done with the stage, then announces `bytes`; returns the barrier to fill.
  __device__ __forceinline__ std::uint64_t* open(std::uint32_t bytes) {
    EmptyBarrier::wait(&shared.barriers->empty[ring.stage], ring.phase ^ 1);
    std::uint64_t* barrier = &shared.barriers->full[ring.stage];
    if (bytes != 0) {
      FullBarrier::arrive_and_expect_tx(barrier, bytes);
    } else {
      FullBarrier::arrive(barrier);
    }
    return barrier;
  }

  // 128 rows of a token matrix, 64 columns.
  __device__ __forceinline__ void load_rows(const CUtensorMap& map, std::uint64_t* barrier, int column, int row) {
    unsigned char* to = shared.operand(ring.stage);
    load_box(map, barrier, to, column, row);
    load_box(map, barrier, to + kBoxBytes, column, row + 64);
  }

  __device__ __forceinline__ void base_step(const Item& item, int step) {
    std::uint64_t* barrier = open(kStageBytes);
    const int depth = step * kStepDepth;
    load_rows(arguments.operand, barrier, depth, item.row);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int box = 2 * block + half;
      unsigned char* to = shared.weight(ring.stage) + box * kBoxBytes;
      const int feature = item.column + box * 64;
      load_box_for_both(arguments.weight, barrier, to, kBackward ? feature : depth, kBackward ? depth : feature);
    }
    ring.advance();
  }

  __device__ __forceinline__ void extra_steps(const Item& item) {
    if (item.extra_count > 0) await_blocks(arguments, item.row);
    for (int step = 0; step < item.extra_steps; ++step) {
      if (step < item.extra_count) {
        const Extra extra = arguments.extras[item.extra_begin + step];
        std::uint64_t* barrier = open(kStageBytes);
        load_rows(arguments.blocks, barrier, 0, extra.s_row);
#pragma unroll
        for (int box = 0; box < 4; ++box) {
          unsigned char* to = shared.weight(ring.stage) + box * kBoxBytes;
          const int feature = item.column + box * 64;
          load_box(arguments.up_pool, barrier, to, kBackward ? feature : extra.pool_column,
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
      std::uint64_t* barrier = open(kOperandBytes + kBoxBytes);
      const int depth = step * kStepDepth;
      load_rows(arguments.operand, barrier, depth, item.row);
      load_box(arguments.down_pool, barrier, shared.weight(ring.stage), kBackward ? item.column : depth,
               kBackward ? depth : item.column);
      ring.advance();
    }
  }

  __device__ __forceinline__ void gradient(const Item& item) {
    const bool of_a = item.kind == Kind::kGradA;
    if (of_a) {
      const Segment segment = arguments.segments[item.segment];
      for (int row = segment.start; row < segment.stop; row = (row / kTileRows + 1) * kTileRows)
        await_blocks(arguments, row);
    }
    const CUtensorMap& rows = of_a ? arguments.input : arguments.operand;
    const CUtensorMap& blocks = of_a ? arguments.blocks : arguments.saved;
    for (int step = 0; step < item.steps; ++step) {
      std::uint64_t* barrier = open(kOperandBytes + kBoxBytes);
      const int token = item.row + step * 64;
      unsigned char* to = shared.operand(ring.stage);
      load_box(rows, barrier, to, item.column, token);
      load_box(rows, barrier, to + kBoxBytes, item.column + 64, token);
      load_box(blocks, barrier, shared.weight(ring.stage), 0, item.s_row + step * 64);
      ring.advance();
    }
  }
};

template <bool kBackward>
__device__ void produce(const LoraGemmArguments& arguments, const SharedView& shared, int first, int last, int block) {
  Producer<kBackward> producer{arguments, shared, block};
  const bool extra_first = kBackward && arguments.row_keys != nullptr;
  for (int pair = first; pair < last; ++pair) {
    const Item item = load_item(arguments, pair, block);
    if (item.kind == Kind::kBase) {
      if (extra_first) producer.extra_steps(item);
      for (int step = 0; step < item.steps; ++step) producer.base_step(item, step);
      if (!extra_first) producer.extra_steps(item);
    } else if (item.kind == Kind::kDown) {
      producer.down(item);
    } else if (kBackward && wants_gradient(arguments, item)) {
      producer.gradient(item);
    }
  }
}

}  // namespace alto::cuda
