// fused_diffusion::newton_schulz on a CPU with AMX: Muon orthogonalises a matrix X by the iteration
//
//   G = X transposed(X),  X <- a X + (b G + c G G) X  (Jordan et al. 2024).
//
// As in torch.optim.Muon, sums are in float32, and each product is rounded to bfloat16. Here a matrix stays in the
// cache from product to product, and half of each symmetric product is copied.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>

#include "common/scratch.h"
#include "simd/dispatch.h"

namespace fused_diffusion {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 32;  // rows and columns of a product that are computed together

#define FD_PER_ISA "newton_schulz/newton_schulz_amx.h"
#define FD_ISAS FD_ISA_AMX
#include "simd/foreach_isa.inc"

Tensor newton_schulz(const Tensor& x, int64_t steps, double a, double b, double c) {
  STD_TORCH_CHECK(includes(simd_in_use(), Simd::amx), "this processor has no AMX");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 && x.dim() == 2 && x.is_contiguous(),
                  "x must be a contiguous matrix of bfloat16");
  STD_TORCH_CHECK(x.size(0) <= x.size(1), "x must not be taller than wide");
  STD_TORCH_CHECK(x.const_data_ptr() != nullptr || x.numel() == 0, "x must have memory");
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::BFloat16);
#if FD_AMX
  if (x.numel() > 0) {
    amx::iterate(static_cast<const uint16_t*>(x.const_data_ptr()), static_cast<uint16_t*>(out.mutable_data_ptr()),
                 x.size(0), x.size(1), steps, static_cast<float>(a), static_cast<float>(b), static_cast<float>(c));
  }
#endif
  return out;
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CPU, m) {
  m.impl("newton_schulz", TORCH_BOX(&fused_diffusion::newton_schulz));
}
