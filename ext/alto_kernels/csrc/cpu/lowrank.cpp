#include "lowrank.hpp"

#include <algorithm>
#include <cstring>

#include "../dropout.hpp"
#include "bfloat16.hpp"
#include "gemm.hpp"
#include "thread_pool.hpp"
#include "vectorised.hpp"

namespace alto::cpu {
namespace {

constexpr std::int64_t kTokenBlock = 32;
constexpr std::int64_t kColumnBlock = 192;

struct TokenBlock {
    const Segment* segment;
    const float* b_transposed;  // [rank, out_features]
    std::int64_t start;
    std::int64_t stop;
};

// Where a feature is kept out[i] = in[i] * factor, elsewhere zero, for features [first, first + count).
// Chosen, never multiplied by a mask: a NaN that is dropped is gone.
ALTO_VECTORISED
void drop_row(std::uint32_t row, std::int32_t threshold, float factor, std::int64_t first, std::int64_t count,
              const float* in, float* out) {
    for (std::int64_t i = 0; i < count; ++i)
        out[i] = dropout_keeps(row, static_cast<std::uint32_t>(first + i), threshold) ? in[i] * factor : 0.0f;
}

// Rows [start, stop) and columns [first, first + count) of drop(x); the input itself where nothing drops.
Rows dropped(const Layer& layer, const Segment& segment, Rows x, std::int64_t start, std::int64_t stop,
             std::int64_t first, std::int64_t count, std::vector<float>& scratch) {
    if (segment.dropout == 0.0) return {x.data + start * x.stride + first, x.stride};
    scratch.resize(static_cast<std::size_t>((stop - start) * count));
    const auto factor = static_cast<float>(1.0 / (1.0 - segment.dropout));
    for (std::int64_t t = start; t < stop; ++t)
        drop_row(dropout_row(layer.row_keys[t], layer.module), dropout_threshold(segment.dropout), factor, first, count,
                 x.data + t * x.stride + first, scratch.data() + (t - start) * count);
    return {scratch.data(), count};
}

// B of every segment, transposed, so that both of its products run along contiguous memory.
std::vector<std::vector<float>> transpose_b(const Layer& layer, int threads) {
    std::vector<std::vector<float>> out(layer.segments.size());
    for (std::size_t i = 0; i < out.size(); ++i)
        out[i].resize(static_cast<std::size_t>(layer.segments[i].rank * layer.out_features));
    const std::int64_t pieces = (layer.out_features + kColumnBlock - 1) / kColumnBlock;
    parallel_for(static_cast<std::int64_t>(out.size()) * pieces, threads, [&](std::int64_t task) {
        const Segment& segment = layer.segments[static_cast<std::size_t>(task / pieces)];
        float* to = out[static_cast<std::size_t>(task / pieces)].data();
        const std::int64_t first = task % pieces * kColumnBlock;
        const std::int64_t last = std::min(first + kColumnBlock, layer.out_features);
        for (std::int64_t n = first; n < last; ++n)
            for (std::int64_t r = 0; r < segment.rank; ++r)
                to[r * layer.out_features + n] = segment.b[n * segment.rank + r];
    });
    return out;
}

std::vector<TokenBlock> token_blocks(const Layer& layer, const std::vector<std::vector<float>>& b_transposed) {
    std::vector<TokenBlock> blocks;
    for (std::size_t i = 0; i < layer.segments.size(); ++i) {
        const Segment& segment = layer.segments[i];
        for (std::int64_t t = segment.start; t < segment.stop; t += kTokenBlock)
            blocks.push_back({&segment, b_transposed[i].data(), t, std::min(t + kTokenBlock, segment.stop)});
    }
    return blocks;
}

// to[i] += from[i] factor, rounded once.
template <typename Gradient>
void add_scaled(Gradient* to, const float* from, std::int64_t stride, std::int64_t count, float factor) {
    for (std::int64_t i = 0; i < count; ++i) round_to(widened(to[i]) + factor * from[i * stride], to[i]);
}

void add_to_gradient(const Layer& layer, void* gradient, std::int64_t at, const float* from, std::int64_t stride,
                     std::int64_t count, float factor) {
    if (layer.gradients_are_bfloat16) {
        add_scaled(static_cast<Bfloat16*>(gradient) + at, from, stride, count, factor);
    } else {
        add_scaled(static_cast<float*>(gradient) + at, from, stride, count, factor);
    }
}

// grad_b[n, r] += scale sum_t dy[t, n] saved[t, r] for one block of columns n.
void add_grad_b(const Layer& layer, const Segment& segment, Rows dy, Rows saved, std::int64_t first,
                std::int64_t count) {
    std::vector<float> sum(static_cast<std::size_t>(segment.rank * count), 0.0f);  // [rank, count]
    gemm_nn(segment.rank, count, segment.stop - segment.start, saved.data + segment.start * saved.stride, 1,
            saved.stride, dy.data + segment.start * dy.stride + first, dy.stride, sum.data(), count);
    for (std::int64_t n = 0; n < count; ++n)
        add_to_gradient(layer, segment.grad_b, (first + n) * segment.rank, sum.data() + n, count, segment.rank,
                        segment.scale);
}

// grad_a[r, k] += sum_t ds[t, r] drop(x)[t, k] for one block of columns k.
void add_grad_a(const Layer& layer, const Segment& segment, Rows x, Rows ds, std::int64_t first, std::int64_t count) {
    std::vector<float> scratch;
    std::vector<float> sum(static_cast<std::size_t>(segment.rank * count), 0.0f);
    for (std::int64_t t = segment.start; t < segment.stop; t += kTokenBlock) {
        const std::int64_t stop = std::min(t + kTokenBlock, segment.stop);
        const Rows kept = dropped(layer, segment, x, t, stop, first, count, scratch);
        gemm_nn(segment.rank, count, stop - t, ds.data + t * ds.stride, 1, ds.stride, kept.data, kept.stride,
                sum.data(), count);
    }
    for (std::int64_t r = 0; r < segment.rank; ++r)
        add_to_gradient(layer, segment.grad_a, r * layer.in_features + first, sum.data() + r * count, 1, count, 1.0f);
}

}  // namespace

void forward(const Layer& layer, Rows x, Rows y, Rows saved, int threads) {
    const auto b_transposed = transpose_b(layer, threads);
    const auto blocks = token_blocks(layer, b_transposed);
    parallel_for(static_cast<std::int64_t>(blocks.size()), threads, [&](std::int64_t task) {
        const TokenBlock& block = blocks[static_cast<std::size_t>(task)];
        const Segment& segment = *block.segment;
        const std::int64_t count = block.stop - block.start;
        std::vector<float> scratch;
        const Rows kept = dropped(layer, segment, x, block.start, block.stop, 0, layer.in_features, scratch);
        float* s = saved.data + block.start * saved.stride;
        gemm_nt(count, segment.rank, layer.in_features, kept.data, kept.stride, segment.a, layer.in_features, s,
                saved.stride, 1.0f);
        std::vector<float> scaled(static_cast<std::size_t>(count * segment.rank));
        for (std::int64_t t = 0; t < count; ++t)
            for (std::int64_t r = 0; r < segment.rank; ++r)
                scaled[static_cast<std::size_t>(t * segment.rank + r)] = segment.scale * s[t * saved.stride + r];
        gemm_nn(count, layer.out_features, segment.rank, scaled.data(), segment.rank, 1, block.b_transposed,
                layer.out_features, y.data + block.start * y.stride, y.stride);
    });
}

void backward(const Layer& layer, Rows x, Rows dy, Rows saved, Rows dx, int threads) {
    const auto b_transposed = transpose_b(layer, threads);
    const auto blocks = token_blocks(layer, b_transposed);
    if (blocks.empty()) return;
    std::int64_t first_token = blocks.front().start;
    std::int64_t last_token = 0;
    std::int64_t widest = 0;
    for (const Segment& segment : layer.segments) {
        if (segment.start < segment.stop) first_token = std::min(first_token, segment.start);
        last_token = std::max(last_token, segment.stop);
        widest = std::max(widest, segment.rank);
    }
    std::vector<float> ds_storage(static_cast<std::size_t>((last_token - first_token) * widest));
    const Rows ds{ds_storage.data() - first_token * widest, widest};

    parallel_for(static_cast<std::int64_t>(blocks.size()), threads, [&](std::int64_t task) {
        const TokenBlock& block = blocks[static_cast<std::size_t>(task)];
        const Segment& segment = *block.segment;
        const std::int64_t count = block.stop - block.start;
        float* block_ds = ds.data + block.start * ds.stride;
        gemm_nt(count, segment.rank, layer.out_features, dy.data + block.start * dy.stride, dy.stride,
                block.b_transposed, layer.out_features, block_ds, ds.stride, segment.scale);
        if (dx.data == nullptr) return;
        float* block_dx = dx.data + block.start * dx.stride;
        if (segment.dropout == 0.0) {
            gemm_nn(count, layer.in_features, segment.rank, block_ds, ds.stride, 1, segment.a, layer.in_features,
                    block_dx, dx.stride);
            return;
        }
        std::vector<float> full(static_cast<std::size_t>(count * layer.in_features), 0.0f);
        gemm_nn(count, layer.in_features, segment.rank, block_ds, ds.stride, 1, segment.a, layer.in_features,
                full.data(), layer.in_features);
        std::vector<float> scratch;
        const Rows whole{full.data() - block.start * layer.in_features, layer.in_features};
        const Rows kept = dropped(layer, segment, whole, block.start, block.stop, 0, layer.in_features, scratch);
        for (std::int64_t t = 0; t < count; ++t)
            for (std::int64_t k = 0; k < layer.in_features; ++k)
                block_dx[t * dx.stride + k] += kept.data[t * kept.stride + k];
    });

    const std::int64_t pieces_b = (layer.out_features + kColumnBlock - 1) / kColumnBlock;
    const std::int64_t pieces_a = (layer.in_features + kColumnBlock - 1) / kColumnBlock;
    const std::int64_t pieces = pieces_a + pieces_b;
    parallel_for(static_cast<std::int64_t>(layer.segments.size()) * pieces, threads, [&](std::int64_t task) {
        const Segment& segment = layer.segments[static_cast<std::size_t>(task / pieces)];
        if (segment.start == segment.stop) return;
        const std::int64_t piece = task % pieces;
        if (piece < pieces_b) {
            const std::int64_t first = piece * kColumnBlock;
            add_grad_b(layer, segment, dy, saved, first, std::min(kColumnBlock, layer.out_features - first));
        } else {
            const std::int64_t first = (piece - pieces_b) * kColumnBlock;
            add_grad_a(layer, segment, x, ds, first, std::min(kColumnBlock, layer.in_features - first));
        }
    });
}

}  // namespace alto::cpu
