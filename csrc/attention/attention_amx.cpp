// Attention on a CPU with AMX, as products of tiles: fused_diffusion::attention_amx_, for networks that are prepared,
// and what attention/attention.cpp calls for bfloat16, with its gradient.
//
// Keys and values are packed once for a head; then 32 queries at a time are multiplied with all keys, normalised, and
// multiplied with all values. All logits of 32 queries are kept, and for the gradient all weights of a head, so this is
// for maps, not for long sequences.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "attention/args.h"
#include "attention/attention_amx.h"
#include "common/parallel.h"
#include "simd/dispatch.h"
#include "runtime/recorded_calls.h"
#include "common/scratch.h"
#include "common/targets.h"

#if FD_AMX
#include <immintrin.h>
#endif

namespace fused_diffusion {
namespace {

constexpr int64_t kBlock = 32;                 // queries, keys or numbers of a head that are multiplied together
constexpr int64_t kPackedBytes = 1 << 20;      // for each thread: of keys and values at a time
constexpr int64_t kWorkPerThread = 1 << 13;    // of kBlock * kBlock numbers to pack, or products of such blocks

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
#include "simd/vec.h"
#include "amx/tile_gemm.h"

// The rows of a head: positions, of `width` numbers each.
template <class T>
struct Rows {
  const T* data;
  int64_t step, positions, width;

  // 16 numbers of a row, of which some, or the row, may lie beyond the tensor's.
  FD_HD Vec read(int64_t position, int64_t at) const {
    const int64_t left = position < positions ? width - at : 0;
    const T* row = data + position * step + at;
    return left >= kLanes ? load(row) : left > 0 ? load(row, left) : Vec{};
  }
};

template <class T, class Arguments>
FD_HD Rows<T> rows_of(const Input& input, int64_t head, const Arguments& g) {
  return {input.at<const T>(head / g.heads, head % g.heads), input.row, g.positions, g.width};
}

// A chunk of 32 rows, 32 numbers of each, as [part][row][64 bytes].
template <int kParts, class T>
FD_HD void pack_chunk(const Rows<T>& rows, int64_t block, int64_t chunk, char* to) {
  for (int64_t i = 0; i < kBlock; ++i) {
    const int64_t row = block * kBlock + i, at = chunk * kBlock;
    store_parts<kParts>(to + i * kRowBytes, kBlock * kRowBytes, rows.read(row, at), rows.read(row, at + kLanes));
  }
}

// 32 rows as a left factor, chunk after chunk.
template <int kParts, class T>
FD_HD void pack_left(const Rows<T>& rows, int64_t block, int64_t chunks, char* to) {
  for (int64_t chunk = 0; chunk < chunks; ++chunk, to += kParts * kBlock * kRowBytes) {
    pack_chunk<kParts>(rows, block, chunk, to);
  }
}

// 32 rows, transposed, as right factors for products that sum over numbers: tiles of [pair of numbers][16 rows][2].
template <int kParts, class T>
FD_HD void pack_transposed(const Rows<T>& rows, int64_t block, int64_t chunks, char* to) {
  alignas(64) char left[kParts][kBlock][kRowBytes];
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    pack_chunk<kParts>(rows, block, chunk, left[0][0]);
    for (int part = kParts - 1; part >= 0; --part) {
      for (int64_t tile = 0; tile < 2; ++tile, to += kTileBytes) {
        __m512i words[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) words[i] = _mm512_load_si512(left[part][16 * tile + i]);
        transpose(words);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * kRowBytes, words[i]);
      }
    }
  }
}

// 32 rows as right factors for products that sum over rows: for each chunk of numbers, `chunk_step` bytes apart, tiles of
// [pair of rows][16 numbers][2].
template <int kParts, class T>
FD_HD void pack_pairs(const Rows<T>& rows, int64_t block, int64_t chunks, char* to, int64_t chunk_step) {
  for (int64_t chunk = 0; chunk < chunks; ++chunk, to += chunk_step) {
    for (int64_t pair = 0; pair < kBlock / 2; ++pair) {
      const int64_t row = block * kBlock + 2 * pair;
      for (int64_t tile = 0; tile < 2; ++tile) {
        alignas(64) char both[kParts][kRowBytes];
        const int64_t at = chunk * kBlock + tile * kLanes;
        store_parts<kParts>(both[0], kRowBytes, rows.read(row, at), rows.read(row + 1, at));
        for (int part = 0; part < kParts; ++part) {
          char* there = to + ((kParts - 1 - part) * 2 + tile) * kTileBytes + pair * kRowBytes;
          _mm512_storeu_si512(there, interleaved(_mm512_load_si512(both[part])));
        }
      }
    }
  }
}

