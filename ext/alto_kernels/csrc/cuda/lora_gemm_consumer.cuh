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
  Ring ring{};
  int held = -1;  // the stage that wgmma may still be reading

  __device__ __forceinline__ std::uint32_t rows_address() const {
    return cute::cast_smem_ptr_to_uint(shared.operand(ring.stage)) + static_cast<std::uint32_t>(warpgroup) * kBoxBytes;
  }
  __device__ __forceinline__ std::uint32_t weight_address() const {
    return cute::cast_smem_ptr_to_uint(shared.weight(ring.stage));
  }
  // The first of the two rows (the other is 8 below) of the accumulator that this thread holds, in [0, 64).
  __device__ __forceinline__ int accumulator_row() const { return thread / 32 * 16 + thread % 32 / 4; }
  __device__ __forceinline__ int accumulator_column() const { return thread % 4 * 2; }

  __device__ __forceinline__ void await_full() { FullBarrier::wait(&shared.barriers->full[ring.stage], ring.phase); }

  // Gives a stage back to the producers of both blocks.
  __device__ __forceinline__ void release(int stage) {
    if (thread < kClusterSize)
      EmptyBarrier::arrive(&shared.barriers->empty[stage], static_cast<std::uint32_t>(thread), true);
  }

  // sum += operand x weight over one stage, 16 deep at a time; leaves it in flight and frees the stage before.
  template <Major major_rows, Major major_weight, int count>
  __device__ __forceinline__ void step(float (&sum)[count], ScaleOut& keep) {
    fence_registers(sum);
    cute::warpgroup_arrive();
    const std::uint32_t rows = rows_address();
    const std::uint32_t weight = weight_address();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      multiply<major_rows, major_weight>(operand<major_rows>(rows, i), operand<major_weight>(weight, i), sum, keep);
      keep = ScaleOut::One;
    }
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<1>();
    fence_registers(sum);
    if (held >= 0) release(held);
    held = ring.stage;
    ring.advance();
  }

  template <int count>
  __device__ __forceinline__ void finish(float (&sum)[count]) {
    cute::warpgroup_wait<0>();
    fence_registers(sum);
    if (held >= 0) release(held);
    held = -1;
  }

  // Zeroes, in this warpgroup's box of the stage, the row of this thread where it is outside of the segment, and the
  // elements that dropout drops. Set to zero, never multiplied: what is masked may be NaN.
  __device__ __forceinline__ void mask_rows(bool inside, std::uint32_t row_bits, std::int32_t threshold, int feature) {
    unsigned char* box = shared.operand(ring.stage) + warpgroup * kBoxBytes;
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
    fence_async_shared();
    warpgroup_barrier(warpgroup);
  }

  __device__ __forceinline__ void extra_steps(const Item& item, float (&sum)[128], ScaleOut& keep) {
#pragma unroll 1
    for (int index = 0; index < item.extra_count; ++index) {
      await_full();
      step<Major::K, kWeightMajor>(sum, keep);
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
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = item.row + warpgroup * 64 + accumulator_row() + half * 8;
      if (token >= arguments.tokens) continue;
      const std::int32_t threshold = arguments.thresholds[token];
      if (threshold == std::numeric_limits<std::int32_t>::min()) continue;
      const std::uint32_t row_bits = dropout_row(arguments.row_keys[token], arguments.module);
      const float factor = arguments.keep_factors[token];
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        const int index = i / 2 * 4 + half * 2 + i % 2;
        const auto feature = static_cast<std::uint32_t>(item.column + i / 2 * 8 + accumulator_column() + i % 2);
        sum[index] = dropout_keeps(row_bits, feature, threshold) ? sum[index] * factor : 0.0f;
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
      const std::uint32_t row_address = cute::cast_smem_ptr_to_uint(staging) + static_cast<std::uint32_t>(row) * 128;
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
        cute::SM90_TMA_STORE_2D::copy(&arguments.output, staging, column, item.row + warpgroup * 64);
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
      step<Major::K, kWeightMajor>(sum, keep);
    }
    if (!extra_first) {
      extra_steps(item, sum, keep);
    } else {
      finish(sum);
    }
    store_output(item, sum);
  }

  __device__ __forceinline__ void down(const Item& item) {
    const Segment segment = arguments.segments[item.segment];
    const int own_token = item.row + warpgroup * 64 + thread / 2;
    const bool drops = !kBackward && segment.threshold != std::numeric_limits<std::int32_t>::min();
    const std::uint32_t row_bits =
        drops && own_token < arguments.tokens ? dropout_row(arguments.row_keys[own_token], arguments.module) : 0;
    float sum[32];
    ScaleOut keep = ScaleOut::Zero;
#pragma unroll 1
    for (int index = 0; index < item.steps; ++index) {
      await_full();
      if (drops) mask_rows(true, row_bits, segment.threshold, index * kStepDepth);
      step<Major::K, kWeightMajor>(sum, keep);
    }
    finish(sum);
    if (item.valid == 0) return;

    const float factor = segment.scale * (kBackward ? 1.0f : segment.keep_factor);
    const bool bad = arguments.slot_is_bad[segment.slot] != 0;
    const int columns = segment.rank - item.chunk;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warpgroup * 64 + accumulator_row() + half * 8;
      const int token = item.row + row;
      const bool inside = token >= segment.start && token < segment.stop;
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
    if (thread == 0) add_release(arguments.ready + item.row / kTileRows, 1);
  }

  // Calls visit(i, address) for every element i of this thread's accumulator that lies within the gradient.
  template <typename Visit>
  __device__ __forceinline__ void for_each_gradient(const Item& item, const Segment& segment,
                                                    const SlotPointers& pointers, Visit visit) {
    const bool of_a = item.kind == Kind::kGradA;
    const int features = of_a ? arguments.in_features : arguments.out_features;
    float* gradient = of_a ? pointers.grad_a : pointers.grad_b;
    const std::int64_t feature_stride = of_a ? 1 : segment.rank;
    const std::int64_t rank_stride = of_a ? features : 1;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int feature = item.column + warpgroup * 64 + accumulator_row() + i / 2 % 2 * 8;
      const int rank = item.chunk + i / 4 * 8 + accumulator_column() + i % 2;
      if (feature < features && rank < segment.rank) visit(i, gradient + feature * feature_stride + rank * rank_stride);
    }
  }

  // Has the gradient so far brought into the L2 cache while the product runs: a line of 128 bytes for each thread.
  __device__ __forceinline__ void prefetch_gradient(const Item& item, const Segment& segment,
                                                    const SlotPointers& pointers) {
    const bool of_a = item.kind == Kind::kGradA;
    const int features = of_a ? arguments.in_features : arguments.out_features;
    const int feature = item.column + warpgroup * 64 + (of_a ? thread % 2 * 32 : thread / 2);
    const int rank = item.chunk + (of_a ? thread / 2 : thread % 2 * 32);
    if (feature >= features || rank >= segment.rank) return;
    prefetch_l2(of_a ? pointers.grad_a + static_cast<std::int64_t>(rank) * features + feature
                     : pointers.grad_b + static_cast<std::int64_t>(feature) * segment.rank + rank);
  }

  __device__ __forceinline__ void gradient(const Item& item) {
    const bool of_a = item.kind == Kind::kGradA;
    const Segment segment = arguments.segments[item.segment];
    const SlotPointers pointers = arguments.slots[segment.slot];
    const std::int32_t threshold = of_a ? segment.threshold : std::numeric_limits<std::int32_t>::min();
    const bool drops = threshold != std::numeric_limits<std::int32_t>::min();
    prefetch_gradient(item, segment, pointers);
    float sum[32];
    ScaleOut keep = ScaleOut::Zero;
#pragma unroll 1
    for (int index = 0; index < item.steps; ++index) {
      const int token = item.row + index * 64;
      await_full();
      if (drops || token < segment.start || token + 64 > segment.stop) {
        const int own_token = token + thread / 2;
        const bool inside = own_token >= segment.start && own_token < segment.stop;
        const std::uint32_t row_bits =
            drops && inside ? dropout_row(arguments.row_keys[own_token], arguments.module) : 0;
        mask_rows(inside, row_bits, threshold, item.column + warpgroup * 64);
      }
      step<Major::MN, Major::MN>(sum, keep);
    }
    finish(sum);

    const float factor = of_a ? segment.keep_factor : 1.0f;
    // All loads before the first store, which the compiler could not move them across.
    float before[32];
    for_each_gradient(item, segment, pointers, [&](int i, const float* at) { before[i] = __ldcg(at); });
    for_each_gradient(item, segment, pointers, [&](int i, float* at) { __stcg(at, before[i] + sum[i] * factor); });
  }
};

template <bool kBackward>
__device__ void consume(const LoraGemmArguments& arguments, const SharedView& shared, int first, int last, int block,
                        int warpgroup) {
  Consumer<kBackward> consumer{arguments, shared, warpgroup, static_cast<int>(threadIdx.x % 128)};
  const bool extra_first = kBackward && arguments.row_keys != nullptr;
#pragma unroll 1
  for (int pair = first; pair < last; ++pair) {
    const Item item = load_item(arguments, pair, block);
    if (item.kind == Kind::kBase) {
      consumer.base(item, extra_first);
    } else if (item.kind == Kind::kDown) {
      consumer.down(item);
    } else if (kBackward && wants_gradient(arguments, item)) {
      consumer.gradient(item);
    }
  }
  if (consumer.thread == 0) cute::tma_store_wait<0>();
}

}  // namespace alto::cuda
