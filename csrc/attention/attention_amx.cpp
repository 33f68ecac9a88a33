// Attention on a CPU with AMX: fused_diffusion::attention_amx_, for the planned UNet of sampling, and the kernels of
// bfloat16 and its gradient that attention/attention.cpp calls.
//
// Keys and values are packed once for a head; then 32 queries at a time are multiplied by all keys, go through the
// softmax, and are multiplied by all values. All logits of 32 queries are kept in memory, and for the gradient all
// weights of a head, so this is for images, not for long sequences.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "attention/args.h"
#include "attention/attention_amx.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "runtime/recorded_calls.h"
#include "simd/dispatch.h"

namespace fused_diffusion {
namespace {

constexpr int64_t kBlock = 32;               // queries, keys or numbers of the width that are multiplied together
constexpr int64_t kPackedBytes = 1 << 20;    // of keys and values packed at a time, for each thread
constexpr int64_t kWorkPerThread = 1 << 13;  // in cycles, roughly

// The packed keys and values of a group of heads: for each head the keys, as right factors [block of keys], then the
// values, as right factors [block of the width].
struct PackedKeysValues {
  int64_t keys, width;   // in blocks
  int64_t splits;        // bfloat16 splits of each number: 1 or 3
  int64_t first, heads;  // first head of the group, count
  char* data;

  FD_HD int64_t block_bytes() const { return splits * kBlock * kBlock * 2; }
  FD_HD int64_t head_bytes() const { return 2 * keys * width * block_bytes(); }
  FD_HD char* keys_of(int64_t head) const { return data + (head - first) * head_bytes(); }
  FD_HD char* values_of(int64_t head) const { return keys_of(head) + head_bytes() / 2; }
};

#define FD_PER_ISA "attention/amx_cpu.h"
#define FD_ISAS FD_ISA_AMX
#include "simd/foreach_isa.inc"

#if FD_AMX
// kSplits: bfloat16 splits of each number, 1 or 3.
template <class T, int kSplits>
void run(const AttentionArguments& g) {
  PackedKeysValues packed{divide_up(g.positions, kBlock), divide_up(g.width, kBlock), kSplits, 0, 0, nullptr};
  const int64_t heads = g.batch * g.heads, budget = kPackedBytes * torch::stable::get_num_threads();
  const int64_t max_heads = std::min(heads, std::max<int64_t>(1, budget / packed.head_bytes()));
  packed.data = reinterpret_cast<char*>(buffer(max_heads * packed.head_bytes() / 4, 3));
  for (packed.first = 0; packed.first < heads; packed.first += max_heads) {
    packed.heads = std::min(max_heads, heads - packed.first);
    divide_work(packed.heads * packed.keys, packed.width * 512, kWorkPerThread,
                [&](int64_t begin, int64_t end) { amx::pack_blocks<T, kSplits>(g, packed, begin, end); });
    divide_work(packed.heads * divide_up(g.positions, kBlock), packed.keys * packed.width * 128, kWorkPerThread,
                [&](int64_t begin, int64_t end) { amx::attend<T, kSplits>(g, packed, begin, end); });
  }
}
#endif

}  // namespace

#if FD_AMX
bool amx_serves(int64_t positions) { return includes(simd_in_use(), Simd::amx) && positions <= kMaxAmxPositions; }

void amx_attention(const AttentionArguments& g) { run<BFloat16, 1>(g); }

void amx_attention_gradient(const AttentionGradientArguments& g) {
  parallel_for(0, g.batch * g.heads, 1, [&](int64_t begin, int64_t end) { amx::differentiate_heads(g, begin, end); });
}
#else
bool amx_serves(int64_t) { return false; }
void amx_attention(const AttentionArguments&) {}
void amx_attention_gradient(const AttentionGradientArguments&) {}
#endif

namespace {

void attention_amx_(const Tensor& q, const Tensor& k, const Tensor& v, double scale, int64_t splits, Tensor out) {
  STD_TORCH_CHECK(includes(simd_in_use(), Simd::amx), "this processor has no AMX");
  STD_TORCH_CHECK(splits == 1 || splits == 3, "splits must be 1 or 3");
  check_attention(q, q, "q");
  check_attention(k, q, "k");
  check_attention(v, q, "v");
  check_attention(out, q, "out");
  if (q.numel() == 0) return;
  const AttentionArguments g{input(q),  input(k),  input(v),  output(out), nullptr,
                             q.size(0), q.size(1), q.size(2), q.size(3),   static_cast<float>(scale)};
#if FD_AMX
  const auto with = [&](auto* type) {
    typedef std::remove_pointer_t<decltype(type)> T;
    if (splits == 1) run_or_record([=] { run<T, 1>(g); }, q, k, v, out);
    else run_or_record([=] { run<T, 3>(g); }, q, k, v, out);
  };
  switch (q.scalar_type()) {
    case ScalarType::Float: return with(static_cast<float*>(nullptr));
    case ScalarType::BFloat16: return with(static_cast<BFloat16*>(nullptr));
    case ScalarType::Half: return with(static_cast<Half*>(nullptr));
    default: STD_TORCH_CHECK(false, "q must be float32, bfloat16 or float16");
  }
#endif
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CPU, m) {
  m.impl("attention_amx_", TORCH_BOX(&fused_diffusion::attention_amx_));
}
