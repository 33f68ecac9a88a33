// The copy engine's maps of tensors, which the driver encodes on the host. The driver's function is looked up at run
// time, so that the library loads where there is no driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "cuda/launch.h"

namespace fused_diffusion {

inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const unsigned since = 12000;  // CUDA 12.0
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, since, cudaEnableDefault, &found));
#else
    static_cast<void>(since);
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found));
#endif
    STD_TORCH_CHECK(found == cudaDriverEntryPointSuccess && function != nullptr,
                    "the CUDA driver has no cuTensorMapEncodeTiled: it is older than CUDA 12.0");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encoder;
}

// A map of a tensor of 16-bit numbers. sizes: of its dimensions, the contiguous one first; strides: bytes, of the
// others, multiples of 16. A copy takes `rows` rows of 128 bytes, which it swizzles as cuda/hopper.h says.
inline CUtensorMap map_of_rows(CUtensorMapDataType type, const void* data, const cuuint64_t (&sizes)[4],
                               const cuuint64_t (&strides)[3], int rows) {
  CUtensorMap map;
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  const CUresult result =
      tensor_map_encoder()(&map, type, 4, const_cast<void*>(data), sizes, strides, box, steps,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "CUDA: no map of a tensor: error ", static_cast<int>(result));
  return map;
}

}  // namespace fused_diffusion
