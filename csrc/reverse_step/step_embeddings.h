// The arguments of step_embeddings_, checked once for the CPU and the CUDA kernel.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace fused_diffusion {

// embeddings holds `steps` times `labels` rows of `row` bytes, and out `images` of them.
struct EmbeddingArguments {
  const char* embeddings;
  const int64_t *step, *label_index;
  char* out;
  int64_t steps, labels, images, row;
};

inline EmbeddingArguments embedding_arguments(const torch::stable::Tensor& embeddings,
                                              const torch::stable::Tensor& counter,
                                              const torch::stable::Tensor& label_index,
                                              const torch::stable::Tensor& out) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(embeddings.dim() == 3 && embeddings.is_contiguous() && embeddings.size(0) > 0,
                  "embeddings must be contiguous [steps, labels, E], of at least one step");
  STD_TORCH_CHECK(counter.scalar_type() == ScalarType::Long && counter.numel() == 4 && counter.is_contiguous() &&
                      counter.device() == embeddings.device(),
                  "counter must be contiguous int64 [4], on the device of embeddings");
  STD_TORCH_CHECK(label_index.scalar_type() == ScalarType::Long && label_index.dim() == 1 &&
                      label_index.is_contiguous() && label_index.device() == embeddings.device(),
                  "label_index must be contiguous int64 [B], on the device of embeddings");
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous() && out.scalar_type() == embeddings.scalar_type() &&
                      out.size(0) == label_index.size(0) && out.size(1) == embeddings.size(2) &&
                      out.device() == embeddings.device(),
                  "out must be contiguous [B, E], of the dtype and on the device of embeddings");
  return {static_cast<const char*>(embeddings.const_data_ptr()),
          static_cast<const int64_t*>(counter.const_data_ptr()),
          static_cast<const int64_t*>(label_index.const_data_ptr()),
          static_cast<char*>(out.mutable_data_ptr()),
          embeddings.size(0),
          embeddings.size(1),
          out.size(0),
          static_cast<int64_t>(embeddings.size(2) * embeddings.element_size())};
}

}  // namespace fused_diffusion
