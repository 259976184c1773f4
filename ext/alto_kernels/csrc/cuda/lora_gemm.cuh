// The persistent kernel behind lora_gemm.hpp: one TMA producer warp and two wgmma warpgroups a block, two blocks a
// cluster that share the weight tile by multicast. Its items are of several kinds (work.hpp): the low-rank products
// ride along in the same pipeline as the frozen product, and the output is written once.
// docs/design/030-kernels-one-persistent-launch.md says why.
#pragma once

#include <limits>
#include <type_traits>

#include "../dropout.hpp"
#include "hopper.cuh"
#include "lora_gemm.hpp"

namespace alto::cuda {

constexpr int kStages = 4;
// A stage has six boxes of 64 x 64. Boxes by kind of item, S its S blocks:
//   base              0-1 128 tokens of the operand, 2-5 256 features of the weight
//   down, S = 1       0-1 128 tokens of the operand, 2-3 their next 64 features, 4-5 the pool's columns for each
//   down, S = 2       0-5 128 tokens of the operand, 64 features after 64; in the next stage 0-5 the two blocks' pool
//                     columns for each of these: a step is two stages, both full, for it costs the same half empty
//   down, S > 2       0-1 128 tokens of the operand, 2-... each block's pool columns
//   gradients, S = 1  0-3 64 tokens by 256 features, 4     the S block
//   gradients, S > 1  0-1 64 tokens by 128 features, 2-... each S block
constexpr int kStageBytes = 6 * kBoxBytes;
constexpr int kWeightBox = 2;
constexpr int kThreads = 384;
constexpr int kConsumerWarpgroups = 2;

// A warpgroup's staging area holds two buffers for each of its warps, 16 rows of 128 bytes, or 64 x 64 of a gradient in
// fp32, whose rows are padded there against bank conflicts.
constexpr int kWarpBufferBytes = kWarpRows * 128;
constexpr int kGradientRow = 68;
constexpr int kStagingBytes = 64 * kGradientRow * 4;
static_assert(kStagingBytes % 1024 == 0 && kStagingBytes >= 4 * 2 * kWarpBufferBytes);

constexpr int kItemSlots = 4;

__host__ __device__ constexpr int pool_box(int blocks) { return blocks == 1 ? 4 : 2; }        // where they are not two
__host__ __device__ constexpr int gradient_boxes(int blocks) { return blocks == 1 ? 4 : 2; }  // of 64 features

// Whether the low-rank part of dX is masked, and thus made before the frozen part. In forward it does not matter.
__device__ __forceinline__ bool drops_in_backward(const LoraGemmArguments& arguments) {
    return arguments.row_keys != nullptr;
}

// An item on its way from the producer to the consumers, who read it where it lies and not into registers.
struct ItemSlot {
    Item item;
    // What the parts of a gradient item go to; null where the adapter does not adapt the module.
    void* gradients[kMaxParts];
};

// Whether any part of a gradient item has somewhere to go.
__device__ __forceinline__ bool adds_anything(const ItemSlot& slot) {
    bool found = false;
    for (int part = 0; part < slot.item.part_count; ++part) found |= slot.gradients[part] != nullptr;
    return found;
}

struct Control {
    ItemSlot slots[kItemSlots];
    std::uint64_t full[kStages];
    std::uint64_t empty[kStages];
    std::uint64_t item_full[kItemSlots];
    std::uint64_t item_empty[kItemSlots];
};
constexpr int kSharedBytes =
    kStages * kStageBytes + kConsumerWarpgroups * kStagingBytes + static_cast<int>(sizeof(Control));
static_assert(kSharedBytes <= 227 * 1024);

using FullBarrier = cutlass::arch::ClusterTransactionBarrier;
using EmptyBarrier = cutlass::arch::ClusterBarrier;

// Where in a ring of stages a thread is.
template <int length>
struct Ring {
    int stage = 0;
    std::uint32_t phase = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == length) {
            stage = 0;
            phase ^= 1;
        }
    }
};

