#include "launch.hpp"

#include <stdexcept>

#include "tensor_map.hpp"

namespace alto::cuda {

Launch::Launch(bool backward, bool is_float16, bool gradients_are_bfloat16, const std::vector<ModuleFields>& modules,
               std::int64_t pool_columns, int in_features, Address slot_is_bad)
    : backward_(backward), is_float16_(is_float16) {
    if (modules.empty() || modules.size() > kMaxModules)
        throw std::invalid_argument("modules: a launch has one to four");
    fixed_.module_count = static_cast<int>(modules.size());
    for (std::size_t i = 0; i < modules.size(); ++i) {
        const auto& [number, out_features, a_pool, b_pool, slots] = modules[i];
        const CUtensorMap a_map = map_of(a_pool, pool_columns, in_features, "a_pool");
        const CUtensorMap b_map = map_of(b_pool, out_features, pool_columns, "b_pool");
        ModuleArguments& module = fixed_.modules[i];
        module.down_pool = backward ? b_map : a_map;
        module.up_pool = backward ? a_map : b_map;
        module.slots = pointer<const SlotPointers>(slots);
        module.module = number;
        module.out_features = out_features;
    }
    fixed_.slot_is_bad = pointer<const int>(slot_is_bad);
    fixed_.in_features = in_features;
    fixed_.gradients_are_bfloat16 = gradients_are_bfloat16;
}

void Launch::forward(const TickTables& tick, Address x, const std::vector<Address>& weights,
                     const std::vector<Address>& biases, const std::vector<Address>& saved,
                     const std::vector<Address>& ys, Address stream) const {
    if (backward_) throw std::invalid_argument("launch: made for backward");
    LoraGemmArguments arguments = arguments_of(tick, x, weights, ys, saved);
    for (std::size_t i = 0; i < weights.size(); ++i) arguments.modules[i].bias = pointer<const void>(biases.at(i));
    const auto run = is_float16_ ? &launch<Format::kFloat16, false> : &launch<Format::kBfloat16, false>;
    check(run(arguments, tick.clusters, pointer<CUstream_st>(stream)), "lora_gemm forward");
}

void Launch::backward(const TickTables& tick, const std::vector<Address>& dys, Address x,
                      const std::vector<Address>& weights, const std::vector<Address>& saved,
                      const std::vector<Address>& ds, Address dx, bool adds_to_dx, Address stream) const {
    if (!backward_) throw std::invalid_argument("launch: made for forward");
    LoraGemmArguments arguments = arguments_of(tick, x, weights, dys, ds);
    for (std::size_t i = 0; i < weights.size(); ++i) {
        arguments.modules[i].saved = map_of(saved.at(i), tick.saved_rows, kStepDepth, "saved");
        arguments.modules[i].saved_data = pointer<const void>(saved[i]);
        arguments.modules[i].row_data = pointer<const void>(dys[i]);
    }
    arguments.input_grads = map_of(dx, tick.tokens, fixed_.in_features, "dx_TK", kWarpRows);
    arguments.adds_to_output = adds_to_dx;
    const auto run = is_float16_ ? &launch<Format::kFloat16, true> : &launch<Format::kBfloat16, true>;
    check(run(arguments, tick.clusters, pointer<CUstream_st>(stream)), "lora_gemm backward");
}

CUtensorMap Launch::map_of(Address address, std::int64_t rows, std::int64_t columns, const char* name,
                           int box_rows) const {
    return tensor_map({address, rows, columns, columns}, box_rows, is_float16_, name);
}

LoraGemmArguments Launch::arguments_of(const TickTables& tick, Address x, const std::vector<Address>& weights,
                                       const std::vector<Address>& rows, const std::vector<Address>& blocks) const {
    if (weights.size() != static_cast<std::size_t>(fixed_.module_count))
        throw std::invalid_argument("weights: one for each module of the launch");
    LoraGemmArguments arguments = fixed_;
    arguments.items = tick.items;
    arguments.item_offsets = tick.item_offsets;
    arguments.extras = tick.extras;
    arguments.owners = tick.owners;
    arguments.ready_target = tick.ready_target;
    arguments.ready = tick.ready;
    arguments.row_keys = tick.row_keys;
    arguments.thresholds = tick.thresholds;
    arguments.keep_factors = tick.keep_factors;
    arguments.tokens = tick.tokens;
    arguments.tiles = (tick.tokens + kTileRows - 1) / kTileRows;
    arguments.input = map_of(x, tick.tokens, fixed_.in_features, "x_TK");
    arguments.input_data = pointer<const void>(x);
    for (std::size_t i = 0; i < weights.size(); ++i) {
        ModuleArguments& module = arguments.modules[i];
        module.weight = map_of(weights[i], module.out_features, fixed_.in_features, "weight_NK");
        module.rows = backward_ ? map_of(rows.at(i), tick.tokens, module.out_features, "dy_TN")
                                : map_of(rows.at(i), tick.tokens, module.out_features, "y_TN", kWarpRows);
        module.blocks = map_of(blocks.at(i), tick.saved_rows, kStepDepth, backward_ ? "ds" : "saved");
        module.block_data = pointer<void>(blocks[i]);
    }
    return arguments;
}

}  // namespace alto::cuda
