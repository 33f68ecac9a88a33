// fused_diffusion::attention_parts_ on a CPU with AMX: attention without a gradient, as products of tiles.
//
// Keys and values are packed once for a head; then 32 queries at a time are multiplied with all keys, normalised, and
// multiplied with all values. All logits of 32 queries are kept, so this is for maps, not for long sequences.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "attention.h"
#include "cpu.h"
#include "program.h"
#include "scratch.h"
#include "targets.h"

#if FD_AMX
#include <immintrin.h>
#endif

namespace fused_diffusion {
namespace {

constexpr int64_t kBlock = 32;                 // queries, keys or numbers of a head that are multiplied together
constexpr int64_t kPackedBytes = 1 << 20;      // for each thread: of keys and values at a time
constexpr int64_t kWorkPerThread = 1 << 13;    // of kBlock * kBlock numbers to pack, or products of such blocks

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The sizes in blocks, and where what is packed lies: for each head keys, as right factors of [block of keys], then
// values, as right factors of [block of numbers].
struct Packed {
  int64_t keys, width, parts;  // blocks, blocks, number
  int64_t first, heads;        // of this group
  char* data;

  FD_HD int64_t block_bytes() const { return parts * kBlock * kBlock * 2; }
  FD_HD int64_t head_bytes() const { return 2 * keys * width * block_bytes(); }
  FD_HD char* keys_of(int64_t head) const { return data + (head - first) * head_bytes(); }
  FD_HD char* values_of(int64_t head) const { return keys_of(head) + head_bytes() / 2; }
};

#if FD_AMX
FD_TARGET("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,amx-int8")
namespace amx {
#define FD_LANES 16
#define FD_BFLOAT16 1
#define FD_RECIPROCALS 1
#include "vectors.h"
#include "matrix_amx.h"

// 16 numbers from a row on, of which some, or the row, may lie beyond the tensor's.
template <class T>
FD_HD Vec numbers(const T* row, int64_t at, int64_t width, bool inside) {
  const int64_t left = inside ? width - at : 0;
  return left >= kLanes ? load(row + at) : left > 0 ? load(row + at, left) : Vec{};
}

// The transposed of 16 x 16 words.
FD_HD void transpose(__m512i (&rows)[16]) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
  for (int distance = 1; distance < 16; distance *= 2) {
    const __mmask16 odd = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(distance));
    const __m512i back = _mm512_add_epi32(lane, _mm512_set1_epi32(16 - distance));
    const __m512i low = _mm512_mask_mov_epi32(lane, odd, back);
    const __m512i ahead = _mm512_add_epi32(lane, _mm512_set1_epi32(distance));
    const __m512i high = _mm512_mask_mov_epi32(ahead, odd, _mm512_add_epi32(lane, _mm512_set1_epi32(16)));
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if ((i & distance) == 0) {
        const __m512i a = rows[i], b = rows[i + distance];
        rows[i] = _mm512_permutex2var_epi32(a, low, b);
        rows[i + distance] = _mm512_permutex2var_epi32(a, high, b);
      }
    }
  }
}

// A block of keys, [16 keys][32 numbers] twice, as tiles of [pair of numbers][16 keys][2].
template <class T, int kParts>
FD_HD void pack_keys(const AttentionArguments& g, const Packed& packed, int64_t head, int64_t block) {
  alignas(64) char rows[kParts][kBlock][kRowBytes];
  char* to = packed.keys_of(head) + block * packed.width * packed.block_bytes();
  const T* from = g.k.at<const T>(head / g.heads, head % g.heads);
  for (int64_t chunk = 0; chunk < packed.width; ++chunk) {
    for (int64_t i = 0; i < kBlock; ++i) {
      const int64_t key = block * kBlock + i, at = chunk * kBlock;
      const bool inside = key < g.positions;
      const T* row = from + (inside ? key : 0) * g.k.row;
      store_parts<kParts>(rows[0][i], kBlock * kRowBytes, numbers(row, at, g.width, inside),
                          numbers(row, at + kLanes, g.width, inside));
    }
    for (int part = kParts - 1; part >= 0; --part) {
      for (int64_t tile = 0; tile < 2; ++tile, to += kTileBytes) {
        __m512i words[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) words[i] = _mm512_load_si512(rows[part][16 * tile + i]);
        transpose(words);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * kRowBytes, words[i]);
      }
    }
  }
}

