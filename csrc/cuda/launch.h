// How ops run on the GPU: the current stream of a tensor's device, through the stable ABI, and launches. Everything is
// plain C++, so that the tests can run the kernels on the host.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "philox/math.h"

namespace fused_diffusion {

constexpr int kThreads = 256;  // of a block of an elementwise kernel

inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  void* stream = nullptr;
  const AOTITorchError error = aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "there is no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error)); }

inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

// Bytes of shared memory that a block may have.
inline int most_shared_memory() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

// The dynamic shared memory of the block.
extern __shared__ __align__(128) unsigned char shared_memory[];

// kernel<<<grid, block, shared, stream>>>(arguments...)
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
            const Arguments&... arguments) {
  // More than the default has to be requested: as much as there is, because the request is the kernel's, and another
  // thread may be about to launch it with more.
  if (shared > (48 << 10)) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_memory()));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// A grid with the noise blocks of a sample along x and the samples along y; kernels stride over both.
inline dim3 grid_for(int64_t batch, int64_t noise_blocks) {
  const int64_t across = (noise_blocks + kThreads - 1) / kThreads;
  return dim3(static_cast<unsigned>(std::min<int64_t>(across, 1 << 16)),
              static_cast<unsigned>(std::min<int64_t>(batch, 65535)));
}

// Philox block `block` as four normals.
__device__ __forceinline__ void normal_block(float (&z)[4], uint32_t block, uint32_t stream, uint64_t id,
                                             uint64_t seed) {
  const Words<uint32_t> words = philox_block(block, stream, id, seed);
  box_muller<HardwareFma>(words.w0, words.w1, z[0], z[1]);
  box_muller<HardwareFma>(words.w2, words.w3, z[2], z[3]);
}

// Four consecutive elements, of which the first `count` exist. vector: all exist and are aligned for one 16-byte
// access.
__device__ __forceinline__ void load4(float (&to)[4], const float* from, int64_t count, bool vector) {
  if (vector) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
    for (int i = 0; i < 4; ++i) to[i] = i < count ? from[i] : 0.0f;
  }
}

__device__ __forceinline__ void store4(float* to, const float (&from)[4], int64_t count, bool vector) {
  if (vector) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
  } else {
    for (int i = 0; i < 4; ++i) {
      if (i < count) to[i] = from[i];
    }
  }
}

}  // namespace fused_diffusion
