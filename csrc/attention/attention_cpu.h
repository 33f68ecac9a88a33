// Attention on one instruction set. attention/attention.cpp includes this file once for each, inside a namespace and a
// target pragma of its own, with FD_LANES floats to a vector, FD_VECTORS vectors to a block, and FD_PAIRS
// where the processor multiplies pairs of bfloat16.
//
// Queries lie in the lanes of a vector: the logits of a tile are kept transposed, [keys][queries], so that
// keys and values are read in place, one broadcast number at a time, and the softmax needs no sum across
// lanes. Every query's arithmetic is then the same whatever the width of a vector.

typedef float Vec __attribute__((vector_size(4 * FD_LANES), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * FD_LANES)));
typedef uint32_t Unsigned __attribute__((vector_size(4 * FD_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * FD_LANES)));
typedef float UnalignedVec __attribute__((vector_size(4 * FD_LANES), aligned(1), may_alias));
typedef float UnalignedWord __attribute__((aligned(1), may_alias));
typedef uint32_t WordBits __attribute__((may_alias));

constexpr int kLanes = FD_LANES, kVectors = FD_VECTORS;

FD_HD Vec load(const void* from) { return *static_cast<const UnalignedVec*>(from); }
FD_HD void store(void* to, Vec value) { *static_cast<UnalignedVec*>(to) = value; }
FD_HD Vec larger(Vec a, Vec b) { return a > b ? a : b; }

#if FD_LANES == 16
FD_HD Vec spread(float value) { return static_cast<Vec>(_mm512_set1_ps(value)); }
FD_HD Vec fma(Vec a, Vec b, Vec c) { return static_cast<Vec>(_mm512_fmadd_ps(a, b, c)); }
#elif FD_LANES == 8
FD_HD Vec spread(float value) { return static_cast<Vec>(_mm256_set1_ps(value)); }
FD_HD Vec fma(Vec a, Vec b, Vec c) { return static_cast<Vec>(_mm256_fmadd_ps(a, b, c)); }
#else
FD_HD Vec spread(float value) { return Vec{value, value, value, value}; }
FD_HD Vec fma(Vec a, Vec b, Vec c) {
  Vec result;
  for (int i = 0; i < kLanes; ++i) result[i] = Baseline::fma(a[i], b[i], c[i]);
  return result;
}
#endif

// e^x for x up to 88, to 1 ulp near 0 and |x| / 2 ulps far from it; 0 below -87.7; NaN stays NaN.
FD_HD Vec exponential(Vec x) {
  x = x * spread(kLog2E);
  x = x < spread(-127.0f) ? spread(-127.0f) : x;
  const Vec shifted = x + spread(0x1.8p23f);  // the low bits of this sum are the nearest integer
  const Vec r = x - (shifted - spread(0x1.8p23f));
  Vec p = spread(0x1.41fbbap-13f);
  p = fma(p, r, spread(0x1.5f3e54p-10f));
  p = fma(p, r, spread(0x1.3b2d4cp-7f));
  p = fma(p, r, spread(0x1.c6aee8p-5f));
  p = fma(p, r, spread(0x1.ebfbdcp-3f));
  p = fma(p, r, spread(0x1.62e43p-1f));
  p = fma(p, r, spread(1.0f));
  const Integers exponent = ((Integers)shifted - (0x4B400000 - 127)) << 23;
  return p * (Vec)exponent;
}

// ---- Matrix products: c[rows][lanes] = or += a[rows][depth] b[depth][lanes].

// The factor whose numbers are broadcast, by strides in bytes; a number is a float or a pair of bfloat16.
struct Broadcast {
  const char* data;
  int64_t row, step;
};

struct Singles {
  static constexpr int kPack = 1;
  static FD_HD Vec multiply_add(Vec c, Vec a, Vec b) { return fma(a, b, c); }
};

