// The few Hopper instructions that the kernel needs, over CUTLASS's own wrappers.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cstdint>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

namespace alto::cuda {

using Major = cute::SM90::GMMA::Major;
using ScaleOut = cute::SM90::GMMA::ScaleOut;

// All operand tiles are boxes of 64 x 64 16-bit elements in 128-byte swizzle: 64 rows of 128 bytes.
constexpr std::uint32_t kBoxBytes = 64 * 64 * 2;

// Descriptor of an operand whose contraction index is contiguous (K-major) or whose other index is (MN-major).
// K-major: groups of 8 rows lie 1024 bytes apart. MN-major: so do groups of 8 depths; the next 64 columns are the next
// box (cute/atom/mma_traits_sm90_gmma.hpp, "canonical layouts").
template <Major major>
__device__ __forceinline__ std::uint64_t operand(std::uint32_t shared_address, int sixteen) {
    const std::uint32_t step = major == Major::K ? 32u : 2048u;
    // Masked to its 14 bits: the addresses of a cluster's second block carry its number above them.
    const std::uint64_t address = ((shared_address + static_cast<std::uint32_t>(sixteen) * step) >> 4) & 0x3FFF;
    const std::uint64_t leading = major == Major::K ? 1u : kBoxBytes >> 4;
    return address | (leading << 16) | (static_cast<std::uint64_t>(1024 >> 4) << 32) | (1ull << 62);
}

// The wgmma of 64 rows by 2 `count` columns by a depth of 16 whose accumulator has `count` registers a thread.
template <typename Element, int count, Major a, Major b>
struct Mma;
template <Major a, Major b>
struct Mma<__nv_bfloat16, 32, a, b> : cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<a, b> {};
template <Major a, Major b>
struct Mma<__nv_bfloat16, 64, a, b> : cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_SS<a, b> {};
template <Major a, Major b>
struct Mma<__nv_bfloat16, 96, a, b> : cute::SM90::GMMA::MMA_64x192x16_F32BF16BF16_SS<a, b> {};
template <Major a, Major b>
struct Mma<__nv_bfloat16, 128, a, b> : cute::SM90::GMMA::MMA_64x256x16_F32BF16BF16_SS<a, b> {};
template <Major a, Major b>
struct Mma<__half, 32, a, b> : cute::SM90::GMMA::MMA_64x64x16_F32F16F16_SS<a, b> {};
template <Major a, Major b>
struct Mma<__half, 64, a, b> : cute::SM90::GMMA::MMA_64x128x16_F32F16F16_SS<a, b> {};
template <Major a, Major b>
struct Mma<__half, 96, a, b> : cute::SM90::GMMA::MMA_64x192x16_F32F16F16_SS<a, b> {};
template <Major a, Major b>
struct Mma<__half, 128, a, b> : cute::SM90::GMMA::MMA_64x256x16_F32F16F16_SS<a, b> {};

template <typename Atom, int first, int size, std::size_t... index>
__device__ __forceinline__ void issue(std::uint64_t a, std::uint64_t b, float (&sum)[size], ScaleOut keep,
                                      std::index_sequence<index...>) {
    Atom::fma(a, b, sum[first + index]..., keep);
}

// sum += a b over a depth of 16, or sum = a b where keep is Zero, of the `count` accumulators from `first` on.
template <typename Element, Major major_a, Major major_b, int first, int count, int size>
__device__ __forceinline__ void multiply(std::uint64_t a, std::uint64_t b, float (&sum)[size], ScaleOut keep) {
    issue<Mma<Element, count, major_a, major_b>, first>(a, b, sum, keep, std::make_index_sequence<count>{});
}

template <int count>
__device__ __forceinline__ void fence_registers(float (&sum)[count]) {
#pragma unroll
    for (int i = 0; i < count; ++i) cute::warpgroup_fence_operand(sum[i]);
}

__device__ __forceinline__ void load_box(const CUtensorMap& map, std::uint64_t* barrier, void* to, int column,
                                         int row) {
    cute::SM90_TMA_LOAD_2D::copy(&map, barrier, static_cast<std::uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL), to,
                                 column, row);
}

