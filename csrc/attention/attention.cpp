// fused_diffusion::attention, its gradient, and fused_diffusion::attention_ for networks that are planned for sampling,
// on the CPU: blocks of queries, divided among threads.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <utility>

#include "attention/args.h"
#include "attention/attention_amx.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "runtime/recorded_calls.h"
#include "simd/dispatch.h"

namespace fused_diffusion {
namespace {

constexpr int64_t kQueries = 64, kKeys = 128;  // of a block: its logits stay in the first two caches
constexpr int64_t kWorkPerThread = 1 << 19;    // multiply-adds, some ten microseconds
constexpr int64_t kHeadsToFillThreads = 16;    // the gradient of fewer heads is divided into chunks of queries
constexpr int64_t kMinChunkQueries = 128;      // of such a chunk

// The kernels of one instruction set for one element type.
struct AttentionKernels {
  void (*forward)(const AttentionArguments&, int64_t queries, int64_t begin, int64_t end);
  void (*backward)(const AttentionGradientArguments&, int64_t queries, float* partial, int64_t begin, int64_t end);
  void (*add_partial_sums)(const AttentionGradientArguments&, int64_t queries, const float* partial, int64_t begin,
                           int64_t end);
  int64_t lanes;
};

#define FD_PER_ISA "attention/attention_cpu.h"
#define FD_ISAS (FD_ISAS_FLOAT32 | FD_ISA_AVX512_BF16)
#include "simd/foreach_isa.inc"

// pairs: whether to multiply pairs of bfloat16, where the processor does.
template <class T>
AttentionKernels kernels(bool pairs = true) {
  const Simd isa = simd_in_use();
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (pairs && includes(isa, Simd::avx512_bf16)) return avx512_bf16::kernels_of<T, avx512_bf16::WeightPairs>();
  }
#endif
  return FD_DISPATCH(isa, kernels_of<T>());
}

// A query's arithmetic does not depend on its block, so the number of threads does not change the output.
void attend(const AttentionKernels& set, const AttentionArguments& g) {
  const int64_t heads = g.batch * g.heads, threads = torch::stable::get_num_threads();
  int64_t queries = kQueries;
  while (queries > 16 && heads * divide_up(g.positions, queries) < threads) queries /= 2;
  divide_work(heads * divide_up(g.positions, queries), 2 * queries * g.keys * g.width, kWorkPerThread,
              [&](int64_t begin, int64_t end) { set.forward(g, queries, begin, end); });
}

struct CpuAttention {
  template <class T>
  void operator()(const AttentionArguments& g, T*) const {
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (amx_serves(g.positions)) return amx_attention<T>(g);
    }
    attend(kernels<T>(), g);
  }
};

struct CpuAttentionGradient {
  const Tensor& q;

  template <class T>
  void operator()(const AttentionGradientArguments& g, T*) const {
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (amx_serves(g.positions)) return amx_attention_gradient(g);
    }
    const AttentionKernels set = kernels<T>();
    // The division into chunks depends on the shape alone, so the number of threads does not change the sums.
    const int64_t heads = g.batch * g.heads, S = g.positions, work = 5 * S * S * g.width;
    const int64_t chunks = std::min(divide_up(S, kMinChunkQueries), divide_up(kHeadsToFillThreads, heads));
    const int64_t queries = round_up(divide_up(S, chunks), kQueries), items = heads * divide_up(S, queries);
    if (items == heads) {
      return divide_work(heads, work, kWorkPerThread,
                         [&](int64_t begin, int64_t end) { set.backward(g, queries, nullptr, begin, end); });
    }
    Tensor partial_sums =
        torch::stable::new_empty(q, {2 * items * S * round_up(g.width, set.lanes)}, ScalarType::Float);
    float* partial = static_cast<float*>(partial_sums.mutable_data_ptr());
    divide_work(items, work * heads / items, kWorkPerThread,
                [&](int64_t begin, int64_t end) { set.backward(g, queries, partial, begin, end); });
    divide_work(heads * S, 16 * g.width, kWorkPerThread,
                [&](int64_t begin, int64_t end) { set.add_partial_sums(g, queries, partial, begin, end); });
  }
};

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  return checked_attention(q, k, v, scale, CpuAttention{});
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                                                      double scale) {
  return checked_attention_gradient(grad, q, k, v, out, logsumexp, scale, CpuAttentionGradient{q});
}

// The keys and values may have other positions than the queries. fast: products of numbers rounded to bfloat16, where
// the processor multiplies these by AMX or, for bfloat16 tensors, in pairs.
void attention_(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool fast, Tensor out) {
  check_attention(q, q, "q");
  check_keys(k, k, q, "k");
  check_keys(v, k, q, "v");
  check_attention(out, q, "out");
  STD_TORCH_CHECK(q.numel() == 0 || k.size(2) > 0, "k must have at least one position");
  const auto launch = [&](const AttentionArguments& g, auto* type) {
    typedef std::remove_pointer_t<decltype(type)> T;
    if (fast && includes(simd_in_use(), Simd::amx)) {
      run_or_record([=] { amx_attention<T>(g); }, q, k, v, out);
    } else {
      run_or_record([g, set = kernels<T>(fast)] { attend(set, g); }, q, k, v, out);
    }
  };
  launch_attention(q, launch,
                   AttentionArguments{input(q), input(k), input(v), output(out), nullptr, q.size(0), q.size(1),
                                      q.size(2), q.size(3), k.size(2), static_cast<float>(scale)});
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CPU, m) {
  m.impl("attention_", TORCH_BOX(&fused_diffusion::attention_));
  m.impl("attention", TORCH_BOX(&fused_diffusion::attention));
  m.impl("attention_backward", TORCH_BOX(&fused_diffusion::attention_backward));
}
