// fused_diffusion::attention and its gradient on the CPU: tiles of queries, shared among threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "attention/args.h"
#include "attention/attention_amx.h"
#include "common/parallel.h"
#include "simd/dispatch.h"
#include "common/targets.h"

#if defined(__clang__)
#define FD_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FD_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Integers{__VA_ARGS__})
#endif

namespace fused_diffusion {
namespace {

constexpr int64_t kQueries = 64, kKeys = 128;   // of a tile: its logits stay in the first two caches
constexpr int64_t kWorkPerThread = 1 << 19;     // multiply-adds, some ten microseconds
constexpr int64_t kHeadsToFillThreads = 16;     // fewer heads are divided into chunks of queries
constexpr int64_t kChunkQueries = 128;          // at least, in the backward pass

FD_HD int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The calling thread's buffer, kept from call to call: fresh pages cost more than a small attention.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    static thread_local std::unique_ptr<float[]> buffer;
    static thread_local int64_t capacity = 0;
    const int64_t size = floats + 16 * kMostTakes;
    if (size > capacity) {
      buffer.reset();
      buffer.reset(new float[size]);
      capacity = size;
    }
    next_ = buffer.get();
  }

  // Aligned to a cache line.
  float* take(int64_t floats) {
    const uintptr_t line = (reinterpret_cast<uintptr_t>(next_) + 63) / 64 * 64;
    float* taken = reinterpret_cast<float*>(line);
    next_ = taken + floats;
    return taken;
  }

 private:
  static constexpr int64_t kMostTakes = 16;
  float* next_;
};

namespace baseline {
#define FD_LANES 4
#define FD_VECTORS 2
#define FD_PAIRS 0
#include "attention/attention_cpu.h"
}  // namespace baseline

#if defined(__x86_64__)
FD_TARGET("avx2,fma")
namespace avx2 {
#define FD_LANES 8
#define FD_VECTORS 2
#define FD_PAIRS 0
#include "attention/attention_cpu.h"
}  // namespace avx2
FD_END_TARGET

FD_TARGET("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
#define FD_LANES 16
#define FD_VECTORS 4
#define FD_PAIRS 0
#include "attention/attention_cpu.h"
}  // namespace avx512
FD_END_TARGET

FD_TARGET("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
namespace avx512_bf16 {
#define FD_LANES 16
#define FD_VECTORS 4
#define FD_PAIRS 1
#include "attention/attention_cpu.h"
}  // namespace avx512_bf16
FD_END_TARGET
#endif

// The kernels of one instruction set for one element type.
struct Kernels {
  void (*forward)(const AttentionArguments&, int64_t queries, int64_t begin, int64_t end);
  void (*backward)(const AttentionGradientArguments&, int64_t queries, float* shares, int64_t begin, int64_t end);
  void (*add_shares)(const AttentionGradientArguments&, int64_t queries, const float* shares, int64_t begin,
                     int64_t end);
  int64_t lanes;
};

template <class T>
Kernels kernels() {
#if defined(__x86_64__)
#define FD_KERNELS(set, math) \
  { set::forward<set::math, T>, set::backward<set::math, T>, set::add_shares<T>, set::kLanes }
  const Simd simd = simd_in_use();
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (simd >= Simd::avx512_bf16) return FD_KERNELS(avx512_bf16, Pairs);
  }
  if (simd >= Simd::avx512) return FD_KERNELS(avx512, Singles);
  if (simd == Simd::avx2) return FD_KERNELS(avx2, Singles);
#endif
  return FD_KERNELS(baseline, Singles);
}

template <class Run>
void share(int64_t items, int64_t work_per_item, const Run& run) {
  parallel_for(0, items, std::max<int64_t>(1, kWorkPerThread / work_per_item), run);
}

struct Forward {
  template <class T>
  void operator()(const AttentionArguments& g, T*) const {
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (amx_attends(g.positions)) return amx_attention(g);
    }
    const Kernels set = kernels<T>();
    const int64_t heads = g.batch * g.heads, threads = torch::stable::get_num_threads();
    int64_t queries = kQueries;
    while (queries > 16 && heads * divide_up(g.positions, queries) < threads) queries /= 2;
    share(heads * divide_up(g.positions, queries), 2 * queries * g.positions * g.width,
          [&](int64_t begin, int64_t end) { set.forward(g, queries, begin, end); });
  }
};

struct Backward {
  const Tensor& q;

  template <class T>
  void operator()(const AttentionGradientArguments& g, T*) const {
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (amx_attends(g.positions)) return amx_attention_gradient(g);
    }
    const Kernels set = kernels<T>();
    // The division depends on the shape alone, and so do the sums, whatever the number of threads.
    const int64_t heads = g.batch * g.heads, S = g.positions, work = 5 * S * S * g.width;
    const int64_t chunks =
        std::min(divide_up(S, kChunkQueries), divide_up(kHeadsToFillThreads, heads));
    const int64_t queries = round_up(divide_up(S, chunks), kQueries), items = heads * divide_up(S, queries);
    if (items == heads) {
      return share(heads, work, [&](int64_t begin, int64_t end) { set.backward(g, queries, nullptr, begin, end); });
    }
    Tensor buffer = torch::stable::new_empty(
        q, {2 * items * S * round_up(g.width, set.lanes)}, ScalarType::Float);
    float* shares = static_cast<float*>(buffer.mutable_data_ptr());
    share(items, work * heads / items, [&](int64_t begin, int64_t end) { set.backward(g, queries, shares, begin, end); });
    share(heads * S, 16 * g.width,
          [&](int64_t begin, int64_t end) { set.add_shares(g, queries, shares, begin, end); });
  }
};

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  return checked_attention(q, k, v, scale, Forward{});
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& out,
                                                      const Tensor& logsumexp, double scale) {
  return checked_attention_gradient(grad, q, k, v, out, logsumexp, scale, Backward{q});
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CPU, m) {
  m.impl("attention", TORCH_BOX(&fused_diffusion::attention));
  m.impl("attention_backward", TORCH_BOX(&fused_diffusion::attention_backward));
}
