// What a decoder layer of Llama's kind does before its attention and after it, forward and back, each in one call:
// h = x + O(attention(rotate(Q n), rotate(K n), V n)) with n = norm(x), y = h + D(silu(G m) U m) with m = norm(h).
// Q, K, V, O, G, U and D are frozen products with their adapters; Q n and K n may have a norm for each head.
//
// Attention itself is the caller's. All tensors are of 16 bits, contiguous, [T, width].
#pragma once

#include <cstdint>
#include <vector>

#include "launch.hpp"

namespace alto::cuda {

struct LayerShape {
    int hidden;
    int query_width;
    int key_width;
    int head_width;
    int mlp_width;
    float input_epsilon;
    float mlp_epsilon;
    float head_epsilon;  // of the norms of queries and keys; below 0: there are none
    bool is_float16;

    bool norms_heads() const { return head_epsilon >= 0.0f; }
};

// Where each tensor begins, in elements from the beginning of what one pass of one layer keeps for its backward pass.
struct KeptLayout {
    KeptLayout(const LayerShape& shape, std::int64_t tokens, std::int64_t saved_rows);

    std::int64_t normed, plain_queries, plain_keys, queries, keys, values;  // plain: before their norms
    std::int64_t middle, middle_normed, gate, up, gated;
    std::int64_t blocks[7];  // S of Q, K, V, O, G, U, D
    std::int64_t elements;
};

// The same for what a backward pass needs on its way.
struct ScratchLayout {
    ScratchLayout(const LayerShape& shape, std::int64_t tokens);

    std::int64_t gated, up, normed, middle, attended;  // gradients
    std::int64_t elements;
};

// In the order of the pass. `norms`: of the input, of h, of queries, of keys; `weights` and `biases` (0: none): Q, K,
// V, O, G, U, D.
struct LayerWeights {
    std::vector<Address> norms;
    std::vector<Address> weights;
    std::vector<Address> biases;
};

// A launch and the tables of this tick for it.
struct Planned {
    const Launch* launch;
    const TickTables* tables;
};

void before_attention(const LayerShape& shape, const LayerWeights& weights, Planned qkv, Address x, Address cos,
                      Address sin, Address kept, Address stream);

void after_attention(const LayerShape& shape, const LayerWeights& weights, Planned output, Planned gate_up,
                     Planned down, Address x, Address attended, Address kept, Address y, Address stream);

// From the gradient of y to that of what attention gave, in `scratch`. `blocks`: room for dS of three layers.
void backward_to_attention(const LayerShape& shape, const LayerWeights& weights, Planned output, Planned gate_up,
                           Planned down, Address dy, Address attended, Address kept, Address scratch,
                           const std::vector<Address>& blocks, Address stream);

// From the gradients of queries, keys and values, which are overwritten, to that of x; `dx` 0: nobody needs it.
void backward_from_attention(const LayerShape& shape, const LayerWeights& weights, Planned qkv, Address dq, Address dk,
                             Address dv, Address x, Address cos, Address sin, Address kept, Address scratch, Address dx,
                             const std::vector<Address>& blocks, Address stream);

}  // namespace alto::cuda
