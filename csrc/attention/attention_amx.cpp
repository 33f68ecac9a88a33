// Attention by AMX, and its gradient in bfloat16: the kernels that attention/attention.cpp calls.
//
// Keys and values are packed once for a head. The softmax is online over blocks of keys, whose logits stay in the
// second cache. The gradient keeps all weights of a head in memory, so it is for images, not for long sequences.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <type_traits>

#include "attention/args.h"
#include "attention/attention_amx.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "simd/dispatch.h"

namespace fused_diffusion {
namespace {

constexpr int64_t kTile = 1024;              // bytes of a tile
constexpr int64_t kBlock = 32;               // queries that are multiplied together
constexpr int64_t kKeyBlock = 256;           // keys of a step of the online softmax
constexpr int64_t kSliceKeys = 64;           // keys of a query whose weights are computed together
constexpr int64_t kMaxQueryBlocks = 8;       // blocks of queries that share one reading of the keys and values
constexpr int64_t kMaxSteps = 64;            // of such a group, where it has more than 4 blocks
constexpr int64_t kPackedBytes = 1 << 20;    // of keys and values packed at a time, for each thread
constexpr int64_t kWorkPerThread = 1 << 13;  // in cycles, roughly
constexpr float kLargestLimb = 127;          // the largest magnitude of a top limb

// The packed keys and values of a group of heads: for each head a header, the keys in panels of right factors
// [panel][chunk of the width][piece][tile], and the values, [panel of columns][chunk of keys][piece][tile].
struct PackedKeysValues {
  int64_t keys, tiles;               // keys, and the width of values in tiles of 16
  int64_t key_panels, width_chunks;  // of keys
  int64_t value_panels, key_chunks;  // of values
  int64_t pieces, panel_key_tiles, panel_value_tiles, header_bytes;
  int64_t blocks_of_values = 1;  // that are packed apart
  int64_t first = 0, heads = 0;  // first head of the group, count
  char* data = nullptr;
  std::atomic<bool>* refusals = nullptr;  // for each head of the group: whether other kernels compute it

  template <class Products>
  static PackedKeysValues of(const AttentionArguments& g) {
    PackedKeysValues p{};
    p.keys = g.keys, p.tiles = divide_up(g.width, 16);
    p.key_panels = divide_up(g.keys, Products::kKeys), p.width_chunks = divide_up(g.width, Products::kDepth);
    p.value_panels = divide_up(g.width, Products::kColumns), p.key_chunks = divide_up(g.keys, Products::kDepth);
    p.pieces = Products::kPieces, p.panel_key_tiles = Products::kKeys / 16;
    p.panel_value_tiles = Products::kColumns / 16;
    p.header_bytes = Products::header_bytes(p);
    if (p.header_bytes > 0) p.blocks_of_values = divide_up(g.keys, kKeyBlock);
    return p;
  }

  FD_HD int64_t items() const { return key_panels + value_panels * blocks_of_values; }
  FD_HD int64_t panel_bytes() const { return width_chunks * pieces * panel_key_tiles * kTile; }
  FD_HD int64_t value_tiles(int64_t panel) const {
    const int64_t remaining = tiles - panel * panel_value_tiles;
    return remaining < panel_value_tiles ? remaining : panel_value_tiles;
  }
  FD_HD int64_t head_bytes() const {
    return header_bytes + key_panels * panel_bytes() + tiles * key_chunks * pieces * kTile;
  }
  FD_HD char* at(int64_t head) const { return data + (head - first) * head_bytes(); }
  FD_HD float* header(int64_t head) const { return reinterpret_cast<float*>(at(head)); }
  FD_HD char* key_panel(int64_t head, int64_t panel) const { return at(head) + header_bytes + panel * panel_bytes(); }
  FD_HD char* value_panel(int64_t head, int64_t panel, int64_t chunk) const {
    const int64_t before = panel * panel_value_tiles * key_chunks + chunk * value_tiles(panel);
    return key_panel(head, key_panels) + before * pieces * kTile;
  }

