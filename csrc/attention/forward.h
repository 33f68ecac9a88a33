// The forward pass of attention on CUDA that every device has.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

namespace fused_diffusion {

// The output and the logsumexp; the arguments are those of fused_diffusion::attention.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> attention_mma(const torch::stable::Tensor& q,
                                                                       const torch::stable::Tensor& k,
                                                                       const torch::stable::Tensor& v, double scale);

}  // namespace fused_diffusion
