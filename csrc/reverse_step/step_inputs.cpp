// fused_diffusion::step_embeddings_ and fused_diffusion::copy_dense_ on the CPU: what a network reads in a step of a
// sampler, as calls that can be recorded.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>

#include "common/channels_last.h"
#include "common/parallel.h"
#include "reverse_step/step_embeddings.h"
#include "runtime/recorded_calls.h"

namespace fused_diffusion {
namespace {

using torch::stable::Tensor;

constexpr int64_t kBytesPerThread = 1 << 18;

void step_embeddings_(const Tensor& embeddings, const Tensor& counter, const Tensor& label_index, Tensor out) {
  const EmbeddingArguments args = embedding_arguments(embeddings, counter, label_index, out);
  const auto call = [=] {
    STD_TORCH_CHECK(*args.step >= 0, "the counter is at step ", *args.step);
    const char* rows = args.embeddings + *args.step % args.steps * args.labels * args.row;
    divide_work(args.images, args.row, kBytesPerThread, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t label = args.label_index[i];
        STD_TORCH_CHECK(label >= 0 && label < args.labels, "label_index is outside of the ", args.labels, " labels");
        memcpy(args.out + i * args.row, rows + label * args.row, args.row);
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
