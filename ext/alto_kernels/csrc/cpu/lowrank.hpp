// The low-rank part of one linear layer for many adapters, fp32 on the CPU.
#pragma once

#include <cstdint>
#include <vector>

namespace alto::cpu {

// One adapter's part of the packed token axis, with everything that one module's product needs. Matrices are row-major
// and contiguous: a [rank, in_features], b [out_features, rank], gradients alike, in the layer's format for them.
struct Segment {
    std::int64_t start = 0;
    std::int64_t stop = 0;
    std::int64_t rank = 0;
    const float* a = nullptr;
    const float* b = nullptr;
    void* grad_a = nullptr;
    void* grad_b = nullptr;
    float scale = 0.0f;
    double dropout = 0.0;
};

// One module's product over the tokens of a tick.
struct Layer {
    std::int64_t in_features = 0;
    std::int64_t out_features = 0;
    std::uint32_t module = 0;
    std::vector<Segment> segments;
    const std::uint32_t* row_keys = nullptr;  // [tokens], read only where a segment drops
    bool gradients_are_bfloat16 = false;      // else fp32
};

// A matrix of tokens: row t starts at data + t * stride.
struct Rows {
    float* data = nullptr;
    std::int64_t stride = 0;
};

// y[t] += scale B (A drop(x[t])) and saved[t, :rank] = A drop(x[t]), for the tokens of every segment. Other rows of y
// and other columns of saved are left alone.
void forward(const Layer& layer, Rows x, Rows y, Rows saved, int threads);

// grad_a += and grad_b += for every segment; dx[t] += the low-rank part unless dx.data is null.
void backward(const Layer& layer, Rows x, Rows dy, Rows saved, Rows dx, int threads);

}  // namespace alto::cpu
