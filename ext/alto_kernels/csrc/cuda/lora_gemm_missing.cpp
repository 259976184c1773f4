// Stands in for the kernel of lora_gemm.cuh in a build that has no code for Hopper, the only GPU that it runs on.
#include "lora_gemm.hpp"

namespace alto::cuda {

template <Format format, bool backward>
cudaError_t launch(const LoraGemmArguments&, int, cudaStream_t) {
    return cudaErrorNoKernelImageForDevice;
}

template <Format format, bool backward>
cudaError_t resident_clusters(int*) {
    return cudaErrorNoKernelImageForDevice;
}

template cudaError_t launch<Format::kBfloat16, false>(const LoraGemmArguments&, int, cudaStream_t);
template cudaError_t launch<Format::kBfloat16, true>(const LoraGemmArguments&, int, cudaStream_t);
template cudaError_t launch<Format::kFloat16, false>(const LoraGemmArguments&, int, cudaStream_t);
template cudaError_t launch<Format::kFloat16, true>(const LoraGemmArguments&, int, cudaStream_t);
template cudaError_t resident_clusters<Format::kBfloat16, true>(int*);

}  // namespace alto::cuda
