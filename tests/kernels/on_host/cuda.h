// The part of the CUDA driver's interface that makes maps of tensors, on the host: found before NVIDIA's cuda.h. It
// refuses what the documentation of cuTensorMapEncodeTiled forbids.
#pragma once

#include <cstdint>
#include <cstring>

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

struct alignas(128) CUtensorMap {
  cuuint64_t opaque[16];
};

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_INTERLEAVE_16B };
enum CUtensorMapSwizzle {
  CU_TENSOR_MAP_SWIZZLE_NONE,
  CU_TENSOR_MAP_SWIZZLE_32B,
  CU_TENSOR_MAP_SWIZZLE_64B,
  CU_TENSOR_MAP_SWIZZLE_128B
};
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

namespace on_host {

struct TensorMap {  // in the opaque bytes of a CUtensorMap
  const char* data;
  uint64_t sizes[4], strides[4];  // the first stride is that of the numbers
  uint32_t box[4], swizzle;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap), "a map is no larger");

}  // namespace on_host

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  on_host::TensorMap made{static_cast<const char*>(data), {}, {2}, {}, swizzle};
  const uint32_t widest = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 512 : 16u << swizzle;  // bytes of a box's row
  if (rank != 4 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || reinterpret_cast<uintptr_t>(data) % 16 != 0 ||
      box[0] * 2 % 16 != 0 || box[0] * 2 > widest) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  for (int d = 0; d < 4; ++d) {
    if (sizes[d] == 0 || sizes[d] > uint64_t{1} << 32 || box[d] == 0 || box[d] > 256 || steps[d] != 1) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    if (d > 0 && (strides[d - 1] == 0 || strides[d - 1] % 16 != 0 || strides[d - 1] >= uint64_t{1} << 40)) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    made.sizes[d] = sizes[d], made.box[d] = box[d];
    if (d > 0) made.strides[d] = strides[d - 1];
  }
  memcpy(map->opaque, &made, sizeof(made));
  return CUDA_SUCCESS;
}