#if FD_PAIRS
struct Pairs {
  static constexpr int kPack = 2;
  static FD_HD Vec multiply_add(Vec c, Vec a, Vec b) {
    return static_cast<Vec>(_mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b));
  }

  // Rounded to bfloat16: lane i of the result is the pair (first[i], second[i]).
  static FD_HD Vec pair(Vec first, Vec second) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4,
                         19, 3, 18, 2, 17, 1, 16, 0);
    return (Vec)_mm512_permutexvar_epi16(order, halves);
  }

  // Rounded to bfloat16: word i is the pair (value[2 i], value[2 i + 1]).
  static FD_HD void store_pairs(float* to, Vec value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(value));
  }
};
#endif

template <class Math, int kRows, int kColumns>
FD_HD void multiply_block(Broadcast a, const float* b, int64_t b_step, float* c, int64_t c_row, int64_t depth,
                          bool add) {
  Vec sum[kRows][kColumns] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec right[kColumns];
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) right[j] = load(b + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec left = spread(*reinterpret_cast<const UnalignedWord*>(a.data + i * a.row));
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) sum[i][j] = Math::multiply_add(sum[i][j], left, right[j]);
    }
    a.data += a.step;
    b += b_step;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      float* to = c + i * c_row + j * kLanes;
      store(to, add ? load(to) + sum[i][j] : sum[i][j]);
    }
  }
}

constexpr int kBlockRows = 6;

template <class Math, int kColumns>
FD_HD void multiply_columns(Broadcast a, const float* b, int64_t b_step, float* c, int64_t c_row, int64_t rows,
                            int64_t depth, bool add) {
  for (; rows >= kBlockRows; rows -= kBlockRows) {
    multiply_block<Math, kBlockRows, kColumns>(a, b, b_step, c, c_row, depth, add);
    a.data += kBlockRows * a.row;
    c += kBlockRows * c_row;
  }
  switch (rows) {
    case 5: return multiply_block<Math, 5, kColumns>(a, b, b_step, c, c_row, depth, add);
    case 4: return multiply_block<Math, 4, kColumns>(a, b, b_step, c, c_row, depth, add);
    case 3: return multiply_block<Math, 3, kColumns>(a, b, b_step, c, c_row, depth, add);
    case 2: return multiply_block<Math, 2, kColumns>(a, b, b_step, c, c_row, depth, add);
    case 1: return multiply_block<Math, 1, kColumns>(a, b, b_step, c, c_row, depth, add);
  }
}

// lanes: a multiple of kLanes.
template <class Math>
__attribute__((noinline)) void multiply(Broadcast a, const float* b, int64_t b_step, float* c, int64_t c_row,
                                        int64_t rows, int64_t lanes, int64_t depth, bool add) {
  for (int64_t lane = 0; lane < lanes;) {
    const int64_t left = (lanes - lane) / kLanes;
    const float* right = b + lane;
    float* to = c + lane;
    if (left >= kVectors) {
      multiply_columns<Math, kVectors>(a, right, b_step, to, c_row, rows, depth, add);
      lane += kVectors * kLanes;
#if FD_VECTORS > 2
    } else if (left == 3) {
      multiply_columns<Math, 3>(a, right, b_step, to, c_row, rows, depth, add);
      lane += 3 * kLanes;
    } else if (left == 2) {
      multiply_columns<Math, 2>(a, right, b_step, to, c_row, rows, depth, add);
      lane += 2 * kLanes;
#endif
    } else {
      multiply_columns<Math, 1>(a, right, b_step, to, c_row, rows, depth, add);
      lane += kLanes;
    }
  }
}

// ---- Copies into the order in which the products read.

