// The forward instantiation: Y = X W^T + bias + scale (drop(X) A^T) B^T.
#include "lora_gemm.cuh"

namespace alto::cuda {

cudaError_t launch_forward(const LoraGemmArguments& arguments, int clusters, cudaStream_t stream) {
    return launch<false>(arguments, clusters, stream);
}

cudaError_t resident_clusters(int* clusters) {
    cudaError_t status =
        cudaFuncSetAttribute(lora_gemm_kernel<false>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (status != cudaSuccess) return status;
    int device = 0;
    int processors = 0;
    status = cudaGetDevice(&device);
    if (status != cudaSuccess) return status;
    status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (status != cudaSuccess) return status;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(processors / kClusterSize * kClusterSize));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kSharedBytes;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {kClusterSize, 1, 1};
    config.attrs = &cluster;
    config.numAttrs = 1;
    return cudaOccupancyMaxActiveClusters(clusters, lora_gemm_kernel<false>, &config);
}

}  // namespace alto::cuda
