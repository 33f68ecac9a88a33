// fused_diffusion::philox_normal on CUDA: one thread for each block of four normals.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include "cuda/launch.h"

namespace fused_diffusion {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

__global__ void __launch_bounds__(kThreads) philox_normal_kernel(float* out, const int64_t* sample_ids, int64_t batch,
                                                                 int64_t elements, uint64_t seed, uint32_t stream) {
  const int64_t blocks = (elements + 3) / 4, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const bool vector = elements % 4 == 0;
  for (int64_t sample = blockIdx.y; sample < batch; sample += gridDim.y) {
    const uint64_t id = static_cast<uint64_t>(sample_ids[sample]);
    for (int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; b < blocks; b += stride) {
      float z[4];
      normal_block(z, static_cast<uint32_t>(b), stream, id, seed);
      store4(out + sample * elements + 4 * b, z, elements - 4 * b, vector);
    }
  }
}

Tensor philox_normal(const Tensor& sample_ids, int64_t seed, int64_t stream, int64_t elements) {
  STD_TORCH_CHECK(sample_ids.dim() == 1 && sample_ids.is_contiguous() && sample_ids.scalar_type() == ScalarType::Long,
                  "sample_ids must be a contiguous int64 vector");
  STD_TORCH_CHECK(elements >= 0 && elements <= int64_t{1} << 34, "elements must be in [0, 2**34]");
  STD_TORCH_CHECK(stream >= 0 && stream <= UINT32_MAX, "stream must be in [0, 2**32)");
  const int64_t batch = sample_ids.size(0);
  Tensor out = torch::stable::new_empty(sample_ids, {batch, elements}, ScalarType::Float);
  if (batch * elements == 0) return out;
  const torch::stable::accelerator::DeviceGuard guard(sample_ids.get_device_index());
  launch(philox_normal_kernel, grid_for(batch, (elements + 3) / 4), kThreads, 0, current_stream(sample_ids),
         static_cast<float*>(out.mutable_data_ptr()), static_cast<const int64_t*>(sample_ids.const_data_ptr()), batch,
         elements, static_cast<uint64_t>(seed), static_cast<uint32_t>(stream));
  return out;
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CUDA, m) {
  m.impl("philox_normal", TORCH_BOX(&fused_diffusion::philox_normal));
}
