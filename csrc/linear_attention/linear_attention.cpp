// fused_diffusion::linear_attention_ on the CPU: attention through a summary of all positions (Shen et al. 2018,
// arXiv:1812.01243).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <type_traits>

#include "common/parallel.h"
#include "common/scratch.h"
#include "runtime/recorded_calls.h"
#include "simd/dispatch.h"

namespace fused_diffusion {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunk = 1024;  // positions that are summed up alone, so that threads do not change the sums
constexpr int64_t kProductsPerThread = 1 << 18;  // fewer are not worth a thread

// A tensor [N, heads, channels, positions] whose channels are neighbours.
struct Heads {
  const void* data;
  int64_t sample, head, position;  // strides in elements
};

struct LinearAttention {
  Heads q, k, v, out;
  const float *memory_k, *memory_v;  // [heads, channels, tokens], or null
  float* summaries;                  // [N heads, parts, summary_size()]
  int64_t samples, heads, positions, tokens;
  int64_t key_channels, value_channels;
  float scale;

  int64_t parts() const { return (positions + kChunk - 1) / kChunk + (tokens > 0); }
  int64_t key_step() const { return (key_channels + 15) / 16 * 16; }
  int64_t value_step() const { return (value_channels + 15) / 16 * 16; }

  // The largest key of each channel, the sum of the keys' exponentials, and the sums of their products with the values.
  int64_t summary_size() const { return key_step() * (2 + value_step()); }
};

#define FD_PER_ISA "linear_attention/linear_attention_cpu.h"
#define FD_ISAS (FD_ISAS_FLOAT32 | FD_ISA_AVX512_BF16)
#include "simd/foreach_isa.inc"

// The three steps of the computation, over ranges of their items.
struct Steps {
  void (*summarise)(const LinearAttention&, int64_t begin, int64_t end);  // parts of heads of images
  void (*combine)(const LinearAttention&, int64_t begin, int64_t end);    // heads of images
  void (*attend)(const LinearAttention&, int64_t begin, int64_t end);     // chunks of positions of images
};

#define FD_STEPS(isa, T) \
  Steps { isa::summarise<T>, isa::combine, isa::attend<T> }

template <class T>
Steps steps_for(Simd isa) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (includes(isa, Simd::avx512_bf16)) return FD_STEPS(avx512_bf16, T);
  }
  if (includes(isa, Simd::avx512)) return FD_STEPS(avx512, T);
  if (includes(isa, Simd::avx2)) return FD_STEPS(avx2, T);
#else
  (void)isa;
#endif
  return FD_STEPS(baseline, T);
}

Steps steps_for(ScalarType type) {
  const Simd isa = simd_in_use();
  if (type == ScalarType::Float) return steps_for<float>(isa);
  return type == ScalarType::Half ? steps_for<Half>(isa) : steps_for<BFloat16>(isa);
}

Heads heads_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.numel() == 0 || x.size(2) <= 1 || x.stride(2) == 1, name, " must have neighbouring channels");
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(3)};
}

void check_memory(const Tensor& memory, const Tensor& x, int64_t tokens, const char* name) {
  STD_TORCH_CHECK(memory.scalar_type() == ScalarType::Float && memory.is_contiguous() && memory.dim() == 3 &&
                      memory.size(0) == x.size(1) && memory.size(1) == x.size(2) && memory.size(2) == tokens,
                  name, " must be contiguous float32 [heads, channels, tokens]");
}

void linear_attention_(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& memory_k,
                       const std::optional<Tensor>& memory_v, double scale, Tensor out) {
  const ScalarType type = q.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "q must be float32, bfloat16 or float16");
  const auto fits = [&](const Tensor& x, int64_t channels) {
    return x.scalar_type() == type && x.dim() == 4 && x.size(0) == q.size(0) && x.size(1) == q.size(1) &&
           x.size(2) == channels && x.size(3) == q.size(3);
  };
  STD_TORCH_CHECK(q.dim() == 4 && v.dim() == 4 && fits(k, q.size(2)) && fits(v, v.size(2)) && fits(out, v.size(2)),
                  "q, k, v and out must be [N, heads, channels, positions] of one dtype");
  STD_TORCH_CHECK(memory_k.has_value() == memory_v.has_value(), "memory_k and memory_v go together");
  LinearAttention args{};
  if (memory_k.has_value()) {
    args.tokens = memory_k->dim() == 3 ? memory_k->size(2) : 0;
    check_memory(*memory_k, k, args.tokens, "memory_k");
    check_memory(*memory_v, v, args.tokens, "memory_v");
    args.memory_k = static_cast<const float*>(memory_k->const_data_ptr());
    args.memory_v = static_cast<const float*>(memory_v->const_data_ptr());
  }
  args.q = heads_of(q, "q");
  args.k = heads_of(k, "k");
  args.v = heads_of(v, "v");
  args.out = heads_of(out, "out");
  args.samples = q.size(0);
  args.heads = q.size(1);
  args.key_channels = q.size(2);
  args.positions = q.size(3);
  args.value_channels = v.size(2);
  args.scale = static_cast<float>(scale);
  STD_TORCH_CHECK(args.key_channels > 0, "q must have channels");
  if (out.numel() == 0) return;
  const Steps steps = steps_for(type);
  const auto call = [=] {
    LinearAttention now = args;
    const int64_t images = now.samples * now.heads, products = now.key_channels * now.value_channels;
    now.summaries = buffer(images * now.parts() * now.summary_size(), 1);
    divide_work(images * now.parts(), kChunk * products, kProductsPerThread,
                [&](int64_t begin, int64_t end) { steps.summarise(now, begin, end); });
    divide_work(images, now.parts() * products, kProductsPerThread,
                [&](int64_t begin, int64_t end) { steps.combine(now, begin, end); });
    const int64_t chunks = (now.positions + kChunk - 1) / kChunk;
    divide_work(now.samples * chunks, now.heads * kChunk * products, kProductsPerThread,
                [&](int64_t begin, int64_t end) { steps.attend(now, begin, end); });
  };
  run_or_record(call, q, k, v, memory_k, memory_v, out);
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CPU, m) {
  m.impl("linear_attention_", TORCH_BOX(&fused_diffusion::linear_attention_));
}
