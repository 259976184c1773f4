#include "decoder_layer.hpp"

#include "elementwise.hpp"
#include "norm.hpp"

namespace alto::cuda {
namespace {

constexpr std::int64_t kAlignment = 64;  // elements: what TMA and cache lines like
constexpr std::int64_t kElementBytes = 2;

// Lays tensors one behind the other.
class Cursor {
  public:
    std::int64_t take(std::int64_t elements) {
        const std::int64_t start = end_;
        end_ += (elements + kAlignment - 1) / kAlignment * kAlignment;
        return start;
    }
    std::int64_t end() const { return end_; }

  private:
    std::int64_t end_ = 0;
};

// The calls of one layer, with what all of them share.
class Steps {
  public:
    Steps(const LayerShape& shape, std::int64_t tokens, Address stream)
        : shape_(shape), tokens_(tokens), stream_(stream) {}

    void norm(Address x, Address added, Address weight, Address sum, Address out, std::int64_t rows, int width,
              float epsilon) const {
        const NormArguments arguments{
            {rows, width},      pointer<void>(x), pointer<void>(added), pointer<void>(weight), pointer<void>(sum),
            pointer<void>(out), epsilon};
        check(rms_norm(arguments, shape_.is_float16, pointer<CUstream_st>(stream_)), "rms_norm");
    }

    void norm_backward(Address gradient, Address sum, Address weight, Address beside, Address sum_gradient,
                       std::int64_t rows, int width, float epsilon) const {
        const NormGradientArguments arguments{{rows, width},
                                              pointer<void>(gradient),
                                              pointer<void>(sum),
                                              pointer<void>(weight),
                                              pointer<void>(beside),
                                              pointer<void>(sum_gradient),
                                              epsilon};
        check(rms_norm_backward(arguments, shape_.is_float16, pointer<CUstream_st>(stream_)), "rms_norm_backward");
    }

    void rotate_in_place(Address queries, Address keys, Address cos, Address sin, bool backwards) const {
        const RotaryArguments arguments{heads(queries, shape_.query_width),
                                        heads(keys, shape_.key_width),
                                        pointer<void>(cos),
                                        pointer<void>(sin),
                                        static_cast<int>(tokens_),
                                        shape_.head_width,
                                        backwards};
        check(rotate(arguments, shape_.is_float16, pointer<CUstream_st>(stream_)), "rotate");
    }

    void gate(Address gate, Address up, Address out) const {
        check(gated_silu(pointer<void>(gate), pointer<void>(up), pointer<void>(out), tokens_ * shape_.mlp_width,
                         shape_.is_float16, pointer<CUstream_st>(stream_)),
              "gated_silu");
    }

    void gate_backward(Address gradient, Address gate, Address up, Address gate_gradient, Address up_gradient) const {
        check(gated_silu_backward(pointer<void>(gradient), pointer<void>(gate), pointer<void>(up),
                                  pointer<void>(gate_gradient), pointer<void>(up_gradient), tokens_ * shape_.mlp_width,
                                  shape_.is_float16, pointer<CUstream_st>(stream_)),
              "gated_silu_backward");
    }

    void add_to(Address sum, Address other) const {
        check(add(pointer<void>(sum), pointer<void>(other), tokens_ * shape_.hidden, shape_.is_float16,
                  pointer<CUstream_st>(stream_)),
              "add");
    }

  private:
    Heads heads(Address of, int width) const {
        return {pointer<void>(of), width, shape_.head_width, pointer<void>(of), width / shape_.head_width};
    }

