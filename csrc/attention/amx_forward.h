// Attention's forward pass by AMX, and how queries, keys and values are packed. Included after amx/tile_gemm.h.

// The positions of a head as rows of `width` numbers, `step` numbers apart.
template <class T>
struct HeadRows {
  const T* data;
  int64_t step, positions, width;

  // 16 numbers of a row from number `at` on; 0 beyond the row's end and beyond the last position.
  FD_HD Vec read(int64_t position, int64_t at) const {
    const int64_t remaining = position < positions ? width - at : 0;
    const T* row = data + position * step + at;
    return remaining >= kLanes ? load(row) : remaining > 0 ? load(row, remaining) : Vec{};
  }
};

template <class T, class Arguments>
FD_HD HeadRows<T> rows_of(const InputHeads& input, int64_t head, int64_t positions, const Arguments& g) {
  return {input.at<const T>(head / g.heads, head % g.heads), input.row, positions, g.width};
}

// 32 numbers of each of 32 rows, as [row][64 bytes].
template <class T>
FD_HD void pack_chunk(const HeadRows<T>& rows, int64_t block, int64_t chunk, char* to) {
  for (int64_t i = 0; i < kBlock; ++i) {
    const int64_t row = block * kBlock + i, at = chunk * kBlock;
    store_splits<1>(to + i * kRowBytes, 0, rows.read(row, at), rows.read(row, at + kLanes));
  }
}

// 32 rows as a left factor, chunk after chunk of 32 numbers.
template <class T>
FD_HD void pack_left(const HeadRows<T>& rows, int64_t block, int64_t chunks, char* to) {
  for (int64_t chunk = 0; chunk < chunks; ++chunk) pack_chunk(rows, block, chunk, to + chunk * kBlock * kRowBytes);
}

// 32 rows, transposed, as right factors of products that sum over the width: tiles [pair of numbers][16 rows][2].
template <class T>
FD_HD void pack_transposed(const HeadRows<T>& rows, int64_t block, int64_t chunks, char* to) {
  alignas(64) char left[kBlock][kRowBytes];
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    pack_chunk(rows, block, chunk, left[0]);
    for (int64_t tile = 0; tile < 2; ++tile, to += kTileBytes) {
      __m512i words[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) words[i] = _mm512_load_si512(left[16 * tile + i]);
      transpose(words);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * kRowBytes, words[i]);
    }
  }
}

// 32 rows of 16 numbers, from number `at` on, as a right factor of products that sum over rows: a tile
// [pair of rows][16 numbers][2].
template <class T>
FD_HD void pack_pairs_tile(const HeadRows<T>& rows, int64_t block, int64_t at, char* to) {
  for (int64_t pair = 0; pair < kBlock / 2; ++pair, to += kRowBytes) {
    const int64_t row = block * kBlock + 2 * pair;
    alignas(64) char both[kRowBytes];
    store_splits<1>(both, 0, rows.read(row, at), rows.read(row + 1, at));
    _mm512_storeu_si512(to, interleaved(_mm512_load_si512(both)));
  }
}

// 32 rows as right factors of products that sum over rows, for each chunk of 32 numbers, `chunk_step` bytes apart.
template <class T>
FD_HD void pack_pairs(const HeadRows<T>& rows, int64_t block, int64_t chunks, char* to, int64_t chunk_step) {
  for (int64_t chunk = 0; chunk < chunks; ++chunk, to += chunk_step) {
    for (int64_t tile = 0; tile < 2; ++tile) {
      pack_pairs_tile(rows, block, chunk * kBlock + tile * kLanes, to + tile * kTileBytes);
    }
  }
}

// Items: blocks of keys and values of all heads of the group.
template <class T>
void pack_blocks(const AttentionArguments& g, const PackedKeysValues& packed, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = packed.first + item / packed.keys, block = item % packed.keys;
    pack_transposed(rows_of<T>(g.k, head, g.keys, g), block, packed.width, packed.key_block(head, block));
    const HeadRows<T> values = rows_of<T>(g.v, head, g.keys, g);
    for (int64_t tile = 0; tile < packed.value_tiles; ++tile) {
      pack_pairs_tile(values, block, tile * kLanes, packed.value_block(head, tile / 2, block) + tile % 2 * kTileBytes);
    }
  }
}