// kLanes words from p on, of which `words` exist; the others are 0.
template <class Math, class T>
FD_HD Vec load_words(const T* p, int64_t count) {
  if constexpr (Math::kPack == 2 || sizeof(T) == sizeof(float)) {
    if (count >= kLanes * Math::kPack) return load(p);
    Vec words = {};
    memcpy(&words, p, count * sizeof(T));
    return words;
  } else {
    float words[kLanes] = {};
    if (count >= kLanes) {
      for (int i = 0; i < kLanes; ++i) words[i] = to_float(p[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) words[i] = to_float(p[i]);
    }
    return load(words);
  }
}

template <int kBlock, int... kLane>
FD_HD void exchange(Vec& a, Vec& b, std::integer_sequence<int, kLane...>) {
  const Vec upper = FD_SHUFFLE(a, b, (kLane & kBlock ? kLanes + kLane - kBlock : kLane)...);
  b = FD_SHUFFLE(a, b, (kLane & kBlock ? kLanes + kLane : kLane + kBlock)...);
  a = upper;
}

// A square of kLanes vectors, transposed by exchanging ever smaller blocks across the diagonal.
template <int kBlock = kLanes / 2>
FD_HD void transpose(Vec (&rows)[kLanes]) {
  if constexpr (kBlock > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (!(i & kBlock)) exchange<kBlock>(rows[i], rows[i + kBlock], std::make_integer_sequence<int, kLanes>{});
    }
    transpose<kBlock / 2>(rows);
  }
}

template <class Math>
FD_HD int64_t words_of(int64_t count) {
  return (count + Math::kPack - 1) / Math::kPack;
}

// to[width / kPack][kQueries] words from rows [count][width]; lanes beyond count, up to a whole vector, are 0.
template <class Math, class T>
__attribute__((noinline)) void pack_transposed(float* to, const T* from, int64_t row, int64_t count,
                                               int64_t width) {
  const int64_t words = words_of<Math>(width);
  for (int64_t lane = 0; lane < count; lane += kLanes) {
    for (int64_t word = 0; word < words; word += kLanes) {
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        square[i] = lane + i < count ? load_words<Math>(from + (lane + i) * row + word * Math::kPack,
                                                        width - word * Math::kPack)
                                     : Vec{};
      }
      transpose(square);
      for (int i = 0; i < kLanes && word + i < words; ++i) store(to + (word + i) * kQueries + lane, square[i]);
    }
  }
}

// to[count / kPack][padded] words, depth first: what is beyond the rows and the width is 0.
template <class Math, class T>
__attribute__((noinline)) void pack_stacked(float* to, const T* from, int64_t row, int64_t count, int64_t width) {
  const int64_t padded = round_up(width, kLanes);
  for (int64_t i = 0; i < count; i += Math::kPack, from += Math::kPack * row, to += padded) {
    if constexpr (Math::kPack == 1) {
      for (int64_t d = 0; d < width; ++d) to[d] = to_float(from[d]);
      for (int64_t d = width; d < padded; ++d) to[d] = 0.0f;
    } else {
      const bool second = i + 1 < count;
      WordBits* words = reinterpret_cast<WordBits*>(to);
      const T* next = second ? from + row : from;
      const uint32_t keep = second ? 0xFFFF0000u : 0u;
      for (int64_t d = 0; d < width; ++d) {
        words[d] = from[d].bits | (static_cast<uint32_t>(next[d].bits) << 16 & keep);
      }
      for (int64_t d = width; d < padded; ++d) words[d] = 0;
    }
  }
}

// The rows of a tile as a broadcast factor [rows][width / kPack], in place where that is possible.
template <class Math, class T>
FD_HD Broadcast broadcast_rows(float* scratch, const T* from, int64_t row, int64_t count, int64_t width) {
  if (sizeof(T) == sizeof(float) || (Math::kPack == 2 && width % 2 == 0)) {
    return {reinterpret_cast<const char*>(from), row * static_cast<int64_t>(sizeof(T)), 4};
  }
  const int64_t words = words_of<Math>(width);
  for (int64_t i = 0; i < count; ++i, from += row) {
    float* to = scratch + i * words;
    if constexpr (Math::kPack == 1) {
      for (int64_t d = 0; d < width; ++d) to[d] = to_float(from[d]);
    } else {
      to[words - 1] = 0.0f;
      memcpy(to, from, width * sizeof(T));
    }
  }
  return {reinterpret_cast<const char*>(scratch), 4 * words, 4};
}

