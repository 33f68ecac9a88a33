// Attention by AMX, as products of numbers rounded to bfloat16, and its gradient in bfloat16: the kernels that
// attention/attention.cpp calls.
//
// Keys and values are packed once for a head. The softmax is online over blocks of keys, whose logits stay in the
// second cache. The gradient keeps all weights of a head in memory, so it is for images, not for long sequences.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "attention/args.h"
#include "attention/attention_amx.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "simd/dispatch.h"

namespace fused_diffusion {
namespace {

constexpr int64_t kBlock = 32;               // queries, keys or numbers of the width that are multiplied together
constexpr int64_t kTile = 1024;              // bytes of a tile
constexpr int64_t kKeyBlock = 256;           // keys of a step of the online softmax
constexpr int64_t kMaxQueryBlocks = 4;       // blocks of queries that share one reading of the keys and values
constexpr int64_t kPackedBytes = 1 << 20;    // of keys and values packed at a time, for each thread
constexpr int64_t kWorkPerThread = 1 << 13;  // in cycles, roughly

// The packed keys and values of a group of heads: for each head the keys, as right factors [block of keys], then the
// values, as right factors [chunk of 32 numbers][block of keys]. The last chunk has one tile where that suffices.
struct PackedKeysValues {
  int64_t keys, width;   // in blocks
  int64_t value_tiles;   // the width in tiles of 16
  int64_t first, heads;  // first head of the group, count
  char* data;

  FD_HD int64_t key_bytes() const { return keys * width * 2 * kTile; }
  FD_HD int64_t head_bytes() const { return key_bytes() + keys * value_tiles * kTile; }
  FD_HD int64_t tiles_of(int64_t chunk) const { return value_tiles - 2 * chunk < 2 ? 1 : 2; }
  FD_HD char* key_block(int64_t head, int64_t block) const {
    return data + (head - first) * head_bytes() + block * width * 2 * kTile;
  }
  FD_HD char* value_block(int64_t head, int64_t chunk, int64_t block) const {
    return data + (head - first) * head_bytes() + key_bytes() + (2 * chunk * keys + block * tiles_of(chunk)) * kTile;
  }
};

#define FD_PER_ISA "attention/amx_cpu.h"
#define FD_ISAS FD_ISA_AMX
#include "simd/foreach_isa.inc"

#if FD_AMX
template <class T>
void run(const AttentionArguments& g) {
  PackedKeysValues packed{divide_up(g.keys, kBlock), divide_up(g.width, kBlock), divide_up(g.width, 16), 0, 0, nullptr};
  const int64_t heads = g.batch * g.heads, threads = torch::stable::get_num_threads();
  const int64_t max_heads = std::min(heads, std::max<int64_t>(1, kPackedBytes * threads / packed.head_bytes()));
  packed.data = reinterpret_cast<char*>(buffer(max_heads * packed.head_bytes() / 4, 3));
  const int64_t blocks = divide_up(g.positions, kBlock);
  // A query's arithmetic does not depend on its group, so the number of threads does not change the output.
  int64_t group = kMaxQueryBlocks;
  while (group > 1 && max_heads * divide_up(blocks, group) < 2 * threads) group /= 2;
  for (packed.first = 0; packed.first < heads; packed.first += max_heads) {
    packed.heads = std::min(max_heads, heads - packed.first);
    divide_work(packed.heads * packed.keys, packed.width * 512, kWorkPerThread,
                [&](int64_t begin, int64_t end) { amx::pack_blocks<T>(g, packed, begin, end); });
    divide_work(packed.heads * divide_up(blocks, group), group * packed.keys * packed.width * 128, kWorkPerThread,
                [&](int64_t begin, int64_t end) { amx::attend<T>(g, packed, group, begin, end); });
  }
}
#endif

}  // namespace

#if FD_AMX
bool amx_serves(int64_t positions) { return includes(simd_in_use(), Simd::amx) && positions <= kMaxAmxPositions; }

template <class T>
void amx_attention(const AttentionArguments& g) {
  run<T>(g);
}

void amx_attention_gradient(const AttentionGradientArguments& g) {
  parallel_for(0, g.batch * g.heads, 1, [&](int64_t begin, int64_t end) { amx::differentiate_heads(g, begin, end); });
}
#else
bool amx_serves(int64_t) { return false; }
template <class T>
void amx_attention(const AttentionArguments&) {}
void amx_attention_gradient(const AttentionGradientArguments&) {}
#endif

template void amx_attention<float>(const AttentionArguments&);
template void amx_attention<BFloat16>(const AttentionArguments&);
template void amx_attention<Half>(const AttentionArguments&);

}  // namespace fused_diffusion
