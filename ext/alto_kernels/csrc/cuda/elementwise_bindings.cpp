#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "bindings.hpp"
#include "elementwise.hpp"

namespace py = pybind11;

namespace alto::cuda {
namespace {

constexpr int kLine = 8;

void* aligned(Address address, const char* name) {
    if (address % 16 != 0) throw std::invalid_argument(std::string(name) + ": must be aligned to 16 bytes");
    return pointer<void>(address);
}

// (from, token stride, head stride, to, heads)
using HeadFields = std::tuple<Address, std::int64_t, std::int64_t, Address, int>;

Heads make_heads(const HeadFields& fields, const char* name) {
    const auto& [from, token_stride, head_stride, to, heads] = fields;
    if (token_stride % kLine != 0 || head_stride % kLine != 0)
        throw std::invalid_argument(std::string(name) + ": strides must be multiples of 8");
    return {aligned(from, name), token_stride, head_stride, aligned(to, name), heads};
}

void rotate_heads(const HeadFields& queries, const HeadFields& keys, Address cos, Address sin, int tokens, int width,
                  bool backwards, bool is_float16, Address stream) {
    if (width % (2 * kLine) != 0) throw std::invalid_argument("width: must be a multiple of 16");
    const RotaryArguments arguments{make_heads(queries, "queries"),
                                    make_heads(keys, "keys"),
                                    aligned(cos, "cos"),
                                    aligned(sin, "sin"),
                                    tokens,
                                    width,
                                    backwards};
    check(rotate(arguments, is_float16, pointer<CUstream_st>(stream)), "rotate");
}

void require_lines(std::int64_t count) {
    if (count % kLine != 0) throw std::invalid_argument("count: must be a multiple of 8");
}

void silu_forward(Address gate, Address up, Address out, std::int64_t count, bool is_float16, Address stream) {
    require_lines(count);
    check(gated_silu(aligned(gate, "gate"), aligned(up, "up"), aligned(out, "out"), count, is_float16,
                     pointer<CUstream_st>(stream)),
          "gated_silu");
}

void silu_backward(Address gradient, Address gate, Address up, Address gate_gradient, Address up_gradient,
                   std::int64_t count, bool is_float16, Address stream) {
    require_lines(count);
    check(gated_silu_backward(aligned(gradient, "gradient"), aligned(gate, "gate"), aligned(up, "up"),
                              aligned(gate_gradient, "gate_gradient"), aligned(up_gradient, "up_gradient"), count,
                              is_float16, pointer<CUstream_st>(stream)),
          "gated_silu_backward");
}

}  // namespace

void bind_elementwise(py::module_& module) {
    module.def("rotate", &rotate_heads);
    module.def("gated_silu", &silu_forward);
    module.def("gated_silu_backward", &silu_backward);
}

}  // namespace alto::cuda
