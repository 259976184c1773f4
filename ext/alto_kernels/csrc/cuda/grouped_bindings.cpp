#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../dropout.hpp"
#include "bindings.hpp"
#include "grouped.hpp"

namespace py = pybind11;

namespace alto::cuda {
namespace {

constexpr std::size_t kLargestGrid = 65535;  // of the second dimension

// (slot, start, stop, rank, columns, pool column, scale, dropout)
using GroupFields = std::tuple<int, std::int64_t, std::int64_t, int, int, int, double, double>;

// The groups of a tick and their tiles, each as the bytes of an array.
py::tuple layout(std::int64_t tokens, const std::vector<GroupFields>& fields) {
    if (tokens < 0 || tokens > (1 << 24)) throw std::invalid_argument("tokens: must be in [0, 2^24]");
    std::vector<Group> groups;
    std::vector<TokenTile> tiles;
    for (const auto& [slot, start, stop, rank, columns, pool_column, scale, dropout] : fields) {
        if (start < 0 || stop < start || stop > tokens)
            throw std::invalid_argument("groups: token ranges must lie within [0, tokens]");
        for (auto row = static_cast<std::int32_t>(start); row < stop; row += kBoxRows)
            tiles.push_back({static_cast<std::int32_t>(groups.size()), row});
        groups.push_back({static_cast<std::int32_t>(start), static_cast<std::int32_t>(stop), rank, columns, pool_column,
                          slot, dropout > 0.0 ? dropout_threshold(dropout) : std::numeric_limits<std::int32_t>::min(),
                          static_cast<float>(scale / (1.0 - dropout))});
    }
    if (groups.size() > kLargestGrid || tiles.size() > kLargestGrid)
        throw std::invalid_argument("groups: more than 65535 of them, or of their tiles of 64 tokens");
    return py::make_tuple(py::bytes(reinterpret_cast<const char*>(groups.data()), groups.size() * sizeof(Group)),
                          py::bytes(reinterpret_cast<const char*>(tiles.data()), tiles.size() * sizeof(TokenTile)),
                          tiles.size());
}

// The low-rank part of one module in one tick: all but the activations is fixed when it is made.
class GroupedLaunch {
  public:
    GroupedLaunch(const py::dict& addresses, const py::dict& sizes, bool is_float16, bool gradients_are_bfloat16)
        : is_float16_(is_float16) {
        const auto at = [&](const char* name) { return addresses[name].cast<Address>(); };
        const auto size = [&](const char* name) { return sizes[name].cast<std::int64_t>(); };
        module_.groups = pointer<const Group>(at("groups"));
        module_.tiles = pointer<const TokenTile>(at("tiles"));
        module_.row_keys = pointer<const std::uint32_t>(at("row_keys"));
        module_.slots = pointer<const SlotPointers>(at("slots"));
        module_.slot_is_bad = pointer<const int>(at("slot_is_bad"));
        module_.a_pool = pointer<const void>(at("a_pool"));
        module_.b_pool = pointer<const void>(at("b_pool"));
        module_.pool_columns = size("pool_columns");
        module_.group_count = static_cast<int>(size("groups"));
        module_.tile_count = static_cast<int>(size("tiles"));
        module_.saved_columns = static_cast<int>(size("saved_columns"));
        module_.in_features = static_cast<int>(size("in_features"));
        module_.out_features = static_cast<int>(size("out_features"));
        module_.module = static_cast<std::uint32_t>(size("module"));
        module_.gradients_are_bfloat16 = gradients_are_bfloat16;
    }

    // Writes S to `saved` and adds to `y`.
    void forward(Address x, Address saved, Address y, Address stream) const {
        if (module_.tile_count == 0) return;
        is_float16_ ? run_forward<__half>(x, saved, y, stream) : run_forward<__nv_bfloat16>(x, saved, y, stream);
    }

    // Writes dS to `ds`, adds to `dx` unless it is 0, and to the gradients of A and B.
    void backward(Address dy, Address x, Address saved, Address ds, Address dx, Address stream) const {
        if (module_.tile_count == 0) return;
        is_float16_ ? run_backward<__half>(dy, x, saved, ds, dx, stream)
                    : run_backward<__nv_bfloat16>(dy, x, saved, ds, dx, stream);
    }

  private:
    template <typename Element>
    void run_forward(Address x, Address saved, Address y, Address stream_address) const {
        auto* const stream = pointer<CUstream_st>(stream_address);
        check(launch_grouped_down(module_, false, pointer<const Element>(x), pointer<Element>(saved), stream),
              "grouped down");
        check(launch_grouped_up(module_, false, pointer<const Element>(saved), pointer<Element>(y), stream),
              "grouped up");
    }

    template <typename Element>
    void run_backward(Address dy, Address x, Address saved, Address ds, Address dx, Address stream_address) const {
        auto* const stream = pointer<CUstream_st>(stream_address);
        check(launch_grouped_down(module_, true, pointer<const Element>(dy), pointer<Element>(ds), stream),
              "grouped down, backward");
        if (dx != 0)
            check(launch_grouped_up(module_, true, pointer<const Element>(ds), pointer<Element>(dx), stream),
                  "grouped up, backward");
        check(launch_grouped_gradients(module_, pointer<const Element>(x), pointer<const Element>(dy),
                                       pointer<const Element>(saved), pointer<const Element>(ds), stream),
              "grouped gradients");
    }

    GroupedModule module_{};
    bool is_float16_;
};

}  // namespace

void bind_grouped(py::module_& module) {
    module.def("grouped_layout", &layout, py::kw_only(), py::arg("tokens"), py::arg("groups"));
    py::class_<GroupedLaunch>(module, "GroupedLaunch")
        .def(py::init<const py::dict&, const py::dict&, bool, bool>(), py::kw_only(), py::arg("addresses"),
             py::arg("sizes"), py::arg("is_float16"), py::arg("gradients_are_bfloat16"))
        .def("forward", &GroupedLaunch::forward)
        .def("backward", &GroupedLaunch::backward);
}

}  // namespace alto::cuda
