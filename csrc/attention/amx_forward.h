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
FD_HD HeadRows<T> rows_of(const InputHeads& input, int64_t head, const Arguments& g) {
  return {input.at<const T>(head / g.heads, head % g.heads), input.row, g.positions, g.width};
}

// 32 numbers of each of 32 rows, as [split][row][64 bytes].
template <int kSplits, class T>
FD_HD void pack_chunk(const HeadRows<T>& rows, int64_t block, int64_t chunk, char* to) {
  for (int64_t i = 0; i < kBlock; ++i) {
    const int64_t row = block * kBlock + i, at = chunk * kBlock;
    store_splits<kSplits>(to + i * kRowBytes, kBlock * kRowBytes, rows.read(row, at), rows.read(row, at + kLanes));
  }
}

// 32 rows as a left factor, chunk after chunk of 32 numbers.
template <int kSplits, class T>
FD_HD void pack_left(const HeadRows<T>& rows, int64_t block, int64_t chunks, char* to) {
  for (int64_t chunk = 0; chunk < chunks; ++chunk, to += kSplits * kBlock * kRowBytes) {
    pack_chunk<kSplits>(rows, block, chunk, to);
  }
}

// 32 rows, transposed, as right factors of products that sum over the width: tiles [pair of numbers][16 rows][2].
template <int kSplits, class T>
FD_HD void pack_transposed(const HeadRows<T>& rows, int64_t block, int64_t chunks, char* to) {
  alignas(64) char left[kSplits][kBlock][kRowBytes];
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    pack_chunk<kSplits>(rows, block, chunk, left[0][0]);
    for (int part = kSplits - 1; part >= 0; --part) {
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

// 32 rows as right factors of products that sum over rows: for each chunk of 32 numbers, `chunk_step` bytes apart,
// tiles [pair of rows][16 numbers][2].
template <int kSplits, class T>
FD_HD void pack_pairs(const HeadRows<T>& rows, int64_t block, int64_t chunks, char* to, int64_t chunk_step) {
  for (int64_t chunk = 0; chunk < chunks; ++chunk, to += chunk_step) {
    for (int64_t pair = 0; pair < kBlock / 2; ++pair) {
      const int64_t row = block * kBlock + 2 * pair;
      for (int64_t tile = 0; tile < 2; ++tile) {
        alignas(64) char both[kSplits][kRowBytes];
        const int64_t at = chunk * kBlock + tile * kLanes;
        store_splits<kSplits>(both[0], kRowBytes, rows.read(row, at), rows.read(row + 1, at));
        for (int part = 0; part < kSplits; ++part) {
          char* there = to + ((kSplits - 1 - part) * 2 + tile) * kTileBytes + pair * kRowBytes;
          _mm512_storeu_si512(there, interleaved(_mm512_load_si512(both[part])));
        }
      }
    }
  }
}

// Items: blocks of keys and values of all heads of the group.
template <class T, int kSplits>
void pack_blocks(const AttentionArguments& g, const PackedKeysValues& packed, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = packed.first + item / packed.keys, block = item % packed.keys;
    const int64_t bytes = packed.block_bytes();
    pack_transposed<kSplits>(rows_of<T>(g.k, head, g), block, packed.width,
                             packed.keys_of(head) + block * packed.width * bytes);
    pack_pairs<kSplits>(rows_of<T>(g.v, head, g), block, packed.width, packed.values_of(head) + block * bytes,
                        packed.keys * bytes);
  }
}

// The softmax of a row of logits, not yet divided by its sum, as a row of a left factor. Returns 1 / sum, and in
// `logsumexp`, if not null, the logarithm of the softmax's denominator.
template <int kSplits>
FD_HD float softmax_row(const float* logits, int64_t keys, int64_t blocks, float scale, char* to, float* logsumexp) {
  Vec largest_lanes = spread(-__builtin_inff());
  for (int64_t at = 0; at < keys; at += kLanes) {
    largest_lanes = (Vec)_mm512_mask_max_ps(largest_lanes, first_lanes(keys - at), largest_lanes,
                                            load(logits + at) * spread(scale));
  }
  const Vec largest = spread(_mm512_reduce_max_ps(largest_lanes));
  Vec sum = {};
  for (int64_t block = 0; block < blocks; ++block, to += kSplits * kBlock * kRowBytes) {
    Vec weights[2];
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t at = block * kBlock + half * kLanes;
      const Vec weight = exp2_fast<float>((load(logits + at) * spread(scale) - largest) * spread(kLog2E));
      weights[half] = (Vec)_mm512_maskz_mov_ps(first_lanes(keys - at), weight);
      sum += weights[half];
    }
    store_splits<kSplits>(to, kBlock * kRowBytes, weights[0], weights[1]);
  }
  const float total = _mm512_reduce_add_ps(sum);
  if (logsumexp != nullptr) *logsumexp = _mm512_cvtss_f32((__m512)largest) + std::log(total);
  return 1.0f / total;
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

// Items: blocks of queries of all heads of the group.
template <class T, int kSplits>
void attend(const AttentionArguments& g, const PackedKeysValues& packed, int64_t begin, int64_t end) {
  load_shapes();
  alignas(64) float sums[kBlock * kBlock], inverse[kBlock];
  const int64_t keys = packed.keys * kBlock, blocks = divide_up(g.positions, kBlock), no_tap = 0;
  const int64_t left_bytes = kSplits * kBlock * kRowBytes;
  float* logits = buffer(kBlock * keys, 0);
  char* queries = reinterpret_cast<char*>(buffer(packed.width * left_bytes / 4, 1));
  char* weights = reinterpret_cast<char*>(buffer(packed.keys * left_bytes / 4, 2));
  Factors f{};
  f.row_step = kRowBytes, f.piece_step = kBlock * kRowBytes, f.chunk_step = left_bytes;
  f.taps = &no_tap, f.tap_count = 1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = packed.first + item / blocks, first = item % blocks * kBlock;
    const int64_t count = std::min(kBlock, g.positions - first), right_bytes = packed.block_bytes();
    T* out = g.out.at<T>(head / g.heads, head % g.heads) + first * g.out.row;
    pack_left<kSplits>(rows_of<T>(g.q, head, g), item % blocks, packed.width, queries);
    f.left = queries, f.chunks = packed.width;
    for (int64_t block = 0; block < packed.keys; ++block) {
      f.right = packed.keys_of(head) + block * packed.width * right_bytes;
      sum_products<kSplits>(count, kBlock, f, logits + block * kBlock, keys * 4, []() FD_INLINE {});
    }
    for (int64_t i = 0; i < count; ++i) {
      float* logsumexp = g.logsumexp == nullptr ? nullptr : g.logsumexp + head * g.positions + first + i;
      inverse[i] = softmax_row<kSplits>(logits + i * keys, g.positions, packed.keys, g.scale, weights + i * kRowBytes,
                                        logsumexp);
    }
    f.left = weights, f.chunks = packed.keys;
    for (int64_t block = 0; block < packed.width; ++block) {
      f.right = packed.values_of(head) + block * packed.keys * right_bytes;
      sum_products<kSplits>(count, kBlock, f, sums, kBlock * 4, []() FD_INLINE {});
      for (int64_t i = 0; i < count * kBlock; i += kLanes) {
        store(sums + i, load(sums + i) * spread(inverse[i / kBlock]));
      }
      write_sums(sums, out + block * kBlock, g.out.row, count, g.width - block * kBlock);
    }
  }
  _tile_release();
}
