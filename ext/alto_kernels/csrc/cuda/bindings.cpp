#include "bindings.hpp"

#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../dropout.hpp"
#include "adamw.hpp"
#include "launch.hpp"
#include "pools.hpp"
#include "schedule.hpp"

namespace py = pybind11;

namespace alto::cuda {
namespace {

template <typename T>
py::bytes as_bytes(const std::vector<T>& values) {
    return py::bytes(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

// (slot, start, stop, rank, pool column, scale, dropout, fresh)
using SegmentFields = std::tuple<int, std::int64_t, std::int64_t, int, int, float, double, bool>;

TickLayout make_layout(std::int64_t tokens, const std::vector<SegmentFields>& fields) {
    if (tokens < 0 || tokens > (1 << 24)) throw std::invalid_argument("tokens: must be in [0, 2^24]");
    std::vector<Segment> segments;
    for (const auto& [slot, start, stop, rank, pool_column, scale, dropout, fresh] : fields) {
        if (start < 0 || stop < start || stop > tokens)
            throw std::invalid_argument("segments: token ranges must lie within [0, tokens]");
        if (rank < 1) throw std::invalid_argument("segments: a rank must be at least 1");
        if (pool_column % kGranule != 0) throw std::invalid_argument("segments: pool columns must be multiples of 16");
        segments.push_back({static_cast<int>(start), static_cast<int>(stop), rank, pool_column, slot,
                            dropout > 0.0 ? dropout_threshold(dropout) : std::numeric_limits<std::int32_t>::min(),
                            scale, static_cast<float>(1.0 / (1.0 - dropout)), fresh});
    }
    return TickLayout(tokens, std::move(segments));
}

py::tuple schedule_bytes(const TickLayout& layout, bool backward, bool wants_output, int in_features,
                         std::vector<int> out_features, bool drops, int pairs_in_group, int clusters) {
    if (out_features.empty() || out_features.size() > kMaxModules)
        throw std::invalid_argument("out_features: a launch has one to four modules");
    if (backward && drops && out_features.size() > 1)
        throw std::invalid_argument("out_features: backward with dropout is of one module");
    const Schedule schedule = make_schedule(
        layout, {backward, wants_output, in_features, std::move(out_features), drops, pairs_in_group}, clusters);
    return py::make_tuple(as_bytes(schedule.items), as_bytes(schedule.offsets));
}

TickTables make_tables(Address items, Address item_offsets, Address extras, Address owners, Address ready_target,
                       Address ready, Address row_keys, Address thresholds, Address keep_factors, int tokens,
                       std::int64_t saved_rows, int clusters) {
    return {pointer<const Item>(items),
            pointer<const int>(item_offsets),
            pointer<const Extra>(extras),
            pointer<const Owner>(owners),
            pointer<const int>(ready_target),
            pointer<int>(ready),
            pointer<const std::uint32_t>(row_keys),
            pointer<const std::int32_t>(thresholds),
            pointer<const float>(keep_factors),
            tokens,
            saved_rows,
            clusters};
}

int count_clusters() {
    int clusters = 0;
    check(resident_clusters<Format::kBfloat16, true>(&clusters), "resident_clusters");
    return clusters;
}

void refresh(Address modules, int module_count, Address slots, int slot_count, Address pointers, int max_slots,
             std::int64_t pool_columns, Address slot_is_bad, bool is_float16, Address stream) {
    check(refresh_pools(pointer<const ModulePool>(modules), module_count, pointer<const SlotColumns>(slots), slot_count,
                        pointer<const SlotPointers>(pointers), max_slots, pool_columns, pointer<int>(slot_is_bad),
                        is_float16, pointer<CUstream_st>(stream)),
          "refresh_pools");
}

// The struct of one adapter as bytes, from (param, grad, exp_avg, exp_avg_sq, count, b_start, first_block) and the
// eleven floats in the order of AdamwAdapter, and whether the gradient is bf16.
py::bytes pack_adapter(
    const std::tuple<Address, Address, Address, Address, std::int64_t, std::int64_t, std::int64_t>& a,
    const std::vector<float>& f, bool grad_is_bfloat16) {
    if (f.size() != 11) throw std::invalid_argument("constants: must be 11");
    const AdamwAdapter adapter{pointer<float>(std::get<0>(a)),
                               pointer<void>(std::get<1>(a)),
                               pointer<float>(std::get<2>(a)),
                               pointer<float>(std::get<3>(a)),
                               std::get<4>(a),
                               std::get<5>(a),
                               std::get<6>(a),
                               f[0],
                               f[1],
                               f[2],
                               f[3],
                               f[4],
                               f[5],
                               f[6],
                               f[7],
                               f[8],
                               f[9],
                               f[10],
                               grad_is_bfloat16 ? 1 : 0};
    return py::bytes(reinterpret_cast<const char*>(&adapter), sizeof(adapter));
}

void adamw(Address adapters, Address partial, Address factor, Address norm, Address finite, int adapter_count,
           int most_blocks, bool zero_grad, Address stream) {
    const AdamwArguments arguments{pointer<const AdamwAdapter>(adapters),
                                   pointer<double>(partial),
                                   pointer<float>(factor),
                                   pointer<float>(norm),
                                   pointer<bool>(finite),
                                   adapter_count,
                                   most_blocks,
                                   zero_grad};
    check(adamw_step(arguments, pointer<CUstream_st>(stream)), "adamw_step");
}

}  // namespace

void bind(py::module_& module) {
    py::class_<TickLayout>(module, "TickLayout")
        .def(py::init(&make_layout), py::kw_only(), py::arg("tokens"), py::arg("segments"))
        .def_readonly("tiles", &TickLayout::tiles)
        .def_readonly("saved_rows", &TickLayout::saved_rows)
        .def("extras", [](const TickLayout& layout) { return as_bytes(layout.extras); })
        .def("owners", [](const TickLayout& layout) { return as_bytes(layout.owners); })
        .def("ready_target", [](const TickLayout& layout) { return as_bytes(layout.ready_target); })
        .def("schedule", &schedule_bytes, py::kw_only(), py::arg("backward"), py::arg("wants_output"),
             py::arg("in_features"), py::arg("out_features"), py::arg("drops"), py::arg("pairs_in_group"),
             py::arg("clusters"));
    py::class_<TickTables>(module, "TickTables")
        .def(py::init(&make_tables), py::kw_only(), py::arg("items"), py::arg("item_offsets"), py::arg("extras"),
             py::arg("owners"), py::arg("ready_target"), py::arg("ready"), py::arg("row_keys"), py::arg("thresholds"),
             py::arg("keep_factors"), py::arg("tokens"), py::arg("saved_rows"), py::arg("clusters"));
    py::class_<Launch>(module, "Launch")
        .def(py::init<bool, bool, bool, const std::vector<ModuleFields>&, std::int64_t, int, Address>(), py::kw_only(),
             py::arg("backward"), py::arg("is_float16"), py::arg("gradients_are_bfloat16"), py::arg("modules"),
             py::arg("pool_columns"), py::arg("in_features"), py::arg("slot_is_bad"))
        .def("forward", &Launch::forward)
        .def("backward", &Launch::backward);
    module.def("resident_clusters", &count_clusters);
    module.def("refresh_pools", &refresh, py::kw_only(), py::arg("modules"), py::arg("module_count"), py::arg("slots"),
               py::arg("slot_count"), py::arg("pointers"), py::arg("max_slots"), py::arg("pool_columns"),
               py::arg("slot_is_bad"), py::arg("is_float16"), py::arg("stream"));
    module.def("pack_adamw_adapter", &pack_adapter);
    module.def("adamw_step", &adamw, py::kw_only(), py::arg("adapters"), py::arg("partial"), py::arg("factor"),
               py::arg("norm"), py::arg("finite"), py::arg("adapter_count"), py::arg("most_blocks"),
               py::arg("zero_grad"), py::arg("stream"));
    module.attr("adamw_block") = kAdamwBlock;
    bind_copy_lane(module);
    bind_decoder_layer(module);
    bind_elementwise(module);
    bind_grouped(module);
    bind_mapped_memory(module);
    module.attr("cuda_architectures") = ALTO_CUDA_ARCHITECTURES;
}

}  // namespace alto::cuda
