#include "lora_gemm.cuh"

namespace alto::cuda {

template cudaError_t launch<Format::kBfloat16, true>(const LoraGemmArguments&, int, cudaStream_t);
template cudaError_t resident_clusters<Format::kBfloat16, true>(int*);

}  // namespace alto::cuda
