// A launch as the host makes it: what is fixed for as long as pools are, what a tick brings, and what each call does.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "address.hpp"
#include "lora_gemm.hpp"

namespace alto::cuda {

// What launches of one shape need of a tick: all of it is fixed when the tick is laid out.
struct TickTables {
    const Item* items;
    const int* item_offsets;
    const Extra* extras;
    const Owner* owners;
    const int* ready_target;
    int* ready;
    const std::uint32_t* row_keys;
    const std::int32_t* thresholds;
    const float* keep_factors;
    int tokens;
    std::int64_t saved_rows;
    int clusters;
};

// One module of a launch: (number in the table, out_features, A pool, B pool, slot pointers).
using ModuleFields = std::tuple<std::uint32_t, int, Address, Address, Address>;

// One or more modules with the same input. In each list a module has one address; a bias may be 0.
class Launch {
  public:
    Launch(bool backward, bool is_float16, bool gradients_are_bfloat16, const std::vector<ModuleFields>& modules,
           std::int64_t pool_columns, int in_features, Address slot_is_bad);

    void forward(const TickTables& tick, Address x, const std::vector<Address>& weights,
                 const std::vector<Address>& biases, const std::vector<Address>& saved, const std::vector<Address>& ys,
                 Address stream) const;

    void backward(const TickTables& tick, const std::vector<Address>& dys, Address x,
                  const std::vector<Address>& weights, const std::vector<Address>& saved,
                  const std::vector<Address>& ds, Address dx, bool adds_to_dx, Address stream) const;

  private:
    CUtensorMap map_of(Address address, std::int64_t rows, std::int64_t columns, const char* name,
                       int box_rows = kStepDepth) const;
    LoraGemmArguments arguments_of(const TickTables& tick, Address x, const std::vector<Address>& weights,
                                   const std::vector<Address>& rows, const std::vector<Address>& blocks) const;

    bool backward_;
    bool is_float16_;
    LoraGemmArguments fixed_{};
};

}  // namespace alto::cuda