// The same transposed, [width][rows / kPack].
template <class Math, class T>
FD_HD Broadcast broadcast_columns(float* scratch, const T* from, int64_t row, int64_t count, int64_t width) {
  if (sizeof(T) == sizeof(float)) {
    return {reinterpret_cast<const char*>(from), 4, row * static_cast<int64_t>(sizeof(T))};
  }
  pack_stacked<Math>(scratch, from, row, count, width);
  return {reinterpret_cast<const char*>(scratch), 4, 4 * round_up(width, kLanes)};
}

FD_HD Vec rounded(Vec value, float*) { return value; }
FD_HD Halves rounded(Vec value, BFloat16*) {
  return __builtin_convertvector(bfloat16_bits<Unsigned>(value), Halves);
}
FD_HD Halves rounded(Vec value, Half*) { return __builtin_convertvector(half_bits<Unsigned>(value), Halves); }

// The first `count` numbers, or all where there are more, in the type of the output.
template <class T>
FD_HD void store_rounded(T* to, Vec value, int64_t count) {
  const auto vector = rounded(value, to);
  if (count >= kLanes) {
    memcpy(to, &vector, sizeof(vector));
  } else {
    memcpy(to, &vector, count * sizeof(T));
  }
}

// out[count][width] from from[width][kQueries], each lane times its factor.
template <class T>
__attribute__((noinline)) void unpack_transposed(T* out, int64_t row, const float* from, const float* factor,
                                                 int64_t count, int64_t width) {
  for (int64_t lane = 0; lane < count; lane += kLanes) {
    const Vec scaled = load(factor + lane);
    for (int64_t d = 0; d < width; d += kLanes) {
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        square[i] = d + i < width ? load(from + (d + i) * kQueries + lane) * scaled : Vec{};
      }
      transpose(square);
      for (int i = 0; i < kLanes && lane + i < count; ++i) {
        store_rounded(out + (lane + i) * row + d, square[i], width - d);
      }
    }
  }
}

// ---- Forward.

// maximum: of the logits before they are scaled, with their sign turned where the scale is negative. Differences
// are taken before the scale multiplies them, so that no rounding makes the exponent of the largest more than 0.
struct alignas(64) Softmax {
  float maximum[kQueries], sum[kQueries], rescale[kQueries];
};

// logits[keys][kQueries] become weights in place, as words of kPack keys, and are folded into the softmax.
template <class Math>
__attribute__((noinline)) void fold_tile(float* logits, Softmax& softmax, int64_t keys, int64_t lanes, float scale,
                                         bool first) {
  const Vec direction = spread(scale < 0.0f ? -1.0f : 1.0f), factor = spread(scale < 0.0f ? -scale : scale);
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    float* column = logits + lane;
    Vec largest = load(column) * direction;
    for (int64_t key = 1; key < keys; ++key) largest = larger(load(column + key * kQueries) * direction, largest);
    Vec sum = {};
    if (!first) {
      const Vec before = load(softmax.maximum + lane);
      largest = larger(before, largest);
      const Vec rescale = exponential((before - largest) * factor);
      store(softmax.rescale + lane, rescale);
      sum = load(softmax.sum + lane) * rescale;
    }
    store(softmax.maximum + lane, largest);
    Vec tile_sum = {};
    for (int64_t key = 0; key < keys; key += Math::kPack) {
      float* at = column + key * kQueries;
      const Vec weight = exponential(fma(load(at), direction, -largest) * factor);
      tile_sum += weight;
      if constexpr (Math::kPack == 1) {
        store(at, weight);
      } else {
        const Vec next = key + 1 < keys ? exponential(fma(load(at + kQueries), direction, -largest) * factor) : Vec{};
        tile_sum += next;
        store(column + key / 2 * kQueries, Math::pair(weight, next));
      }
    }
    store(softmax.sum + lane, sum + tile_sum);
  }
}