// 2^u for u up to 127, and 0 for -infinity; u is the sum of an integer and r, from 0 to 1. The relative error is below
// 2^-23 if kPrecise, else 2^-13, for weights that are rounded to bfloat16. NaN stays NaN.
template <bool kPrecise>
FD_HD Vec exp2_of(Vec u) {
  const Vec r = (Vec)_mm512_reduce_ps((__m512)u, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec p;
  if constexpr (!kPrecise) {
    p = fma(spread(0x1.3f96a4p-4f), r, spread(0x1.cefc4ep-3f));
    p = fma(p, r, spread(0x1.64444ap-1f));
    p = fma(p, r, spread(0x1.fff632p-1f));
  } else {
    p = fma(spread(0x1.c72118p-13f), r, spread(0x1.461956p-10f));
    p = fma(p, r, spread(0x1.3d28p-7f));
    p = fma(p, r, spread(0x1.c685p-5f));
    p = fma(p, r, spread(0x1.ebfd9ep-3f));
    p = fma(p, r, spread(0x1.62e42ap-1f));
    p = fma(p, r, spread(1.0f));
  }
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)u);
}

// Flips the sign of packed bfloat16.
FD_HD void negate(char* packed, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += kRowBytes) {
    _mm512_storeu_si512(packed + at, _mm512_xor_si512(_mm512_loadu_si512(packed + at), _mm512_set1_epi16(-0x8000)));
  }
}

// Up to 32 queries of a head, and their online softmax after some blocks of keys.
struct QueryBlock {
  int64_t first, count;      // positions
  char* queries;             // packed as a left factor, negated where the scale is negative
  float* sums;               // [chunk of the width][32 rows][32]: the weighted sums of values
  float* weight_sums;        // [32][16]: the sums of the weights, of every 16th key in each lane
  float maximum[kBlock];     // the largest logit before scaling
  float rescale[2][kBlock];  // factors of the sums before an even and before an odd block of keys
};

// Logits [32][kKeyBlock] of 32 queries and up to kKeyBlock keys.
FD_HD void sum_logits(const QueryBlock& q, Factors& f, const PackedKeysValues& packed, int64_t head, int64_t block,
                      float* logits) {
  f.left = q.queries, f.chunks = packed.width;
  f.right = packed.key_block(head, block);
  sum_products<1>(q.count, kBlock, f, logits, kKeyBlock * 4, []() FD_INLINE {});
}

// Takes the logits of rows [begin, end) into the maxima. factor: the positive scale times log2(e).
FD_HD void update_maxima(QueryBlock& q, const float* logits, int64_t begin, int64_t end, int64_t keys, float factor,
                         bool first, float* rescale) {
  for (int64_t i = begin; i < end && i < q.count; ++i) {
    const float* row = logits + i * kKeyBlock;
    Vec largest = spread(-__builtin_inff());
    int64_t at = 0;
    for (; at + kLanes <= keys; at += kLanes) largest = (Vec)_mm512_max_ps((__m512)largest, (__m512)load(row + at));
    if (at < keys) {
      largest =
          (Vec)_mm512_mask_max_ps((__m512)largest, first_lanes(keys - at), (__m512)largest, (__m512)load(row + at));
    }
    float maximum = _mm512_reduce_max_ps((__m512)largest);
    if (!first) {
      if (!(maximum > q.maximum[i])) maximum = q.maximum[i];
      rescale[i] = (q.maximum[i] - maximum) * factor;
    }
    q.maximum[i] = maximum;
  }
  if (first || end < kBlock) return;
  for (int64_t i = 0; i < kBlock; i += kLanes) store(rescale + i, exp2_of<true>(load(rescale + i)));
}

