#include "grouped_up.cuh"

namespace alto::cuda {

template cudaError_t launch_grouped_up(const GroupedModule&, bool, const __nv_bfloat16*, __nv_bfloat16*, cudaStream_t);

}  // namespace alto::cuda
