#include "grouped_down.cuh"

namespace alto::cuda {

template cudaError_t launch_grouped_down(const GroupedModule&, bool, const __nv_bfloat16*, __nv_bfloat16*,
                                         cudaStream_t);

}  // namespace alto::cuda