template <class Math, class T>
void forward(const AttentionArguments& g, int64_t queries, int64_t begin, int64_t end) {
  const int64_t S = g.positions, D = g.width, padded = round_up(D, kLanes), depth = words_of<Math>(D);
  const int64_t most = S < kKeys ? S : kKeys, tiles = (S + queries - 1) / queries;
  Scratch scratch((depth + D + most) * kQueries + 2 * most * padded);
  Softmax softmax;
  float* q_t = scratch.take(depth * kQueries);
  float* out_t = scratch.take(D * kQueries);
  float* logits = scratch.take(most * kQueries);
  float* k_copy = scratch.take(most * padded);
  float* v_copy = scratch.take(most * padded);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / tiles / g.heads, h = item / tiles % g.heads, first = item % tiles * queries;
    const int64_t count = S - first < queries ? S - first : queries, lanes = round_up(count, kLanes);
    const T* k = g.k.at<const T>(b, h);
    const T* v = g.v.at<const T>(b, h);
    pack_transposed<Math>(q_t, g.q.at<const T>(b, h) + first * g.q.row, g.q.row, count, D);
    for (int64_t key = 0; key < S; key += kKeys) {
      const int64_t keys = S - key < kKeys ? S - key : kKeys;
      multiply<Math>(broadcast_rows<Math>(k_copy, k + key * g.k.row, g.k.row, keys, D), q_t, kQueries, logits,
                     kQueries, keys, lanes, depth, false);
      fold_tile<Math>(logits, softmax, keys, lanes, g.scale, key == 0);
      for (int64_t d = 0; key > 0 && d < D; ++d) {
        for (int64_t lane = 0; lane < lanes; ++lane) out_t[d * kQueries + lane] *= softmax.rescale[lane];
      }
      multiply<Math>(broadcast_columns<Math>(v_copy, v + key * g.v.row, g.v.row, keys, D), logits, kQueries,
                     out_t, kQueries, D, lanes, words_of<Math>(keys), key > 0);
    }
    float* logsumexp = g.logsumexp + (b * g.heads + h) * S + first;
    for (int64_t i = 0; i < count; ++i) logsumexp[i] = softmax.maximum[i] * fabsf(g.scale) + logf(softmax.sum[i]);
    for (int64_t i = 0; i < lanes; ++i) softmax.sum[i] = 1.0f / softmax.sum[i];
    unpack_transposed(g.out.at<T>(b, h) + first * g.out.row, g.out.row, out_t, softmax.sum, count, D);
  }
}

// ---- Backward.
//
// The softmax is computed again from whole rows of logits, and so is the mean that its gradient subtracts: the
// weights' gradients, weighted. Taken from the rounded output and logsumexp instead, what is left of the
// difference where one weight is nearly 1 would be mostly rounding.