// Items: blocks of keys and values of all heads of the group.
template <class T, int kParts>
void pack_blocks(const AttentionArguments& g, const Packed& packed, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = packed.first + item / packed.keys, block = item % packed.keys;
    const int64_t bytes = packed.block_bytes();
    pack_transposed<kParts>(rows_of<T>(g.k, head, g), block, packed.width,
                            packed.keys_of(head) + block * packed.width * bytes);
    pack_pairs<kParts>(rows_of<T>(g.v, head, g), block, packed.width, packed.values_of(head) + block * bytes,
                       packed.keys * bytes);
  }
}

// A row of logits to weights, as a row of the left factor; returns one over the weights' sum, and the logarithm of that
// sum with the largest logit.
template <int kParts>
FD_HD float soften(const float* logits, int64_t keys, int64_t blocks, float scale, char* to, float* logsumexp) {
  Vec most = spread(-__builtin_inff());
  for (int64_t at = 0; at < keys; at += kLanes) {
    most = (Vec)_mm512_mask_max_ps(most, first_lanes(keys - at), most, load(logits + at) * spread(scale));
  }
  const Vec largest = spread(_mm512_reduce_max_ps(most));
  Vec sum = {};
  for (int64_t block = 0; block < blocks; ++block, to += kParts * kBlock * kRowBytes) {
    Vec weights[2];
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t at = block * kBlock + half * kLanes;
      const Vec weight = power_of_two<float>((load(logits + at) * spread(scale) - largest) * spread(kLog2E));
      weights[half] = (Vec)_mm512_maskz_mov_ps(first_lanes(keys - at), weight);
      sum += weights[half];
    }
    store_parts<kParts>(to, kBlock * kRowBytes, weights[0], weights[1]);
  }
  const float total = _mm512_reduce_add_ps(sum);
  if (logsumexp != nullptr) *logsumexp = _mm512_cvtss_f32((__m512)largest) + std::log(total);
  return 1.0f / total;
}

// 32 x 32 sums to `count` rows of an output, of whose numbers `left` are left.
template <class T>
FD_HD void write_sums(const float* sums, T* out, int64_t step, int64_t count, int64_t left) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t at = 0; at < kBlock; at += kLanes) {
      const Vec value = load(sums + i * kBlock + at);
      if (left - at >= kLanes) store(out + i * step + at, value);
      else if (left > at) store(out + i * step + at, value, left - at);
    }
  }
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
    T* out = g.out.at<T>(head / g.heads, head % g.heads) + first * g.out.row;
    pack_left<kParts>(rows_of<T>(g.q, head, g), item % blocks, packed.width, queries);
    f.left = queries, f.chunks = packed.width;
    for (int64_t block = 0; block < packed.keys; ++block) {
      f.right = packed.keys_of(head) + block * packed.width * right_bytes;
      sum_products<kParts>(count, kBlock, f, logits + block * kBlock, keys * 4, []() FD_INLINE {});
    }
    for (int64_t i = 0; i < count; ++i) {
      float* logsumexp = g.logsumexp == nullptr ? nullptr : g.logsumexp + head * g.positions + first + i;
      inverse[i] = soften<kParts>(logits + i * keys, g.positions, packed.keys, g.scale,
                                  weights + i * kRowBytes, logsumexp);
    }
    f.left = weights, f.chunks = packed.keys;
    for (int64_t block = 0; block < packed.width; ++block) {
      f.right = packed.values_of(head) + block * packed.keys * right_bytes;
      sum_products<kParts>(count, kBlock, f, sums, kBlock * 4, []() FD_INLINE {});
      for (int64_t i = 0; i < count * kBlock; i += kLanes) {
        store(sums + i, load(sums + i) * spread(inverse[i / kBlock]));
      }
      write_sums(sums, out + block * kBlock, g.out.row, count, g.width - block * kBlock);
    }
  }
  _tile_release();
}

