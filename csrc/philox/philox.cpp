// fused_diffusion::philox_normal on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "simd/dispatch.h"

namespace fused_diffusion {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct PhiloxNormal {
  float* out;
  const int64_t* sample_ids;
  int64_t elements;
  uint64_t seed;
  uint32_t stream;

  template <class M>
  FD_HD void run(int64_t begin, int64_t end) const {
    alignas(64) float z[kTile];
    for (int64_t index = begin; index < end; ++index) {
      const Tile tile = tile_at(index, elements);
      normal_tile<M>(z, tile, stream, static_cast<uint64_t>(sample_ids[tile.sample]), seed);
      memcpy(out + tile.sample * elements + tile.first, z, tile.size * sizeof(float));
    }
  }
};

Tensor philox_normal(const Tensor& sample_ids, int64_t seed, int64_t stream, int64_t elements) {
  STD_TORCH_CHECK(sample_ids.dim() == 1 && sample_ids.is_contiguous() &&
                      sample_ids.scalar_type() == ScalarType::Long,
                  "sample_ids must be a contiguous int64 vector");
  STD_TORCH_CHECK(elements >= 0 && elements <= int64_t{1} << 34, "elements must be in [0, 2**34]");
  STD_TORCH_CHECK(stream >= 0 && stream <= UINT32_MAX, "stream must be in [0, 2**32)");
  const int64_t batch = sample_ids.size(0);
  Tensor out = torch::stable::new_empty(sample_ids, {batch, elements}, ScalarType::Float);
  if (batch * elements == 0) return out;
  const PhiloxNormal kernel{static_cast<float*>(out.mutable_data_ptr()),
                            static_cast<const int64_t*>(sample_ids.const_data_ptr()), elements,
                            static_cast<uint64_t>(seed), static_cast<uint32_t>(stream)};
  run_tiles(kernel, batch * tiles_per_sample(elements));
  return out;
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CPU, m) {
  m.impl("philox_normal", TORCH_BOX(&fused_diffusion::philox_normal));
}
