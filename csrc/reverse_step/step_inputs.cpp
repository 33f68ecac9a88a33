// fused_diffusion::step_embeddings_ and fused_diffusion::copy_dense_ on the CPU: what a network reads in a step of a
// sampler, as calls that can be recorded.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>

#include "common/channels_last.h"
#include "common/parallel.h"
#include "runtime/recorded_calls.h"

namespace fused_diffusion {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBytesPerThread = 1 << 18;

void step_embeddings_(const Tensor& embeddings, const Tensor& counter, const Tensor& label_index, Tensor out) {
  STD_TORCH_CHECK(embeddings.dim() == 3 && embeddings.is_contiguous() && embeddings.size(0) > 0,
                  "embeddings must be contiguous [steps, labels, E], of at least one step");
  STD_TORCH_CHECK(counter.scalar_type() == ScalarType::Long && counter.numel() == 4 && counter.is_contiguous(),
                  "counter must be contiguous int64 [4]");
  STD_TORCH_CHECK(label_index.scalar_type() == ScalarType::Long && label_index.dim() == 1 && label_index.is_contiguous(),
                  "label_index must be contiguous int64 [B]");
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous() && out.scalar_type() == embeddings.scalar_type() &&
                      out.size(0) == label_index.size(0) && out.size(1) == embeddings.size(2),
                  "out must be contiguous [B, E], of the dtype of embeddings");
  const int64_t steps = embeddings.size(0), labels = embeddings.size(1), images = out.size(0);
  const int64_t row = embeddings.size(2) * embeddings.element_size();
  const char* from = static_cast<const char*>(embeddings.const_data_ptr());
  const int64_t* step = static_cast<const int64_t*>(counter.const_data_ptr());
  const int64_t* index = static_cast<const int64_t*>(label_index.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const auto call = [=] {
    STD_TORCH_CHECK(*step >= 0, "the counter is at step ", *step);
    const char* rows = from + *step % steps * labels * row;
    divide_work(images, row, kBytesPerThread, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        STD_TORCH_CHECK(index[i] >= 0 && index[i] < labels, "label_index is outside of the ", labels, " labels");
        memcpy(to + i * row, rows + index[i] * row, row);
      }
    });
  };
  run_or_record(call, embeddings, counter, label_index, out);
}

void copy_dense_(const Tensor& x, Tensor out) {
  bool same = x.dim() == out.dim() && x.scalar_type() == out.scalar_type();
  for (int64_t d = 0; same && d < x.dim(); ++d) {
    same = x.size(d) == out.size(d) && (x.size(d) <= 1 || x.stride(d) == out.stride(d));
  }
  STD_TORCH_CHECK(same, "out must have the shape, the strides and the dtype of x");
  STD_TORCH_CHECK(x.is_contiguous() || (x.dim() > 2 && is_channels_last(x)), "x must be contiguous or channels_last");
  const int64_t size = x.numel() * x.element_size();
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const auto call = [=] {
    parallel_for(0, size, kBytesPerThread,
                 [&](int64_t begin, int64_t end) { memcpy(to + begin, from + begin, end - begin); });
  };
  run_or_record(call, x, out);
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CPU, m) {
  m.impl("step_embeddings_", TORCH_BOX(&fused_diffusion::step_embeddings_));
  m.impl("copy_dense_", TORCH_BOX(&fused_diffusion::copy_dense_));
}