// Where the factors of one head lie, of `positions` blocks of rows and `width` blocks of numbers: transposed queries and
// gradients, pairs of queries, gradients and keys, the weights and the gradient of the logits of 32 keys by query, and of
// all queries by key.
struct Gradients {
  int64_t positions, width;
  char *queries, *grads, *query_pairs, *grad_pairs, *key_pairs, *key, *value, *weights, *by_query, *by_key;

  FD_HD int64_t bytes() const { return kBlock * kBlock * 2; }
};

// Adds up a product for 32 positions and all numbers, to where an output has them.
FD_HD void write_products(Factors f, const char* right, int64_t right_step, const Gradients& p, int64_t block,
                          const AttentionGradientArguments& g, BFloat16* out, int64_t step) {
  alignas(64) float sums[kBlock * kBlock];
  const int64_t first = block * kBlock, count = std::min(kBlock, g.positions - first);
  for (int64_t chunk = 0; chunk < p.width; ++chunk) {
    f.right = right + chunk * right_step;
    sum_products<2, 2, 1>(f, sums, kBlock * 4, []() FD_INLINE {});
    write_sums(sums, out + first * step + chunk * kBlock, step, count, g.width - chunk * kBlock);
  }
}

// Logits and gradients of weights, [32 keys][32 queries], to weights and gradients of logits in bfloat16: by query, rows
// of keys, and the latter also by key, rows of queries.
FD_HD void differentiate(const float* logits, const float* d_weights, const float* logsumexp, const float* delta,
                         int64_t keys, int64_t queries, float scale, char* weights, char* by_query, char* by_key) {
  for (int64_t key = 0; key < kBlock; ++key) {
    Vec w[2] = {}, d[2] = {};
    for (int64_t half = 0; half < 2 && key < keys; ++half) {
      const int64_t at = half * kLanes;
      const __mmask16 mask = first_lanes(queries - at);
      const Vec exponent = (load(logits + key * kBlock + at) * spread(scale) - load(logsumexp + at)) * spread(kLog2E);
      w[half] = (Vec)_mm512_maskz_mov_ps(mask, power_of_two<float>(exponent));
      const Vec difference = load(d_weights + key * kBlock + at) - load(delta + at);
      d[half] = (Vec)_mm512_maskz_mov_ps(mask, w[half] * difference * spread(scale));
    }
    store_parts<1>(weights + key * kRowBytes, 0, w[0], w[1]);
    store_parts<1>(by_query + key * kRowBytes, 0, d[0], d[1]);
  }
  for (int64_t half = 0; half < 2; ++half) {
    __m512i words[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const char* from = by_query + 2 * i * kRowBytes + half * 32;
      const __m256i first = _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
      const __m256i second = _mm256_load_si256(reinterpret_cast<const __m256i*>(from + kRowBytes));
      words[i] = interleaved(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
    }
    transpose(words);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(by_key + (half * 16 + i) * kRowBytes, words[i]);
  }
}

// Items: heads.
inline void differentiate_heads(const AttentionGradientArguments& g, int64_t begin, int64_t end) {
  load_shapes();
  alignas(64) float logits[kBlock * kBlock], d_weights[kBlock * kBlock];
  Gradients p{};
  p.positions = divide_up(g.positions, kBlock), p.width = divide_up(g.width, kBlock);
  const int64_t row = p.width * p.bytes(), head_bytes = p.positions * row, column = p.positions * p.bytes();
  char* next = reinterpret_cast<char*>(buffer((5 * head_bytes + 2 * row + (2 + p.positions) * column) / 4, 0));
  for (char** factor : {&p.queries, &p.grads, &p.query_pairs, &p.grad_pairs, &p.key_pairs}) {
    *factor = next;
    next += head_bytes;
  }
  p.key = next, p.value = p.key + row, p.weights = p.value + row;
  p.by_query = p.weights + column, p.by_key = p.by_query + column;
  float* logsumexp = buffer(2 * p.positions * kBlock, 1);
  float* delta = logsumexp + p.positions * kBlock;
  const int64_t no_tap = 0;
  Factors f{};
  f.row_step = kRowBytes, f.part_step = 0, f.chunk_step = p.bytes(), f.taps = &no_tap, f.tap_count = 1;
  for (int64_t head = begin; head < end; ++head) {
    const auto rows = [&](const Input& input) FD_INLINE { return rows_of<BFloat16>(input, head, g); };
    const Rows<BFloat16> q = rows(g.q), k = rows(g.k), v = rows(g.v), grad = rows(g.grad), out = rows(g.out);
    for (int64_t i = 0; i < p.positions * kBlock; ++i) {
      logsumexp[i] = i < g.positions ? g.logsumexp[head * g.positions + i] : 0.0f;
      Vec sum = {};
      for (int64_t at = 0; at < g.width; at += kLanes) sum = fma(grad.read(i, at), out.read(i, at), sum);
      delta[i] = _mm512_reduce_add_ps(sum);
    }
    for (int64_t block = 0; block < p.positions; ++block) {
      pack_transposed<1>(q, block, p.width, p.queries + block * row);
      pack_transposed<1>(grad, block, p.width, p.grads + block * row);
      pack_pairs<1>(q, block, p.width, p.query_pairs + block * p.bytes(), column);
      pack_pairs<1>(grad, block, p.width, p.grad_pairs + block * p.bytes(), column);
      pack_pairs<1>(k, block, p.width, p.key_pairs + block * p.bytes(), column);
    }
    const auto to = [&](const Output& output) FD_INLINE {
      return output.at<BFloat16>(head / g.heads, head % g.heads);
    };
    for (int64_t j = 0; j < p.positions; ++j) {
      pack_left<1>(k, j, p.width, p.key);
      pack_left<1>(v, j, p.width, p.value);
      f.chunks = p.width;
      for (int64_t i = 0; i < p.positions; ++i) {
        f.left = p.key, f.right = p.queries + i * row;
        sum_products<2, 2, 1>(f, logits, kBlock * 4, []() FD_INLINE {});
        f.left = p.value, f.right = p.grads + i * row;
        sum_products<2, 2, 1>(f, d_weights, kBlock * 4, []() FD_INLINE {});
        differentiate(logits, d_weights, logsumexp + i * kBlock, delta + i * kBlock, g.positions - j * kBlock,
                      g.positions - i * kBlock, g.scale, p.weights + i * p.bytes(), p.by_query + i * p.bytes(),
                      p.by_key + i * column + j * p.bytes());
      }
      f.chunks = p.positions;
      f.left = p.weights;
      write_products(f, p.grad_pairs, column, p, j, g, to(g.dv), g.dv.row);
      f.left = p.by_query;
      write_products(f, p.query_pairs, column, p, j, g, to(g.dk), g.dk.row);
    }
    for (int64_t i = 0; i < p.positions; ++i) {
      f.left = p.by_key + i * column;
      write_products(f, p.key_pairs, column, p, i, g, to(g.dq), g.dq.row);
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
      parallel_for(0, items, std::max<int64_t>(1, kWorkPerThread / work), part);
    };
    share(packed.heads * packed.keys, packed.width * 512,
          [&](int64_t begin, int64_t end) { amx::pack_blocks<T, kParts>(g, packed, begin, end); });
    share(packed.heads * divide_up(g.positions, kBlock), packed.keys * packed.width * 128,
          [&](int64_t begin, int64_t end) { amx::attend<T, kParts>(g, packed, begin, end); });
  }
}
#endif

}  // namespace

#if FD_AMX
bool amx_attends(int64_t positions) { return simd_in_use() == Simd::amx && positions <= kMaxAmxPositions; }

void amx_attention(const AttentionArguments& g) { run<BFloat16, 1>(g); }

void amx_attention_gradient(const AttentionGradientArguments& g) {
  parallel_for(0, g.batch * g.heads, 1, [&](int64_t begin, int64_t end) {
    amx::differentiate_heads(g, begin, end);
  });
}
#else
bool amx_attends(int64_t) { return false; }
void amx_attention(const AttentionArguments&) {}
void amx_attention_gradient(const AttentionGradientArguments&) {}
#endif

namespace {

void attention_amx_(const Tensor& q, const Tensor& k, const Tensor& v, double scale, int64_t parts, Tensor out) {
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
    if (parts == 1) run_or_record([=] { run<T, 1>(g); }, q, k, v, out);
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
