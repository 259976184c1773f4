#include "grouped_down.cuh"

namespace alto::cuda {

template cudaError_t launch_grouped_down(const GroupedModule&, bool, const __half*, __half*, cudaStream_t);

}  // namespace alto::cuda