// p and dp, [keys][kQueries], hold logits and the weights' gradients. They become the weights and the logits'
// gradients, times the scale, as words of kPack queries; ds becomes the latter as words of kPack keys.
template <class Math>
__attribute__((noinline)) void differentiate_softmax(float* p, float* dp, float* ds, int64_t keys, int64_t lanes,
                                                     float scale) {
  const Vec direction = spread(scale < 0.0f ? -1.0f : 1.0f), factor = spread(scale), size = direction * factor;
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    Vec largest = load(p + lane) * direction;
    for (int64_t key = 1; key < keys; ++key) largest = larger(load(p + key * kQueries + lane) * direction, largest);
    Vec sum = {}, mean = {};
    for (int64_t first = 0; first < keys; first += kKeys) {
      Vec tile_sum = {}, tile_mean = {};
      for (int64_t key = first; key < keys && key < first + kKeys; ++key) {
        const int64_t at = key * kQueries + lane;
        const Vec weight = exponential(fma(load(p + at), direction, -largest) * size);
        tile_sum += weight;
        tile_mean = fma(weight, load(dp + at), tile_mean);
        store(p + at, weight);
      }
      sum += tile_sum;
      mean += tile_mean;
    }
    const Vec normalizer = spread(1.0f) / sum;
    mean = mean / sum;
    for (int64_t key = 0; key < keys; key += Math::kPack) {
      Vec gradients[2] = {};
      for (int i = 0; i < Math::kPack && key + i < keys; ++i) {
        float *weights = p + (key + i) * kQueries, *changes = dp + (key + i) * kQueries;
        const Vec weight = load(weights + lane) * normalizer;
        gradients[i] = weight * (load(changes + lane) - mean) * factor;
        if constexpr (Math::kPack == 1) {
          store(weights + lane, weight);
          store(changes + lane, gradients[i]);
        } else {
          // The words of 32 queries take the place of 16 numbers that were already read.
          Math::store_pairs(weights + lane / 2, weight);
          Math::store_pairs(changes + lane / 2, gradients[i]);
        }
      }
      if constexpr (Math::kPack == 2) {
        store(ds + key / 2 * kQueries + lane, Math::pair(gradients[0], gradients[1]));
      }
    }
  }
}

FD_HD Broadcast broadcast_words(const float* words) {
  return {reinterpret_cast<const char*>(words), 4 * kQueries, 4};
}

// Queries [begin, end) of one head: their dq, and their share of dk and dv, float32 [S][padded].
template <class Math, class T>
void differentiate(const AttentionGradientArguments& g, int64_t b, int64_t h, int64_t begin, int64_t end, float* dk,
                   float* dv, Scratch& scratch) {
  const int64_t S = g.positions, D = g.width, padded = round_up(D, kLanes), depth = words_of<Math>(D);
  const int64_t most = S < kKeys ? S : kKeys;
  float* q_t = scratch.take(depth * kQueries);     // for the logits: transposed
  float* grad_t = scratch.take(depth * kQueries);  // for the gradients of the weights
  float* q_stacked = scratch.take(kQueries * padded);     // for dk
  float* grad_stacked = scratch.take(kQueries * padded);  // for dv
  float* dq_t = scratch.take(D * kQueries);
  float* p = scratch.take(S * kQueries);
  float* dp = scratch.take(S * kQueries);
  float* ds = Math::kPack == 1 ? dp : scratch.take(S * kQueries);  // as words of keys
  float* k_copy = scratch.take(most * padded);
  float* v_copy = scratch.take(most * padded);
  alignas(64) float ones[kQueries];
  for (float& one : ones) one = 1.0f;
  const T *q = g.q.at<const T>(b, h), *k = g.k.at<const T>(b, h), *v = g.v.at<const T>(b, h);
  const T* grad = g.grad.at<const T>(b, h);

  for (int64_t first = begin; first < end; first += kQueries) {
    const int64_t count = end - first < kQueries ? end - first : kQueries, lanes = round_up(count, kLanes);
    const bool add = first > begin;
    pack_transposed<Math>(q_t, q + first * g.q.row, g.q.row, count, D);
    pack_transposed<Math>(grad_t, grad + first * g.grad.row, g.grad.row, count, D);
    pack_stacked<Math>(q_stacked, q + first * g.q.row, g.q.row, count, D);
    pack_stacked<Math>(grad_stacked, grad + first * g.grad.row, g.grad.row, count, D);
    for (int64_t key = 0; key < S; key += kKeys) {
      const int64_t keys = S - key < kKeys ? S - key : kKeys;
      multiply<Math>(broadcast_rows<Math>(k_copy, k + key * g.k.row, g.k.row, keys, D), q_t, kQueries,
                     p + key * kQueries, kQueries, keys, lanes, depth, false);
      multiply<Math>(broadcast_rows<Math>(v_copy, v + key * g.v.row, g.v.row, keys, D), grad_t, kQueries,
                     dp + key * kQueries, kQueries, keys, lanes, depth, false);
    }
    differentiate_softmax<Math>(p, dp, ds, S, lanes, g.scale);
    for (int64_t key = 0; key < S; key += kKeys) {
      const int64_t keys = S - key < kKeys ? S - key : kKeys, queries = words_of<Math>(count);
      multiply<Math>(broadcast_words(p + key * kQueries), grad_stacked, padded, dv + key * padded, padded, keys,
                     padded, queries, add);
      multiply<Math>(broadcast_words(dp + key * kQueries), q_stacked, padded, dk + key * padded, padded, keys,
                     padded, queries, add);
      multiply<Math>(broadcast_columns<Math>(k_copy, k + key * g.k.row, g.k.row, keys, D),
                     ds + key / Math::kPack * kQueries, kQueries, dq_t, kQueries, D, lanes, words_of<Math>(keys),
                     key > 0);
    }
    unpack_transposed(g.dq.at<T>(b, h) + first * g.dq.row, g.dq.row, dq_t, ones, count, D);
  }
}

