// TMA descriptors of bf16 or fp16 matrices in boxes of 64 columns, 128-byte swizzle.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace alto::cuda {

// A row-major matrix: `stride` elements from row to row.
struct Matrix {
    std::uintptr_t address = 0;
    std::int64_t rows = 0;
    std::int64_t columns = 0;
    std::int64_t stride = 0;
};

// Returns the map; throws std::invalid_argument that names the matrix where TMA cannot address it. The driver takes
// microseconds to encode one and a launch has up to 14, so each thread keeps those of the shapes that it met lately.
CUtensorMap tensor_map(const Matrix& matrix, int box_rows, bool is_float16, const char* name);

}  // namespace alto::cuda
