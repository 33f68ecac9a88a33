// The arguments of fused_diffusion::attention and its gradient, checked once for the CPU and for CUDA.
//
// The softmax is computed online over blocks of keys (Milakov & Gimelshein 2018; Dao et al. 2022). The gradient on CUDA
// and by AMX recomputes the weights from the logsumexp, whose rounding error reaches every weight of its row. So the
// logsumexp is in natural units, one rounding from the maximum. CUDA subtracts it from the product in a fused
// operation; AMX from the product rounded as the maximum was, so that the largest of large logits has a weight of 1.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <tuple>

#include "common/floats.h"

namespace fused_diffusion {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxAmxPositions = 1 << 10;   // with a gradient: 2 MB of weights for a head
constexpr int64_t kMaxCudaWidth = 256;          // of a head
constexpr int64_t kWideHead = 128;              // wider heads need kWideSharedMemory, which not every device has
constexpr int64_t kWideSharedMemory = 149'760;  // bytes of shared memory of a block

// A [B, H, S, D] tensor with a contiguous last dimension; strides in elements.
template <class Void>
struct StridedHeads {
  Void* data;
  int64_t batch, head, row;

  template <class T>
  FD_HD T* at(int64_t b, int64_t h) const {
    return static_cast<T*>(data) + b * batch + h * head;
  }
};

using InputHeads = StridedHeads<const void>;
using OutputHeads = StridedHeads<void>;

struct AttentionArguments {
  InputHeads q, k, v;
  OutputHeads out;
  float* logsumexp;  // [B, H, S], or null
  int64_t batch, heads, positions, width;
  int64_t keys;  // positions of k and v
  float scale;
};

struct AttentionGradientArguments {
  InputHeads grad, q, k, v, out;
  OutputHeads dq, dk, dv;
  const float* logsumexp;
  int64_t batch, heads, positions, width;
  float scale;
};

inline InputHeads input(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }
inline OutputHeads output(Tensor& t) { return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

inline void check_attention(const Tensor& t, const Tensor& q, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == q.size(0) && t.size(1) == q.size(1) && t.size(2) == q.size(2) &&
                      t.size(3) == q.size(3) && t.scalar_type() == q.scalar_type() && t.device() == q.device(),
                  name, " must be [B, H, S, D] of q's shape and dtype, on q's device");
  STD_TORCH_CHECK(t.stride(3) == 1 || t.size(3) == 1, name, " must have a contiguous last dimension");
}

// k or v of cross attention: [B, H, T, D], for any T that both have.
inline void check_keys(const Tensor& t, const Tensor& k, const Tensor& q, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == q.size(0) && t.size(1) == q.size(1) && t.size(2) == k.size(2) &&
                      t.size(3) == q.size(3) && t.scalar_type() == q.scalar_type() && t.device() == q.device(),
                  name, " must be [B, H, T, D] with the B, H, D and dtype of q and the T of k, on q's device");
  STD_TORCH_CHECK(t.stride(3) == 1 || t.size(3) == 1, name, " must have a contiguous last dimension");
}

inline void check_logsumexp(const Tensor& t, const Tensor& q) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.dim() == 3 && t.size(0) == q.size(0) &&
                      t.size(1) == q.size(1) && t.size(2) == q.size(2) && t.device() == q.device(),
                  "logsumexp must be contiguous float32 [B, H, S], on q's device");
}

// [B, H, S, D] in the memory of a contiguous [B, S, H, D].
inline Tensor empty_like_heads(const Tensor& q) {
  return torch::stable::transpose(torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1), q.size(3)}), 1, 2);
}

// Calls launch(arguments, null pointer of q's element type), unless q is empty.
template <class Launch, class Arguments>
void launch_attention(const Tensor& q, const Launch& launch, const Arguments& arguments) {
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "q must be float32, bfloat16 or float16");
  if (q.numel() == 0) return;
  if (dtype == ScalarType::Float) {
    launch(arguments, static_cast<float*>(nullptr));
  } else if (dtype == ScalarType::BFloat16) {
    launch(arguments, static_cast<BFloat16*>(nullptr));
  } else {
    launch(arguments, static_cast<Half*>(nullptr));
  }
}

template <class Launch>
std::tuple<Tensor, Tensor> checked_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                             const Launch& launch) {
  check_attention(q, q, "q");
  check_attention(k, q, "k");
  check_attention(v, q, "v");
  Tensor out = empty_like_heads(q);
  Tensor logsumexp = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  launch_attention(
      q, launch,
      AttentionArguments{input(q), input(k), input(v), output(out), static_cast<float*>(logsumexp.mutable_data_ptr()),
                         q.size(0), q.size(1), q.size(2), q.size(3), q.size(2), static_cast<float>(scale)});
  return {out, logsumexp};
}

template <class Launch>
std::tuple<Tensor, Tensor, Tensor> checked_attention_gradient(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                              const Tensor& v, const Tensor& out,
                                                              const Tensor& logsumexp, double scale,
                                                              const Launch& launch) {
  check_attention(q, q, "q");
  check_attention(k, q, "k");
  check_attention(v, q, "v");
  check_attention(grad, q, "grad");
  check_attention(out, q, "out");
  check_logsumexp(logsumexp, q);
  Tensor dq = empty_like_heads(q), dk = empty_like_heads(q), dv = empty_like_heads(q);
  launch_attention(
      q, launch,
      AttentionGradientArguments{input(grad), input(q), input(k), input(v), input(out), output(dq), output(dk),
                                 output(dv), static_cast<const float*>(logsumexp.const_data_ptr()), q.size(0),
                                 q.size(1), q.size(2), q.size(3), static_cast<float>(scale)});
  return {dq, dk, dv};
}

}  // namespace fused_diffusion