// The weights of 32 keys as a left factor, from their logits; keys beyond `keys` have a weight of 0.
// replace: whether they begin the sums of weights. rescale: factors of the sums before, or null.
template <bool kPrecise>
FD_HD void weigh(const QueryBlock& q, const float* logits, int64_t keys, float factor, bool replace,
                 const float* rescale, char* to) {
  const __mmask16 masks[2] = {first_lanes(keys), first_lanes(keys - kLanes)};
  for (int64_t i = 0; i < q.count; ++i) {
    const Vec maximum = spread(q.maximum[i]);
    Vec weights[2];
    for (int64_t half = 0; half < 2; ++half) {
      const Vec u = (load(logits + i * kKeyBlock + half * kLanes) - maximum) * spread(factor);
      weights[half] = (Vec)_mm512_maskz_mov_ps(masks[half], (__m512)exp2_of<kPrecise>(u));
    }
    float* sum = q.weight_sums + i * kLanes;
    Vec before = replace ? Vec{} : load(sum);
    if (rescale != nullptr) before = before * spread(rescale[i]);
    store(sum, before + (weights[0] + weights[1]));
    store_splits<1>(to + i * kRowBytes, 0, weights[0], weights[1]);
  }
}

// Adds products of weights and 32 numbers of the values to the sums: [32][32] both.
// rescale: factors of the sums before, or null where there are none.
FD_HD void add_products(int64_t rows, const float* products, float* sums, int64_t columns, const float* rescale) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t at = 0; at < columns; at += kLanes) {
      const Vec product = load(products + i * kBlock + at);
      float* sum = sums + i * kBlock + at;
      store(sum, rescale == nullptr ? product : fma(load(sum), spread(rescale[i]), product));
    }
  }
}

// Writes 32 x 32 sums to `count` rows of an output, at most `width` numbers of each.
template <class T>
FD_HD void write_sums(const float* sums, T* out, int64_t step, int64_t count, int64_t width) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t at = 0; at < kBlock; at += kLanes) {
      const Vec value = load(sums + i * kBlock + at);
      if (width - at >= kLanes) store(out + i * step + at, value);
      else if (width > at) store(out + i * step + at, value, width - at);
    }
  }
}

// Writes the output of a block of queries, and the logsumexp where it is wanted.
template <class T>
FD_HD void finish_block(const AttentionArguments& g, int64_t head, const QueryBlock& q, float scale) {
  T* out = g.out.at<T>(head / g.heads, head % g.heads) + q.first * g.out.row;
  for (int64_t i = 0; i < q.count; ++i) {
    const float sum = _mm512_reduce_add_ps((__m512)load(q.weight_sums + i * kLanes)), inverse = 1.0f / sum;
    if (g.logsumexp != nullptr) {
      g.logsumexp[head * g.positions + q.first + i] = q.maximum[i] * scale + std::log(sum);
    }
    for (int64_t at = 0; at < g.width; at += kLanes) {
      const Vec value = load(q.sums + (at / kBlock * kBlock + i) * kBlock + at % kBlock) * spread(inverse);
      T* to = out + i * g.out.row + at;
      if (g.width - at >= kLanes) store(to, value);
      else store(to, value, g.width - at);
    }
  }
}