// The same box into the shared memory of both blocks of the cluster.
__device__ __forceinline__ void load_box_for_both(const CUtensorMap& map, std::uint64_t* barrier, void* to, int column,
                                                  int row) {
    cute::SM90_TMA_LOAD_MULTICAST_2D::copy(
        &map, barrier, 3, static_cast<std::uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL), to, column, row);
}

// A box from shared memory to the matrix, not kept in the L2 cache: nothing of this launch reads it again.
__device__ __forceinline__ void store_box(const CUtensorMap& map, const void* from, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3}], [%1], %4;" ::"l"(
                     reinterpret_cast<std::uint64_t>(&map)),
                 "r"(cute::cast_smem_ptr_to_uint(from)), "r"(column), "r"(row),
                 "l"(static_cast<std::uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST))
                 : "memory");
}

// The same, added to what the matrix holds, in the matrix's format.
__device__ __forceinline__ void add_box(const CUtensorMap& map, const void* from, int column, int row) {
    cute::SM90_TMA_REDUCE_ADD_2D::copy(&map, from, column, row);
}

__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async;" ::: "memory"); }
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier among the 128 threads of one warpgroup.
__device__ __forceinline__ void warpgroup_barrier(int warpgroup) {
    asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}

// The same, and whether `own` is true for any of them.
__device__ __forceinline__ bool warpgroup_any(int warpgroup, bool own) {
    int any;
    asm volatile(
        "{\n.reg .pred p, q;\nsetp.ne.s32 p, %1, 0;\nbarrier.cta.red.or.pred q, %2, 128, p;\nselp.s32 %0, 1, 0, q;\n}"
        : "=r"(any)
        : "r"(static_cast<int>(own)), "r"(warpgroup + 1)
        : "memory");
    return any != 0;
}

// What this thread wrote, and saw written, is seen by whoever sees what it adds to a counter after this.
__device__ __forceinline__ void fence_release() { asm volatile("fence.release.gpu;" ::: "memory"); }
__device__ __forceinline__ void add_to(int* counter, int value) {
    asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}
__device__ __forceinline__ int load_acquire(const int* counter) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}

// Adds without waiting for the old value; nothing in this launch reads it.
__device__ __forceinline__ void add_to(float* address, float value) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(address), "f"(value));
}
__device__ __forceinline__ void add_to(float* address, float4 value) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(value.x), "f"(value.y),
                 "f"(value.z), "f"(value.w));
}

// One bf16 number, which nobody else adds to meanwhile: there is no such instruction, only a loop. The sum is that of
// the eight below, for what fp32 rounds has more than twice the digits that are kept.
__device__ __forceinline__ void add_to(__nv_bfloat16* address, __nv_bfloat16 value) {
    std::uint16_t old;
    asm volatile("ld.relaxed.gpu.global.u16 %0, [%1];" : "=h"(old) : "l"(address));
    *address = __float2bfloat16_rn(__bfloat162float(__ushort_as_bfloat16(old)) + __bfloat162float(value));
}
__device__ __forceinline__ void add_to(__nv_bfloat16* address, uint4 values) {
    asm volatile("red.relaxed.gpu.global.add.noftz.v4.bf16x2 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(values.x),
                 "r"(values.y), "r"(values.z), "r"(values.w));
}

// 16 bytes to shared memory, in the background.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(cute::cast_smem_ptr_to_uint(to)), "l"(from)
                 : "memory");
}
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ std::uint32_t rounded_pair(float first, float second, __nv_bfloat16 /*format*/) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
}
__device__ __forceinline__ std::uint32_t rounded_pair(float first, float second, __half /*format*/) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

__device__ __forceinline__ void store_matrices(std::uint32_t shared_address, std::uint32_t r0, std::uint32_t r1,
                                               std::uint32_t r2, std::uint32_t r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address), "r"(r0),
                 "r"(r1), "r"(r2), "r"(r3)
                 : "memory");
}

}  // namespace alto::cuda
