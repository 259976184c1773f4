#include <pybind11/stl.h>

#include "bindings.hpp"
#include "decoder_layer.hpp"
#include "norm.hpp"

namespace py = pybind11;

namespace alto::cuda {
namespace {

// (launch, tables)
using PlannedFields = std::pair<const Launch*, const TickTables*>;
// (norms, weights, biases)
using WeightFields = std::tuple<std::vector<Address>, std::vector<Address>, std::vector<Address>>;

Planned planned(const PlannedFields& fields) { return {fields.first, fields.second}; }

LayerWeights layer_weights(const WeightFields& fields) {
    const auto& [norms, weights, biases] = fields;
    if (norms.size() != 4 || weights.size() != 7 || biases.size() != 7)
        throw std::invalid_argument("weights: 4 norms, 7 weights and 7 biases");
    return {norms, weights, biases};
}

void require_shape(const LayerShape& shape) {
    const auto bad = [](int width) { return width <= 0 || width % 8 != 0; };
    if (bad(shape.hidden) || bad(shape.query_width) || bad(shape.key_width) || bad(shape.mlp_width))
        throw std::invalid_argument("widths: must be multiples of 8");
    if (shape.hidden > kWidestNorm) throw std::invalid_argument("hidden: wider than the norm's kernel takes");
    if (shape.head_width <= 0 || shape.head_width % 16 != 0 || shape.query_width % shape.head_width != 0 ||
        shape.key_width % shape.head_width != 0)
        throw std::invalid_argument("head_width: must be a multiple of 16, and the widths of queries and keys of it");
}

}  // namespace

void bind_decoder_layer(py::module_& module) {
    py::class_<LayerShape>(module, "LayerShape")
        .def(py::init([](int hidden, int query_width, int key_width, int head_width, int mlp_width, float input_epsilon,
                         float mlp_epsilon, float head_epsilon, bool is_float16) {
                 const LayerShape shape{hidden,        query_width, key_width,    head_width, mlp_width,
                                        input_epsilon, mlp_epsilon, head_epsilon, is_float16};
                 require_shape(shape);
                 return shape;
             }),
             py::kw_only(), py::arg("hidden"), py::arg("query_width"), py::arg("key_width"), py::arg("head_width"),
             py::arg("mlp_width"), py::arg("input_epsilon"), py::arg("mlp_epsilon"), py::arg("head_epsilon"),
             py::arg("is_float16"))
        // (elements, queries, keys, values)
        .def("kept",
             [](const LayerShape& shape, std::int64_t tokens, std::int64_t saved_rows) {
                 const KeptLayout layout(shape, tokens, saved_rows);
                 return py::make_tuple(layout.elements, layout.queries, layout.keys, layout.values);
             })
        // (elements, attended)
        .def("scratch",
             [](const LayerShape& shape, std::int64_t tokens) {
                 const ScratchLayout layout(shape, tokens);
                 return py::make_tuple(layout.elements, layout.attended);
             })
        .def("before_attention",
             [](const LayerShape& shape, const WeightFields& weights, const PlannedFields& qkv, Address x, Address cos,
                Address sin, Address kept, Address stream) {
                 before_attention(shape, layer_weights(weights), planned(qkv), x, cos, sin, kept, stream);
             })
        .def("after_attention",
             [](const LayerShape& shape, const WeightFields& weights, const PlannedFields& output,
                const PlannedFields& gate_up, const PlannedFields& down, Address x, Address attended, Address kept,
                Address y, Address stream) {
                 after_attention(shape, layer_weights(weights), planned(output), planned(gate_up), planned(down), x,
                                 attended, kept, y, stream);
             })
        .def("backward_to_attention",
             [](const LayerShape& shape, const WeightFields& weights, const PlannedFields& output,
                const PlannedFields& gate_up, const PlannedFields& down, Address dy, Address attended, Address kept,
                Address scratch, const std::vector<Address>& blocks, Address stream) {
                 backward_to_attention(shape, layer_weights(weights), planned(output), planned(gate_up), planned(down),
                                       dy, attended, kept, scratch, blocks, stream);
             })
        .def("backward_from_attention",
             [](const LayerShape& shape, const WeightFields& weights, const PlannedFields& qkv, Address dq, Address dk,
                Address dv, Address x, Address cos, Address sin, Address kept, Address scratch, Address dx,
                const std::vector<Address>& blocks, Address stream) {
                 backward_from_attention(shape, layer_weights(weights), planned(qkv), dq, dk, dv, x, cos, sin, kept,
                                         scratch, dx, blocks, stream);
             });
}

}  // namespace alto::cuda
