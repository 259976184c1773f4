#include "lora_gemm.cuh"

namespace alto::cuda {

template cudaError_t launch<Format::kFloat16, false>(const LoraGemmArguments&, int, cudaStream_t);
template cudaError_t resident_clusters<Format::kFloat16, false>(int*);

}  // namespace alto::cuda