// A block of values, as tiles of [pair of values][16 numbers][2] for each block of numbers.
template <class T, int kParts>
FD_HD void pack_values(const AttentionArguments& g, const Packed& packed, int64_t head, int64_t block) {
  alignas(64) static constexpr int16_t kPairs[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i pairs = _mm512_load_si512(kPairs);
  const T* from = g.v.at<const T>(head / g.heads, head % g.heads);
  for (int64_t chunk = 0; chunk < packed.width; ++chunk) {
    char* to = packed.values_of(head) + (chunk * packed.keys + block) * packed.block_bytes();
    for (int64_t pair = 0; pair < kBlock / 2; ++pair) {
      const int64_t value = block * kBlock + 2 * pair;
      for (int64_t tile = 0; tile < 2; ++tile) {
        alignas(64) char both[kParts][kRowBytes];
        const int64_t at = chunk * kBlock + tile * kLanes;
        const bool first = value < g.positions, second = value + 1 < g.positions;
        store_parts<kParts>(both[0], kRowBytes, numbers(from + (first ? value : 0) * g.v.row, at, g.width, first),
                            numbers(from + (second ? value + 1 : 0) * g.v.row, at, g.width, second));
        for (int part = 0; part < kParts; ++part) {
          const __m512i words = _mm512_permutexvar_epi16(pairs, _mm512_load_si512(both[part]));
          char* there = to + ((kParts - 1 - part) * 2 + tile) * kTileBytes + pair * kRowBytes;
          _mm512_storeu_si512(there, words);
        }
      }
    }
  }
}

// Items: blocks of keys and values of all heads of the group.
template <class T, int kParts>
void pack_blocks(const AttentionArguments& g, const Packed& packed, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    pack_keys<T, kParts>(g, packed, packed.first + item / packed.keys, item % packed.keys);
    pack_values<T, kParts>(g, packed, packed.first + item / packed.keys, item % packed.keys);
  }
}

// A row of logits to weights, as a row of the left factor; returns one over the weights' sum.
template <int kParts>
FD_HD float soften(const float* logits, int64_t keys, int64_t blocks, float scale, char* to) {
  Vec most = spread(-__builtin_inff());
  const auto inside = [&](int64_t at) FD_INLINE {
    const int64_t left = keys - at;
    return static_cast<__mmask16>(left >= kLanes ? 0xFFFF : left > 0 ? (1 << left) - 1 : 0);
  };
  for (int64_t at = 0; at < keys; at += kLanes) {
    most = (Vec)_mm512_mask_max_ps(most, inside(at), most, load(logits + at) * spread(scale));
  }
  const Vec largest = spread(_mm512_reduce_max_ps(most));
  Vec sum = {};
  for (int64_t block = 0; block < blocks; ++block, to += kParts * kBlock * kRowBytes) {
    Vec weights[2];
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t at = block * kBlock + half * kLanes;
      const Vec weight = power_of_two<float>(load(logits + at) * spread(scale) - largest);
      weights[half] = (Vec)_mm512_maskz_mov_ps(inside(at), weight);
      sum += weights[half];
    }
    store_parts<kParts>(to, kBlock * kRowBytes, weights[0], weights[1]);
  }
  return 1.0f / _mm512_reduce_add_ps(sum);
}

