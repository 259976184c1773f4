#include "gemm.hpp"

#include <cstring>

#include "vectorised.hpp"

#define ALTO_INLINE inline __attribute__((always_inline))

namespace alto::cpu {
namespace {

constexpr int kLanes = 16;
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

// Vectors travel by reference: passed by value their calling convention would differ between the compiled clones.
ALTO_INLINE void load(Vector& v, const float* p) { std::memcpy(&v, p, sizeof(Vector)); }
ALTO_INLINE void store(float* p, const Vector& v) { std::memcpy(p, &v, sizeof(Vector)); }
ALTO_INLINE void load_some(Vector& v, const float* p, std::int64_t count) {
    v = Vector{};
    std::memcpy(&v, p, static_cast<std::size_t>(count) * sizeof(float));
}

ALTO_INLINE float sum_lanes(const Vector& v) {
    float lanes[kLanes];
    std::memcpy(lanes, &v, sizeof(lanes));
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

template <int M, int N>
ALTO_INLINE void nt_block(std::int64_t k, const float* a, std::int64_t lda, const float* b, std::int64_t ldb, float* c,
                          std::int64_t ldc, float alpha) {
    Vector sum[M][N] = {};
    Vector left[M];
    Vector right;
    std::int64_t at = 0;
    for (; at + kLanes <= k; at += kLanes) {
        for (int i = 0; i < M; ++i) load(left[i], a + i * lda + at);
        for (int j = 0; j < N; ++j) {
            load(right, b + j * ldb + at);
            for (int i = 0; i < M; ++i) sum[i][j] += left[i] * right;
        }
    }
    if (at < k) {
        for (int i = 0; i < M; ++i) load_some(left[i], a + i * lda + at, k - at);
        for (int j = 0; j < N; ++j) {
            load_some(right, b + j * ldb + at, k - at);
            for (int i = 0; i < M; ++i) sum[i][j] += left[i] * right;
        }
    }
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < N; ++j) c[i * ldc + j] = alpha * sum_lanes(sum[i][j]);
}

template <int M>
ALTO_INLINE void nt_rows(std::int64_t n, std::int64_t k, const float* a, std::int64_t lda, const float* b,
                         std::int64_t ldb, float* c, std::int64_t ldc, float alpha) {
    std::int64_t j = 0;
    for (; j + 4 <= n; j += 4) nt_block<M, 4>(k, a, lda, b + j * ldb, ldb, c + j, ldc, alpha);
    for (; j < n; ++j) nt_block<M, 1>(k, a, lda, b + j * ldb, ldb, c + j, ldc, alpha);
}

template <int M, int W>
ALTO_INLINE void nn_block(std::int64_t k, const float* a, std::int64_t stride_m, std::int64_t stride_k, const float* b,
                          std::int64_t ldb, float* c, std::int64_t ldc) {
    Vector sum[M][W];
    Vector right[W];
    for (int i = 0; i < M; ++i)
        for (int w = 0; w < W; ++w) load(sum[i][w], c + i * ldc + w * kLanes);
    for (std::int64_t at = 0; at < k; ++at) {
        for (int w = 0; w < W; ++w) load(right[w], b + at * ldb + w * kLanes);
        for (int i = 0; i < M; ++i) {
            const float left = a[i * stride_m + at * stride_k];
            for (int w = 0; w < W; ++w) sum[i][w] += left * right[w];
        }
    }
    for (int i = 0; i < M; ++i)
        for (int w = 0; w < W; ++w) store(c + i * ldc + w * kLanes, sum[i][w]);
}

template <int M>
ALTO_INLINE void nn_tail(std::int64_t n, std::int64_t k, const float* a, std::int64_t stride_m, std::int64_t stride_k,
                         const float* b, std::int64_t ldb, float* c, std::int64_t ldc) {
    Vector sum[M];
    Vector right;
    for (int i = 0; i < M; ++i) load_some(sum[i], c + i * ldc, n);
    for (std::int64_t at = 0; at < k; ++at) {
        load_some(right, b + at * ldb, n);
        for (int i = 0; i < M; ++i) sum[i] += a[i * stride_m + at * stride_k] * right;
    }
    for (int i = 0; i < M; ++i) std::memcpy(c + i * ldc, &sum[i], static_cast<std::size_t>(n) * sizeof(float));
}

template <int M>
ALTO_INLINE void nn_rows(std::int64_t n, std::int64_t k, const float* a, std::int64_t stride_m, std::int64_t stride_k,
                         const float* b, std::int64_t ldb, float* c, std::int64_t ldc) {
    std::int64_t j = 0;
    for (; j + 3 * kLanes <= n; j += 3 * kLanes) nn_block<M, 3>(k, a, stride_m, stride_k, b + j, ldb, c + j, ldc);
    for (; j + kLanes <= n; j += kLanes) nn_block<M, 1>(k, a, stride_m, stride_k, b + j, ldb, c + j, ldc);
    if (j < n) nn_tail<M>(n - j, k, a, stride_m, stride_k, b + j, ldb, c + j, ldc);
}

}  // namespace

ALTO_VECTORISED
void gemm_nt(std::int64_t m, std::int64_t n, std::int64_t k, const float* a, std::int64_t lda, const float* b,
             std::int64_t ldb, float* c, std::int64_t ldc, float alpha) {
    std::int64_t i = 0;
    for (; i + 4 <= m; i += 4) nt_rows<4>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, alpha);
    for (; i < m; ++i) nt_rows<1>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, alpha);
}

ALTO_VECTORISED
void gemm_nn(std::int64_t m, std::int64_t n, std::int64_t k, const float* a, std::int64_t stride_m,
             std::int64_t stride_k, const float* b, std::int64_t ldb, float* c, std::int64_t ldc) {
    std::int64_t i = 0;
    for (; i + 8 <= m; i += 8) nn_rows<8>(n, k, a + i * stride_m, stride_m, stride_k, b, ldb, c + i * ldc, ldc);
    for (; i < m; ++i) nn_rows<1>(n, k, a + i * stride_m, stride_m, stride_k, b, ldb, c + i * ldc, ldc);
}

}  // namespace alto::cpu
