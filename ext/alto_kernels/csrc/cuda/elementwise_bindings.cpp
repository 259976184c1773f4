#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "bindings.hpp"
#include "elementwise.hpp"
#include "norm.hpp"
#include "token_nll.hpp"

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

NormShape norm_shape(std::int64_t rows, int width) {
    if (width % kLine != 0 || width <= 0 || width > kWidestNorm)
        throw std::invalid_argument("width: must be a multiple of 8, at most " + std::to_string(kWidestNorm));
    return {rows, width};
}

void norm_forward(Address x, Address y, Address weight, Address sum, Address out, std::int64_t rows, int width,
                  float epsilon, bool is_float16, Address stream) {
    const NormArguments arguments{
        norm_shape(rows, width), aligned(x, "x"),     aligned(y, "y"), aligned(weight, "weight"),
        aligned(sum, "sum"),     aligned(out, "out"), epsilon};
    check(rms_norm(arguments, is_float16, pointer<CUstream_st>(stream)), "rms_norm");
}

void norm_backward(Address gradient, Address sum, Address weight, Address beside, Address sum_gradient,
                   std::int64_t rows, int width, float epsilon, bool is_float16, Address stream) {
    const NormGradientArguments arguments{norm_shape(rows, width),
                                          aligned(gradient, "gradient"),
                                          aligned(sum, "sum"),
                                          aligned(weight, "weight"),
                                          aligned(beside, "beside"),
                                          aligned(sum_gradient, "sum_gradient"),
                                          epsilon};
    check(rms_norm_backward(arguments, is_float16, pointer<CUstream_st>(stream)), "rms_norm_backward");
}

void nll(Address z, Address targets, Address nll, std::int64_t rows, std::int64_t vocabulary, float scale,
         float softcap, bool wants_gradient, bool is_float16, Address stream) {
    if (vocabulary % kLine != 0) throw std::invalid_argument("vocabulary: must be a multiple of 8");
    const TokenNllArguments arguments{
        aligned(z, "z"), pointer<const std::int64_t>(targets), pointer<float>(nll), rows, vocabulary, scale, softcap,
        wants_gradient};
    check(token_nll(arguments, is_float16, pointer<CUstream_st>(stream)), "token_nll");
}

}  // namespace

void bind_elementwise(py::module_& module) {
    module.def("rotate", &rotate_heads);
    module.def("gated_silu", &silu_forward);
    module.def("gated_silu_backward", &silu_backward);
    module.def("token_nll", &nll);
    module.def("rms_norm", &norm_forward);
    module.def("rms_norm_backward", &norm_backward);
}

}  // namespace alto::cuda
