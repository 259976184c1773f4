#include "grouped_gradients.cuh"

namespace alto::cuda {

template cudaError_t launch_grouped_gradients(const GroupedModule&, const __half*, const __half*, const __half*,
                                              const __half*, cudaStream_t);

}  // namespace alto::cuda