    const LayerShape& shape_;
    std::int64_t tokens_;
    Address stream_;
};

Address at(Address base, std::int64_t elements) { return base + static_cast<Address>(elements * kElementBytes); }

std::vector<Address> part(const std::vector<Address>& all, int first, int count) {
    return {all.begin() + first, all.begin() + first + count};
}

std::vector<Address> saved_blocks(Address kept, const KeptLayout& layout, int first, int count) {
    std::vector<Address> found;
    for (int i = first; i < first + count; ++i) found.push_back(at(kept, layout.blocks[i]));
    return found;
}

enum Norms { kInput, kMiddle, kQueries, kKeys };
enum Products { kQuery = 0, kOutput = 3, kGate = 4, kDown = 6 };  // the first of each launch

}  // namespace

KeptLayout::KeptLayout(const LayerShape& shape, std::int64_t tokens, std::int64_t saved_rows) {
    Cursor cursor;
    normed = cursor.take(tokens * shape.hidden);
    queries = cursor.take(tokens * shape.query_width);
    keys = cursor.take(tokens * shape.key_width);
    values = cursor.take(tokens * shape.key_width);
    plain_queries = shape.norms_heads() ? cursor.take(tokens * shape.query_width) : queries;
    plain_keys = shape.norms_heads() ? cursor.take(tokens * shape.key_width) : keys;
    middle = cursor.take(tokens * shape.hidden);
    middle_normed = cursor.take(tokens * shape.hidden);
    gate = cursor.take(tokens * shape.mlp_width);
    up = cursor.take(tokens * shape.mlp_width);
    gated = cursor.take(tokens * shape.mlp_width);
    for (std::int64_t& block : blocks) block = cursor.take(saved_rows * kStepDepth);
    elements = cursor.end();
}

ScratchLayout::ScratchLayout(const LayerShape& shape, std::int64_t tokens) {
    Cursor cursor;
    gated = cursor.take(tokens * shape.mlp_width);
    up = cursor.take(tokens * shape.mlp_width);
    normed = cursor.take(tokens * shape.hidden);
    middle = cursor.take(tokens * shape.hidden);
    attended = cursor.take(tokens * shape.query_width);
    elements = cursor.end();
}

void before_attention(const LayerShape& shape, const LayerWeights& weights, Planned qkv, Address x, Address cos,
                      Address sin, Address kept, Address stream) {
    const std::int64_t tokens = qkv.tables->tokens;
    const KeptLayout layout(shape, tokens, qkv.tables->saved_rows);
    const Steps steps(shape, tokens, stream);
    const Address normed = at(kept, layout.normed), queries = at(kept, layout.queries), keys = at(kept, layout.keys);
    const Address plain_queries = at(kept, layout.plain_queries), plain_keys = at(kept, layout.plain_keys);
    steps.norm(x, 0, weights.norms[kInput], 0, normed, tokens, shape.hidden, shape.input_epsilon);
    qkv.launch->forward(*qkv.tables, normed, part(weights.weights, kQuery, 3), part(weights.biases, kQuery, 3),
                        saved_blocks(kept, layout, kQuery, 3), {plain_queries, plain_keys, at(kept, layout.values)},
                        stream);
    if (shape.norms_heads()) {
        steps.norm(plain_queries, 0, weights.norms[kQueries], 0, queries, tokens * shape.query_width / shape.head_width,
                   shape.head_width, shape.head_epsilon);
        steps.norm(plain_keys, 0, weights.norms[kKeys], 0, keys, tokens * shape.key_width / shape.head_width,
                   shape.head_width, shape.head_epsilon);
    }
    steps.rotate_in_place(queries, keys, cos, sin, false);
}

void after_attention(const LayerShape& shape, const LayerWeights& weights, Planned output, Planned gate_up,
                     Planned down, Address x, Address attended, Address kept, Address y, Address stream) {
    const std::int64_t tokens = output.tables->tokens;
    const KeptLayout layout(shape, tokens, output.tables->saved_rows);
    const Steps steps(shape, tokens, stream);
    const Address middle = at(kept, layout.middle), normed = at(kept, layout.middle_normed);
    const Address gate = at(kept, layout.gate), up = at(kept, layout.up), gated = at(kept, layout.gated);
    // y is free until the end: what is added to x is there.
    output.launch->forward(*output.tables, attended, part(weights.weights, kOutput, 1),
                           part(weights.biases, kOutput, 1), saved_blocks(kept, layout, kOutput, 1), {y}, stream);
    steps.norm(y, x, weights.norms[kMiddle], middle, normed, tokens, shape.hidden, shape.mlp_epsilon);
    gate_up.launch->forward(*gate_up.tables, normed, part(weights.weights, kGate, 2), part(weights.biases, kGate, 2),
                            saved_blocks(kept, layout, kGate, 2), {gate, up}, stream);
    steps.gate(gate, up, gated);
    down.launch->forward(*down.tables, gated, part(weights.weights, kDown, 1), part(weights.biases, kDown, 1),
                         saved_blocks(kept, layout, kDown, 1), {y}, stream);
    steps.add_to(y, middle);
}

void backward_to_attention(const LayerShape& shape, const LayerWeights& weights, Planned output, Planned gate_up,
                           Planned down, Address dy, Address attended, Address kept, Address scratch,
                           const std::vector<Address>& blocks, Address stream) {
    const std::int64_t tokens = output.tables->tokens;
    const KeptLayout layout(shape, tokens, output.tables->saved_rows);
    const ScratchLayout gradients(shape, tokens);
    const Steps steps(shape, tokens, stream);
    const Address d_gated = at(scratch, gradients.gated), d_up = at(scratch, gradients.up);
    const Address d_normed = at(scratch, gradients.normed), d_middle = at(scratch, gradients.middle);
    down.launch->backward(*down.tables, {dy}, at(kept, layout.gated), part(weights.weights, kDown, 1),
                          saved_blocks(kept, layout, kDown, 1), part(blocks, 0, 1), d_gated, false, stream);
    steps.gate_backward(d_gated, at(kept, layout.gate), at(kept, layout.up), d_gated, d_up);
    gate_up.launch->backward(*gate_up.tables, {d_gated, d_up}, at(kept, layout.middle_normed),
                             part(weights.weights, kGate, 2), saved_blocks(kept, layout, kGate, 2), part(blocks, 0, 2),
                             d_normed, false, stream);
    steps.norm_backward(d_normed, at(kept, layout.middle), weights.norms[kMiddle], dy, d_middle, tokens, shape.hidden,
                        shape.mlp_epsilon);
    output.launch->backward(*output.tables, {d_middle}, attended, part(weights.weights, kOutput, 1),
                            saved_blocks(kept, layout, kOutput, 1), part(blocks, 0, 1), at(scratch, gradients.attended),
                            false, stream);
}

void backward_from_attention(const LayerShape& shape, const LayerWeights& weights, Planned qkv, Address dq, Address dk,
                             Address dv, Address x, Address cos, Address sin, Address kept, Address scratch, Address dx,
                             const std::vector<Address>& blocks, Address stream) {
    const std::int64_t tokens = qkv.tables->tokens;
    const KeptLayout layout(shape, tokens, qkv.tables->saved_rows);
    const ScratchLayout gradients(shape, tokens);
    const Steps steps(shape, tokens, stream);
    steps.rotate_in_place(dq, dk, cos, sin, true);
    if (shape.norms_heads()) {
        steps.norm_backward(dq, at(kept, layout.plain_queries), weights.norms[kQueries], 0, dq,
                            tokens * shape.query_width / shape.head_width, shape.head_width, shape.head_epsilon);
        steps.norm_backward(dk, at(kept, layout.plain_keys), weights.norms[kKeys], 0, dk,
                            tokens * shape.key_width / shape.head_width, shape.head_width, shape.head_epsilon);
    }
    const Address d_normed = at(scratch, gradients.normed);
    qkv.launch->backward(*qkv.tables, {dq, dk, dv}, at(kept, layout.normed), part(weights.weights, kQuery, 3),
                         saved_blocks(kept, layout, kQuery, 3), part(blocks, 0, 3), d_normed, false, stream);
    if (dx != 0)
        steps.norm_backward(d_normed, x, weights.norms[kInput], at(scratch, gradients.middle), dx, tokens, shape.hidden,
                            shape.input_epsilon);
}

}  // namespace alto::cuda
