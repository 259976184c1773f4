#include "grouped_gradients.cuh"

namespace alto::cuda {

template cudaError_t launch_grouped_gradients(const GroupedModule&, const __nv_bfloat16*, const __nv_bfloat16*,
                                              const __nv_bfloat16*, const __nv_bfloat16*, cudaStream_t);

}  // namespace alto::cuda
