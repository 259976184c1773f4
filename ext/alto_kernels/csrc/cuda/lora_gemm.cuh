// The persistent kernel behind lora_gemm.hpp: one TMA producer warp and two wgmma warpgroups a block, two blocks a
// cluster that share the weight tile by multicast. Its items are of several kinds (work.hpp): the low-rank products ride
// along in the same pipeline as the frozen product, so that their traffic hides behind its arithmetic and the output is
// written once. docs/design/kernels-one-persistent-launch.md says why.
#pragma once

#include <limits>

#include "../dropout.hpp"
#include "hopper.cuh"
#include "lora_gemm.hpp"

namespace alto::cuda {

constexpr int kStages = 4;
constexpr int kOperandBytes = 2 * kBoxBytes;  // 128 tokens, or 128 features, by 64
constexpr int kWeightBytes = 4 * kBoxBytes;   // 256 features by 64
constexpr int kStageBytes = kOperandBytes + kWeightBytes;
constexpr int kStagingBytes = 4 * kBoxBytes;  // two boxes for each consumer warpgroup
constexpr int kThreads = 384;

struct Barriers {
  std::uint64_t full[kStages];
  std::uint64_t empty[kStages];
};
constexpr int kSharedBytes = kStages * kStageBytes + kStagingBytes + static_cast<int>(sizeof(Barriers)) + 1024;

using FullBarrier = cutlass::arch::ClusterTransactionBarrier;
using EmptyBarrier = cutlass::arch::ClusterBarrier;

// Where in the ring of stages a warp is.
struct Ring {
  int stage = 0;
  std::uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

struct SharedView {
  unsigned char* stages;
  unsigned char* staging;
  Barriers* barriers;
  __device__ __forceinline__ unsigned char* operand(int stage) const { return stages + stage * kStageBytes; }
  __device__ __forceinline__ unsigned char* weight(int stage) const { return operand(stage) + kOperandBytes; }
};

__device__ __forceinline__ Item load_item(const LoraGemmArguments& arguments, int pair, int block) {
  const int4* from = reinterpret_cast<const int4*>(arguments.items + pair * kClusterSize + block);
  union {
    int4 words[3];
    Item item;
  } result;
#pragma unroll
  for (int i = 0; i < 3; ++i) result.words[i] = __ldg(from + i);
  return result.item;
}

// False where the adapter does not adapt this module: both blocks skip the item.
__device__ __forceinline__ bool wants_gradient(const LoraGemmArguments& arguments, const Item& item) {
  return arguments.slots[arguments.segments[item.segment].slot].grad_a != nullptr;
}

// Returns once the S blocks of the tile at token `row` are written.
__device__ __forceinline__ void await_blocks(const LoraGemmArguments& arguments, int row) {
  const int tile = row / kTileRows;
  if (tile >= arguments.tiles) return;
  while (load_acquire(arguments.ready + tile) < arguments.ready_target[tile]) __nanosleep(100);
  fence_async_proxy();
}

}  // namespace alto::cuda

#include "lora_gemm_consumer.cuh"
#include "lora_gemm_producer.cuh"

namespace alto::cuda {

template <bool kBackward>
__global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    lora_gemm_kernel(const __grid_constant__ LoraGemmArguments arguments) {
  extern __shared__ unsigned char shared_memory[];
  unsigned char* aligned = shared_memory + (1024 - (cute::cast_smem_ptr_to_uint(shared_memory) & 1023)) % 1024;
  const SharedView shared{aligned, aligned + kStages * kStageBytes,
                          reinterpret_cast<Barriers*>(aligned + kStages * kStageBytes + kStagingBytes)};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      FullBarrier::init(&shared.barriers->full[stage], 1);
      EmptyBarrier::init(&shared.barriers->empty[stage], 2 * kClusterSize);
    }
    cutlass::arch::fence_barrier_init();
  }
  cute::cluster_arrive_relaxed();
  cute::cluster_wait();
  __syncthreads();

  const int block = static_cast<int>(cute::block_rank_in_cluster());
  const int cluster = blockIdx.x / kClusterSize;
  const int first = arguments.item_offsets[cluster];
  const int last = arguments.item_offsets[cluster + 1];
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 2) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (threadIdx.x == 2 * 128) produce<kBackward>(arguments, shared, first, last, block);
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    consume<kBackward>(arguments, shared, first, last, block, warpgroup);
  }

  // No block leaves while its peer may still signal it; the last of all clears the counters for the next launch.
  cute::cluster_arrive();
  cute::cluster_wait();
  if (threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(arguments.ready + arguments.tiles, 1) == static_cast<int>(gridDim.x) - 1)
      for (int tile = 0; tile <= arguments.tiles; ++tile) arguments.ready[tile] = 0;
  }
}

template <bool kBackward>
cudaError_t launch(const LoraGemmArguments& arguments, int clusters, cudaStream_t stream) {
  const cudaError_t status =
      cudaFuncSetAttribute(lora_gemm_kernel<kBackward>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (status != cudaSuccess) return status;
  lora_gemm_kernel<kBackward><<<clusters * kClusterSize, kThreads, kSharedBytes, stream>>>(arguments);
  return cudaGetLastError();
}

}  // namespace alto::cuda
