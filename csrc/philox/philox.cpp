// fused_diffusion::philox_normal on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/chunks.h"
#include "philox/math.h"
#include "simd/dispatch.h"

namespace fused_diffusion {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct PhiloxNormal {
  float* out;  // [batch, elements]
  const int64_t* sample_ids;
  int64_t elements;
  uint64_t seed;
  uint32_t stream;
};

#define FD_PER_ISA "philox/philox_cpu.h"
#define FD_ISAS FD_ISAS_FLOAT32
#include "simd/foreach_isa.inc"

Tensor philox_normal(const Tensor& sample_ids, int64_t seed, int64_t stream, int64_t elements) {
  STD_TORCH_CHECK(sample_ids.dim() == 1 && sample_ids.is_contiguous() && sample_ids.scalar_type() == ScalarType::Long,
                  "sample_ids must be a contiguous int64 vector");
  STD_TORCH_CHECK(elements >= 0 && elements <= int64_t{1} << 34, "elements must be in [0, 2**34]");
  STD_TORCH_CHECK(stream >= 0 && stream <= UINT32_MAX, "stream must be in [0, 2**32)");
  const int64_t batch = sample_ids.size(0);
  Tensor out = torch::stable::new_empty(sample_ids, {batch, elements}, ScalarType::Float);
  if (batch * elements == 0) return out;
  const PhiloxNormal g{static_cast<float*>(out.mutable_data_ptr()),
                       static_cast<const int64_t*>(sample_ids.const_data_ptr()), elements, static_cast<uint64_t>(seed),
                       static_cast<uint32_t>(stream)};
  const auto write = FD_DISPATCH(simd_in_use(), write_normals);
  parallel_for(0, batch * chunks_per_sample(elements), kChunksPerThread,
               [&](int64_t begin, int64_t end) { write(g, begin, end); });
  return out;
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CPU, m) {
  m.impl("philox_normal", TORCH_BOX(&fused_diffusion::philox_normal));
}