// A row of dk or dv in its own type, from the shares of `chunks` items, `stride` apart.
template <class T>
FD_HD void write_row(T* to, const float* sums, int64_t chunks, int64_t stride, int64_t width) {
  for (int64_t d = 0; d < width; d += kLanes) {
    Vec sum = load(sums + d);
    for (int64_t chunk = 1; chunk < chunks; ++chunk) sum += load(sums + chunk * stride + d);
    store_rounded(to + d, sum, width - d);
  }
}

// Items are chunks of `queries` of one head. Where a head is one chunk, `shares` is null.
template <class Math, class T>
void backward(const AttentionGradientArguments& g, int64_t queries, float* shares, int64_t begin, int64_t end) {
  const int64_t S = g.positions, D = g.width, padded = round_up(D, kLanes), depth = words_of<Math>(D);
  const int64_t most = S < kKeys ? S : kKeys, chunks = (S + queries - 1) / queries;
  for (int64_t item = begin; item < end; ++item) {
    Scratch scratch((2 * depth + D + 3 * S + 2 * padded) * kQueries + 2 * (most + S) * padded);
    const int64_t b = item / chunks / g.heads, h = item / chunks % g.heads, first = item % chunks * queries;
    float* dk = shares ? shares + 2 * item * S * padded : scratch.take(2 * S * padded);
    float* dv = dk + S * padded;
    differentiate<Math, T>(g, b, h, first, S - first < queries ? S : first + queries, dk, dv, scratch);
    for (int64_t row = 0; !shares && row < S; ++row) {
      write_row(g.dk.at<T>(b, h) + row * g.dk.row, dk + row * padded, 1, 0, D);
      write_row(g.dv.at<T>(b, h) + row * g.dv.row, dv + row * padded, 1, 0, D);
    }
  }
}

// Adds the shares of dk and dv: items are rows of [B, H, S].
template <class T>
void add_shares(const AttentionGradientArguments& g, int64_t queries, const float* shares, int64_t begin,
                int64_t end) {
  const int64_t S = g.positions, D = g.width, padded = round_up(D, kLanes), chunks = (S + queries - 1) / queries;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / S, b = head / g.heads, h = head % g.heads, row = item % S;
    const float* dk = shares + 2 * head * chunks * S * padded + row * padded;
    write_row(g.dk.at<T>(b, h) + row * g.dk.row, dk, chunks, 2 * S * padded, D);
    write_row(g.dv.at<T>(b, h) + row * g.dv.row, dk + S * padded, chunks, 2 * S * padded, D);
  }
}

#undef FD_LANES
#undef FD_VECTORS
#undef FD_PAIRS
