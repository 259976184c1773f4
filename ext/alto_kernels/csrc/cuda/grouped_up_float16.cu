#include "grouped_up.cuh"

namespace alto::cuda {

template cudaError_t launch_grouped_up(const GroupedModule&, bool, const __half*, __half*, cudaStream_t);

}  // namespace alto::cuda
