// The backward instantiation: dX = dY W + mask(dS A), dS = scale dY B, dB += dY^T S, dA += dS^T drop(X).
#include "lora_gemm.cuh"

namespace alto::cuda {

cudaError_t launch_backward(const LoraGemmArguments& arguments, int clusters, cudaStream_t stream) {
    return launch<true>(arguments, clusters, stream);
}

}  // namespace alto::cuda