// Items: blocks of queries of all heads of the group.
template <class T, int kParts>
void attend(const AttentionArguments& g, const Packed& packed, int64_t begin, int64_t end) {
  load_shapes();
  alignas(64) float sums[kBlock * kBlock], inverse[kBlock];
  const int64_t keys = packed.keys * kBlock, blocks = divide_up(g.positions, kBlock), no_tap = 0;
  const int64_t left_bytes = kParts * kBlock * kRowBytes;
  float* logits = buffer(kBlock * keys, 0);
  char* queries = reinterpret_cast<char*>(buffer(packed.width * left_bytes / 4, 1));
  char* weights = reinterpret_cast<char*>(buffer(packed.keys * left_bytes / 4, 2));
  Factors f{};
  f.row_step = kRowBytes, f.part_step = kBlock * kRowBytes, f.chunk_step = left_bytes;
  f.taps = &no_tap, f.tap_count = 1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = packed.first + item / blocks, first = item % blocks * kBlock;
    const int64_t count = std::min(kBlock, g.positions - first), right_bytes = packed.block_bytes();
    const T* from = g.q.at<const T>(head / g.heads, head % g.heads) + first * g.q.row;
    T* out = g.out.at<T>(head / g.heads, head % g.heads) + first * g.out.row;
    for (int64_t chunk = 0; chunk < packed.width; ++chunk) {
      for (int64_t i = 0; i < kBlock; ++i) {
        const int64_t at = chunk * kBlock;
        const bool inside = i < count;
        const T* row = from + (inside ? i : 0) * g.q.row;
        store_parts<kParts>(queries + chunk * left_bytes + i * kRowBytes, kBlock * kRowBytes,
                            numbers(row, at, g.width, inside), numbers(row, at + kLanes, g.width, inside));
      }
    }
    f.left = queries, f.chunks = packed.width;
    for (int64_t block = 0; block < packed.keys; ++block) {
      f.right = packed.keys_of(head) + block * packed.width * right_bytes;
      sum_products<kParts>(count, kBlock, f, logits + block * kBlock, keys * 4, []() FD_INLINE {});
    }
    for (int64_t i = 0; i < count; ++i) {
      inverse[i] =
          soften<kParts>(logits + i * keys, g.positions, packed.keys, g.scale * kLog2E, weights + i * kRowBytes);
    }
    f.left = weights, f.chunks = packed.keys;
    for (int64_t block = 0; block < packed.width; ++block) {
      f.right = packed.values_of(head) + block * packed.keys * right_bytes;
      sum_products<kParts>(count, kBlock, f, sums, kBlock * 4, []() FD_INLINE {});
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t half = 0; half < 2; ++half) {
          const int64_t at = block * kBlock + half * kLanes, left = g.width - at;
          const Vec value = load(sums + i * kBlock + half * kLanes) * spread(inverse[i]);
          if (left >= kLanes) store(out + i * g.out.row + at, value);
          else if (left > 0) store(out + i * g.out.row + at, value, left);
        }
      }
    }
  }
  _tile_release();
}
}  // namespace amx
FD_END_TARGET

template <class T, int kParts>
void run(const AttentionArguments& g) {
  Packed packed{divide_up(g.positions, kBlock), divide_up(g.width, kBlock), kParts, 0, 0, nullptr};
  const int64_t heads = g.batch * g.heads, budget = kPackedBytes * torch::stable::get_num_threads();
  const int64_t most = std::min(heads, std::max<int64_t>(1, budget / packed.head_bytes()));
  packed.data = reinterpret_cast<char*>(buffer(most * packed.head_bytes() / 4, 3));
  for (packed.first = 0; packed.first < heads; packed.first += most) {
    packed.heads = std::min(most, heads - packed.first);
    const auto share = [](int64_t items, int64_t work, const auto& part) {
      torch::stable::parallel_for(0, items, std::max<int64_t>(1, kWorkPerThread / work), part);
    };
    share(packed.heads * packed.keys, packed.width * 512,
          [&](int64_t begin, int64_t end) { amx::pack_blocks<T, kParts>(g, packed, begin, end); });
    share(packed.heads * divide_up(g.positions, kBlock), packed.keys * packed.width * 128,
          [&](int64_t begin, int64_t end) { amx::attend<T, kParts>(g, packed, begin, end); });
  }
}
#endif

void attention_parts_(const Tensor& q, const Tensor& k, const Tensor& v, double scale, int64_t parts, Tensor out) {
  STD_TORCH_CHECK(simd_in_use() == Simd::amx, "this processor has no AMX");
  STD_TORCH_CHECK(parts == 1 || parts == 3, "there are 1 or 3 parts");
  check_attention(q, q, "q");
  check_attention(k, q, "k");
  check_attention(v, q, "v");
  check_attention(out, q, "out");
  if (q.numel() == 0) return;
  const AttentionArguments g{input(q), input(k), input(v), output(out), nullptr, q.size(0),
                             q.size(1), q.size(2), q.size(3), static_cast<float>(scale)};
#if FD_AMX
  const auto with = [&](auto* type) {
    typedef std::remove_pointer_t<decltype(type)> T;
    if (parts == 1) run_or_write([=] { run<T, 1>(g); });
    else run_or_write([=] { run<T, 3>(g); });
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
  m.impl("attention_parts_", TORCH_BOX(&fused_diffusion::attention_parts_));
}