  FD_HD bool refused(int64_t head) const {
    return refusals != nullptr && refusals[head - first].load(std::memory_order_relaxed);
  }
  FD_HD void refuse(int64_t head) const { refusals[head - first].store(true, std::memory_order_relaxed); }
};

#define FD_PER_ISA "attention/amx_cpu.h"
#define FD_ISAS FD_ISA_AMX
#include "simd/foreach_isa.inc"

#if FD_AMX
// prepare(packed): called before each group of heads is packed; finish(packed): after it is attended to.
template <class T, class Products, bool kPrecise, class Prepare, class Finish>
void run(const AttentionArguments& g, const Prepare& prepare, const Finish& finish) {
  PackedKeysValues packed = PackedKeysValues::of<Products>(g);
  const int64_t heads = g.batch * g.heads, threads = torch::stable::get_num_threads();
  const int64_t max_heads = std::min(heads, std::max<int64_t>(1, kPackedBytes * threads / packed.head_bytes()));
  packed.data = reinterpret_cast<char*>(buffer(max_heads * packed.head_bytes() / 4, 3));
  const int64_t blocks = divide_up(g.positions, kBlock), steps = divide_up(g.keys, kKeyBlock);
  // A query's arithmetic does not depend on its group, so the number of threads does not change the output.
  int64_t group = kMaxQueryBlocks * steps > kMaxSteps ? kMaxQueryBlocks / 2 : kMaxQueryBlocks;
  while (group > 1 && max_heads * divide_up(blocks, group) < 2 * threads) group /= 2;
  const int64_t block_work = Products::kPieces * packed.width_chunks * Products::kDepth;
  for (packed.first = 0; packed.first < heads; packed.first += max_heads) {
    packed.heads = std::min(max_heads, heads - packed.first);
    prepare(packed);
    divide_work(packed.heads * packed.items(), block_work * Products::kKeys / 2, kWorkPerThread,
                [&](int64_t begin, int64_t end) { Products::template pack<T>(g, packed, begin, end); });
    divide_work(packed.heads * divide_up(blocks, group), group * g.keys * block_work / 8, kWorkPerThread,
                [&](int64_t begin, int64_t end) { amx::attend<T, Products, kPrecise>(g, packed, group, begin, end); });
    finish(packed);
  }
}
#endif

}  // namespace

#if FD_AMX
bool amx_serves(int64_t positions) { return includes(simd_in_use(), Simd::amx) && positions <= kMaxAmxPositions; }

template <class T>
void amx_attention(const AttentionArguments& g) {
  const auto nothing = [](const PackedKeysValues&) {};
  if (g.logsumexp != nullptr) run<T, amx::Bfloat16Products, true>(g, nothing, nothing);
  else run<T, amx::Bfloat16Products, false>(g, nothing, nothing);
}

template <class T>
void amx_exact_attention(const AttentionArguments& g, AttentionKernel other) {
  const std::unique_ptr<std::atomic<bool>[]> refusals(new std::atomic<bool>[g.batch * g.heads]);
  const auto prepare = [&](PackedKeysValues& packed) {
    packed.refusals = refusals.get();
    for (int64_t i = 0; i < packed.heads; ++i) refusals[i].store(false, std::memory_order_relaxed);
    divide_work(packed.heads * g.positions, g.width / 8, kWorkPerThread,
                [&](int64_t begin, int64_t end) { amx::LimbProducts::check_queries<T>(g, packed, begin, end); });
  };
  const auto finish = [&](const PackedKeysValues& packed) {
    const int64_t blocks = divide_up(g.positions, kBlock);
    for (int64_t head = packed.first; head < packed.first + packed.heads; ++head) {
      if (packed.refused(head)) other(g, kBlock, head * blocks, (head + 1) * blocks);
    }
  };
  run<T, amx::LimbProducts, true>(g, prepare, finish);
}

void amx_attention_gradient(const AttentionGradientArguments& g) {
  parallel_for(0, g.batch * g.heads, 1, [&](int64_t begin, int64_t end) { amx::differentiate_heads(g, begin, end); });
}
#else
bool amx_serves(int64_t) { return false; }
template <class T>
void amx_attention(const AttentionArguments&) {}
template <class T>
void amx_exact_attention(const AttentionArguments&, AttentionKernel) {}
void amx_attention_gradient(const AttentionGradientArguments&) {}
#endif

template void amx_attention<float>(const AttentionArguments&);
template void amx_attention<BFloat16>(const AttentionArguments&);
template void amx_attention<Half>(const AttentionArguments&);
template void amx_exact_attention<float>(const AttentionArguments&, AttentionKernel);
template void amx_exact_attention<BFloat16>(const AttentionArguments&, AttentionKernel);
template void amx_exact_attention<Half>(const AttentionArguments&, AttentionKernel);

}  // namespace fused_diffusion
