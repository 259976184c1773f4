// Two small single-threaded fp32 products. Every element is summed in the same order whatever the block it falls in,
// so a row's result does not depend on its neighbours or on its place in the batch.
#pragma once

#include <cstdint>

namespace alto::cpu {

// C[m, n] = alpha * sum_k A[m, k] B[n, k]; all row-major with the given row strides (elements).
void gemm_nt(std::int64_t m, std::int64_t n, std::int64_t k, const float* a, std::int64_t lda, const float* b,
             std::int64_t ldb, float* c, std::int64_t ldc, float alpha);

// C[m, n] += sum_k A(m, k) B[k, n]; A(m, k) = a[m * stride_m + k * stride_k], so that A may be transposed.
void gemm_nn(std::int64_t m, std::int64_t n, std::int64_t k, const float* a, std::int64_t stride_m,
             std::int64_t stride_k, const float* b, std::int64_t ldb, float* c, std::int64_t ldc);

}  // namespace alto::cpu
