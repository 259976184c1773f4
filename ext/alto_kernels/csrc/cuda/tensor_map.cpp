#include "tensor_map.hpp"

#include <cuda_runtime.h>

#include <functional>
#include <stdexcept>
#include <unordered_map>

namespace alto::cuda {
namespace {

constexpr std::size_t kMostKept = 8192;  // maps of 128 bytes

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// Asked of the runtime, so that the module links and imports where there is no driver.
Encode encoder() {
    static const Encode found = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult result{};
        const cudaError_t status =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
        if (status != cudaSuccess || result != cudaDriverEntryPointSuccess)
            throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled");
        return reinterpret_cast<Encode>(entry);
    }();
    return found;
}

struct Request {
    Matrix matrix;
    int box_rows;
    bool is_float16;

    bool operator==(const Request&) const = default;
};

struct Hash {
    std::size_t operator()(const Request& request) const {
        std::size_t mixed = std::hash<std::uintptr_t>()(request.matrix.address);
        for (const std::int64_t part : {request.matrix.rows, request.matrix.columns, std::int64_t{request.box_rows}})
            mixed = mixed * 0x9E3779B97F4A7C15ull + static_cast<std::size_t>(part);
        return mixed;
    }
};

CUtensorMap encode(const Matrix& matrix, int box_rows, bool is_float16, const std::string& name) {
    if (matrix.address == 0 || matrix.address % 16 != 0)
        throw std::invalid_argument(name + ": its address must be a multiple of 16 bytes");
    if (matrix.rows < 1 || matrix.columns < 1) throw std::invalid_argument(name + ": must not be empty");
    if (matrix.stride < matrix.columns || matrix.stride % 8 != 0)
        throw std::invalid_argument(name + ": its row stride must be a multiple of 8 elements and at least a row");
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(matrix.columns), static_cast<cuuint64_t>(matrix.rows)};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(matrix.stride) * 2};
    const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)};
    const cuuint32_t element_strides[2] = {1, 1};
    const CUtensorMapDataType type = is_float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    CUtensorMap map;
    const CUresult status = encoder()(&map, type, 2, reinterpret_cast<void*>(matrix.address), sizes, strides, box,
                                      element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS)
        throw std::invalid_argument(name + ": TMA refused the matrix (error " + std::to_string(status) + ")");
    return map;
}

}  // namespace

CUtensorMap tensor_map(const Matrix& matrix, int box_rows, bool is_float16, const char* name) {
    // Weights stay where they are, and an allocator gives the same few addresses to activations over and over.
    thread_local std::unordered_map<Request, CUtensorMap, Hash> encoded;
    const Request request{matrix, box_rows, is_float16};
    if (const auto found = encoded.find(request); found != encoded.end()) return found->second;
    if (encoded.size() == kMostKept) encoded.clear();
    return encoded.emplace(request, encode(matrix, box_rows, is_float16, name)).first->second;
}

}  // namespace alto::cuda