// Items: groups of `group` blocks of queries, of all heads of the group of heads.
//
// A step is one block of queries and one block of keys. AMX works beside the vectors: it multiplies queries and keys
// of the next step while the weights of this one are computed, and weights and values of this one while the maxima of
// the next are found.
template <class T>
void attend(const AttentionArguments& g, const PackedKeysValues& packed, int64_t group, int64_t begin, int64_t end) {
  load_shapes();
  const int64_t query_blocks = divide_up(g.positions, kBlock), groups = divide_up(query_blocks, group);
  const int64_t key_blocks = divide_up(g.keys, kKeyBlock), left_bytes = kBlock * kRowBytes, no_tap = 0;
  const float scale = std::fabs(g.scale), factor = scale * kLog2E;
  const int64_t sums_size = packed.width * kBlock * kBlock, weights_size = kKeyBlock / kBlock * left_bytes / 4;
  ScratchArrays scratch(2 * kBlock * kKeyBlock + kBlock * kBlock + weights_size +
                        group * (packed.width * left_bytes / 4 + sums_size + kBlock * kLanes));
  float* logits[2] = {scratch.take(kBlock * kKeyBlock), scratch.take(kBlock * kKeyBlock)};
  float* products = scratch.take(kBlock * kBlock);
  char* weights = reinterpret_cast<char*>(scratch.take(weights_size));
  char* queries = reinterpret_cast<char*>(scratch.take(group * packed.width * left_bytes / 4));
  float* sums = scratch.take(group * sums_size);
  float* weight_sums = scratch.take(group * kBlock * kLanes);
  QueryBlock blocks[kMaxQueryBlocks];
  Factors f{};
  f.row_step = kRowBytes, f.piece_step = 0, f.chunk_step = left_bytes;
  f.taps = &no_tap, f.tap_count = 1;

  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = packed.first + item / groups, first_block = item % groups * group;
    const int64_t count = std::min(group, query_blocks - first_block), steps = count * key_blocks;
    for (int64_t j = 0; j < count; ++j) {
      QueryBlock& q = blocks[j];
      q.first = (first_block + j) * kBlock, q.count = std::min(kBlock, g.positions - q.first);
      q.queries = queries + j * packed.width * left_bytes;
      q.sums = sums + j * sums_size, q.weight_sums = weight_sums + j * kBlock * kLanes;
      memset(q.rescale, 0, sizeof(q.rescale));
      pack_left(rows_of<T>(g.q, head, g.positions, g), first_block + j, packed.width, q.queries);
      if (std::signbit(g.scale)) negate(q.queries, packed.width * left_bytes);
    }
    const auto keys_of = [&](int64_t step) { return std::min(kKeyBlock, g.keys - step / count * kKeyBlock); };
    for (int64_t step = -1; step < steps; ++step) {
      const bool more = step + 1 < steps;  // whether there is a next step
      const int64_t next = step + 1, next_keys = more ? keys_of(next) : 0, keys = step < 0 ? 0 : keys_of(step);
      QueryBlock &q = blocks[step < 0 ? 0 : step % count], &next_q = blocks[next % count];
      const float* now = logits[step & 1];
      float* after = logits[next & 1];
      const float* rescale = step < count ? nullptr : q.rescale[step / count & 1];
      for (int64_t at = 0; at < keys || at < next_keys; at += kBlock) {
        const int64_t block = at / kBlock;
        if (at < next_keys) {
          sum_logits(next_q, f, packed, head, next / count * (kKeyBlock / kBlock) + block, after + at);
        }
        if (at < keys) {
          const bool replace = step < count && at == 0;
          const float* change = at == 0 ? rescale : nullptr;
          char* to = weights + block * left_bytes;
          if (g.logsumexp != nullptr) {
            weigh<true>(q, now + at, keys - at, factor, replace, change, to);
          } else {
            weigh<false>(q, now + at, keys - at, factor, replace, change, to);
          }
        }
      }
      for (int64_t chunk = 0; chunk < packed.width; ++chunk) {
        const int64_t columns = packed.tiles_of(chunk) * kLanes;
        if (step >= 0) {
          f.left = weights, f.chunks = divide_up(keys, kBlock);
          f.right = packed.value_block(head, chunk, step / count * (kKeyBlock / kBlock));
          sum_products<1>(q.count, columns, f, products, kBlock * 4, []() FD_INLINE {});
        }
        if (more) {
          update_maxima(next_q, after, chunk * kBlock / packed.width, (chunk + 1) * kBlock / packed.width, next_keys,
                        factor, next < count, next_q.rescale[next / count & 1]);
        }
        if (step >= 0) add_products(q.count, products, q.sums + chunk * kBlock * kBlock, columns, rescale);
      }
    }
    for (int64_t j = 0; j < count; ++j) finish_block<T>(g, head, blocks[j], scale);
  }
  _tile_release();
}