struct SharedView {
    unsigned char* stages;
    unsigned char* staging;
    Control* control;
    __device__ __forceinline__ unsigned char* box(int stage, int index) const {
        return stages + stage * kStageBytes + index * static_cast<int>(kBoxBytes);
    }
};

}  // namespace alto::cuda

#include "lora_gemm_consumer.cuh"
#include "lora_gemm_producer.cuh"

namespace alto::cuda {

template <Format format, bool kBackward>
__global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kThreads, 1)
    lora_gemm_kernel(const __grid_constant__ LoraGemmArguments arguments) {
    using Element = std::conditional_t<format == Format::kFloat16, __half, __nv_bfloat16>;
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    unsigned char* const staging = shared_memory + kStages * kStageBytes;
    const SharedView shared{shared_memory, staging,
                            reinterpret_cast<Control*>(staging + kConsumerWarpgroups * kStagingBytes)};
    if (threadIdx.x / 32 == 2 * 4) prefetch_maps<kBackward>(arguments);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            FullBarrier::init(&shared.control->full[stage], 1);
            EmptyBarrier::init(&shared.control->empty[stage], kConsumerWarpgroups * kClusterSize);
        }
        for (int slot = 0; slot < kItemSlots; ++slot) {
            EmptyBarrier::init(&shared.control->item_full[slot], 1);
            EmptyBarrier::init(&shared.control->item_empty[slot], kConsumerWarps);
        }
        cutlass::arch::fence_barrier_init();
    }
    cute::cluster_arrive_relaxed();
    cute::cluster_wait();
    __syncthreads();

    const int block = static_cast<int>(cute::block_rank_in_cluster());
    const int cluster = blockIdx.x / kClusterSize;
    const int warpgroup = threadIdx.x / 128;
    if (warpgroup == 2) {
        cutlass::arch::warpgroup_reg_dealloc<56>();
        if (threadIdx.x == 2 * 128)
            produce<kBackward>(arguments, shared, arguments.item_offsets[cluster], arguments.item_offsets[cluster + 1],
                               block);
    } else {
        cutlass::arch::warpgroup_reg_alloc<224>();
        consume<Element, kBackward>(arguments, shared, warpgroup);
    }

    // No block leaves while its peer may still signal it; the last of all clears the counters for the next launch.
    cute::cluster_arrive();
    cute::cluster_wait();
    if (threadIdx.x == 0) {
        __threadfence();
        if (atomicAdd(arguments.ready + arguments.tiles + 1, 1) == static_cast<int>(gridDim.x) - 1)
            for (int i = 0; i < arguments.tiles + 2; ++i) arguments.ready[i] = 0;
    }
}

template <Format format, bool backward>
cudaError_t launch(const LoraGemmArguments& arguments, int clusters, cudaStream_t stream) {
    const cudaError_t status = cudaFuncSetAttribute(lora_gemm_kernel<format, backward>,
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (status != cudaSuccess) return status;
    lora_gemm_kernel<format, backward><<<clusters * kClusterSize, kThreads, kSharedBytes, stream>>>(arguments);
    return cudaGetLastError();
}

template <Format format, bool backward>
cudaError_t resident_clusters(int* clusters) {
    cudaError_t status = cudaFuncSetAttribute(lora_gemm_kernel<format, backward>,
                                              cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (status != cudaSuccess) return status;
    int device = 0;
    int processors = 0;
    status = cudaGetDevice(&device);
    if (status != cudaSuccess) return status;
    status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (status != cudaSuccess) return status;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(processors / kClusterSize * kClusterSize));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kSharedBytes;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {kClusterSize, 1, 1};
    config.attrs = &cluster;
    config.numAttrs = 1;
    return cudaOccupancyMaxActiveClusters(clusters, lora_gemm_kernel<format, backward>, &config);
}

}  // namespace alto::cuda
