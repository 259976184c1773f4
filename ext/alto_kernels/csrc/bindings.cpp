// The Python module alto_kernels._kernels. It knows no torch: tensors arrive as addresses and sizes, which the Python
// layer has checked against the tensors; what can be checked from here is checked again.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/adamw.hpp"
#include "cpu/lowrank.hpp"
#ifdef ALTO_CUDA
#include "cuda/bindings.hpp"
#endif

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

void require(bool holds, const std::string& name, const std::string& rule) {
    if (!holds) throw py::value_error(name + ": " + rule);
}

template <typename T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);  // NOLINT: the contract of this module
}

// (start, stop, rank, a, b, grad_a, grad_b, scale, dropout)
using SegmentFields =
    std::tuple<std::int64_t, std::int64_t, std::int64_t, Address, Address, Address, Address, float, double>;

alto::cpu::Layer make_layer(std::int64_t in_features, std::int64_t out_features, std::uint32_t module,
                            std::int64_t tokens, const std::vector<SegmentFields>& segments, Address row_keys,
                            bool gradients_are_bfloat16) {
    require(in_features > 0, "in_features", "must be positive");
    require(out_features > 0, "out_features", "must be positive");
    alto::cpu::Layer layer{in_features,           out_features, module, {}, pointer<const std::uint32_t>(row_keys),
                           gradients_are_bfloat16};
    std::int64_t previous_stop = 0;
    for (const auto& [start, stop, rank, a, b, grad_a, grad_b, scale, dropout] : segments) {
        require(start >= previous_stop && stop >= start && stop <= tokens, "segments",
                "token ranges must ascend within [0, tokens]");
        require(rank >= 1 && rank <= 256, "segments", "lora_rank must be in [1, 256]");
        require(a != 0 && b != 0 && grad_a != 0 && grad_b != 0, "segments", "null address");
        require(dropout >= 0.0 && dropout < 1.0, "segments", "dropout must be in [0, 1)");
        require(dropout == 0.0 || row_keys != 0, "row_keys", "needed where a segment has dropout");
        previous_stop = stop;
        layer.segments.push_back({start, stop, rank, pointer<const float>(a), pointer<const float>(b),
                                  pointer<void>(grad_a), pointer<void>(grad_b), scale, dropout});
    }
    return layer;
}

// (address, row stride in elements)
using RowsFields = std::tuple<Address, std::int64_t>;

alto::cpu::Rows make_rows(const RowsFields& fields, std::int64_t columns, const char* name) {
    const auto& [address, stride] = fields;
    require(address != 0, name, "null address");
    require(stride >= columns, name, "rows overlap: the row stride is below the row's length");
    return {pointer<float>(address), stride};
}

std::int64_t widest_rank(const alto::cpu::Layer& layer) {
    std::int64_t widest = 0;
    for (const auto& segment : layer.segments) widest = segment.rank > widest ? segment.rank : widest;
    return widest;
}

void cpu_forward(const alto::cpu::Layer& layer, const RowsFields& x, const RowsFields& y, const RowsFields& saved,
                 int threads) {
    if (layer.segments.empty()) return;
    const auto x_rows = make_rows(x, layer.in_features, "x");
    const auto y_rows = make_rows(y, layer.out_features, "y");
    const auto saved_rows = make_rows(saved, widest_rank(layer), "saved");
    py::gil_scoped_release nogil;
    alto::cpu::forward(layer, x_rows, y_rows, saved_rows, threads);
}

void cpu_backward(const alto::cpu::Layer& layer, const RowsFields& x, const RowsFields& dy, const RowsFields& saved,
                  const RowsFields& dx, int threads) {
    if (layer.segments.empty()) return;
    const auto x_rows = make_rows(x, layer.in_features, "x");
    const auto dy_rows = make_rows(dy, layer.out_features, "dy");
    const auto saved_rows = make_rows(saved, widest_rank(layer), "saved");
    const bool wants_dx = std::get<0>(dx) != 0;
    const auto dx_rows = wants_dx ? make_rows(dx, layer.in_features, "dx") : alto::cpu::Rows{};
    py::gil_scoped_release nogil;
    alto::cpu::backward(layer, x_rows, dy_rows, saved_rows, dx_rows, threads);
}

std::vector<std::pair<float, bool>> cpu_adamw_step(const std::vector<alto::cpu::AdapterStep>& adapters, bool zero_grad,
                                                   int threads) {
    std::vector<alto::cpu::StepOutcome> outcomes;
    {
        py::gil_scoped_release nogil;
        outcomes = alto::cpu::adamw_step(adapters, zero_grad, threads);
    }
    std::vector<std::pair<float, bool>> result;
    for (const auto& outcome : outcomes) result.emplace_back(outcome.grad_norm, outcome.finite);
    return result;
}

alto::cpu::AdapterStep make_adapter_step(Address param, Address grad, bool grad_is_bfloat16, Address exp_avg,
                                         Address exp_avg_sq, std::int64_t count, std::int64_t b_start,
                                         std::int64_t step, double lr, double lr_b, double beta1, double beta2,
                                         double eps, double weight_decay, double max_grad_norm, double grad_scale) {
    require(count >= 0, "count", "must not be negative");
    require(param != 0 && grad != 0 && exp_avg != 0 && exp_avg_sq != 0, "adapters", "null address");
    require(step >= 1, "step", "must be at least 1");
    return {pointer<float>(param),
            pointer<void>(grad),
            grad_is_bfloat16,
            pointer<float>(exp_avg),
            pointer<float>(exp_avg_sq),
            count,
            b_start,
            step,
            lr,
            lr_b,
            beta1,
            beta2,
            eps,
            weight_decay,
            max_grad_norm,
            grad_scale};
}

}  // namespace

PYBIND11_MODULE(_kernels, module) {
    module.doc() = "Torch-free kernels of alto_kernels; addresses and sizes in, checked. Use the package, not this.";

    py::class_<alto::cpu::Layer>(module, "CpuLayer")
        .def(py::init(&make_layer), py::kw_only(), py::arg("in_features"), py::arg("out_features"), py::arg("module"),
             py::arg("tokens"), py::arg("segments"), py::arg("row_keys"), py::arg("gradients_are_bfloat16"));
    module.def("cpu_forward", &cpu_forward, py::kw_only(), py::arg("layer"), py::arg("x"), py::arg("y"),
               py::arg("saved"), py::arg("threads"));
    module.def("cpu_backward", &cpu_backward, py::kw_only(), py::arg("layer"), py::arg("x"), py::arg("dy"),
               py::arg("saved"), py::arg("dx"), py::arg("threads"));

    py::class_<alto::cpu::AdapterStep>(module, "CpuAdapterStep")
        .def(py::init(&make_adapter_step), py::kw_only(), py::arg("param"), py::arg("grad"),
             py::arg("grad_is_bfloat16"), py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("count"),
             py::arg("b_start"), py::arg("step"), py::arg("lr"), py::arg("lr_b"), py::arg("beta1"), py::arg("beta2"),
             py::arg("eps"), py::arg("weight_decay"), py::arg("max_grad_norm"), py::arg("grad_scale"));
    module.def("cpu_adamw_step", &cpu_adamw_step, py::kw_only(), py::arg("adapters"), py::arg("zero_grad"),
               py::arg("threads"));
#ifdef ALTO_CUDA
    alto::cuda::bind(module);
    module.attr("has_cuda") = true;
#else
    module.attr("has_cuda") = false;
#endif
}
