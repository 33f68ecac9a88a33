// Attention's products by AMX with the accuracy of float32: every number is three int8 limbs and a scale, which the
// numbers of a query, of a key, or of a column of a block of values share. Included after attention/amx_rows.h.

struct LimbProducts {
  static constexpr int64_t kKeys = 16, kColumns = 16;
  static constexpr int64_t kDepth = 64, kPieces = 3;
  static constexpr int64_t kSumFloats = 5 * 32 * 16;
  static constexpr float kLargest = 0x1p60f;  // no product of scales overflows
  alignas(64) static constexpr int32_t kZeros[48] = {};

  // Floats before the keys of a head: the scale of every key, then those of the columns of each block of values.
  static int64_t header_bytes(const PackedKeysValues& packed) {
    const int64_t blocks = divide_up(packed.keys, kKeyBlock);
    return blocks * (kKeyBlock + packed.tiles * kLanes) * static_cast<int64_t>(sizeof(float));
  }
  static FD_HD float* key_scales(const PackedKeysValues& packed, int64_t head, int64_t key) {
    return packed.header(head) + key;
  }
  static FD_HD float* value_scales(const PackedKeysValues& packed, int64_t head, int64_t block) {
    return packed.header(head) + divide_up(packed.keys, kKeyBlock) * kKeyBlock + block * packed.tiles * kLanes;
  }

  // The unit of the lowest limb's last bit, from the largest magnitude. 2^-100: the inverse of a smaller scale would
  // overflow.
  static FD_HD Vec scale_of(Vec largest) {
    return (Vec)_mm512_max_ps((__m512)largest, _mm512_set1_ps(0x1p-100f)) * spread(1 / kLargestLimb);
  }

  static FD_HD Vec magnitude(Vec x) { return (Vec)_mm512_and_si512((__m512i)x, _mm512_set1_epi32(0x7FFFFFFF)); }

  // Whether magnitudes are small enough for limbs. NaN is not.
  static FD_HD bool usable(Vec largest) {
    return _mm512_cmp_ps_mask((__m512)largest, _mm512_set1_ps(kLargest), _CMP_LE_OQ) == 0xFFFF;
  }

  // The larger of both, or b where b is NaN; a NaN among many stays, because no number is larger.
  static FD_HD Vec larger_or_nan(Vec a, Vec b) {
    return (Vec)_mm512_castsi512_ps(_mm512_max_epi32((__m512i)a, (__m512i)b));  // of magnitudes
  }

  template <class T>
  static FD_HD Vec largest_of_row(const HeadRows<T>& rows, int64_t position) {
    Vec largest = {};
    for (int64_t at = 0; at < rows.width; at += kLanes) {
      largest = larger_or_nan(largest, magnitude(rows.read(position, at)));
    }
    return largest;
  }

  // A row's limbs, [chunk of 64 numbers][limb], `chunk_step` and `limb_step` bytes apart. Returns the scale.
  template <class T>
  static FD_HD float store_row(const HeadRows<T>& rows, int64_t position, int64_t chunks, char* to, int64_t chunk_step,
                               int64_t limb_step, float sign, bool* all_usable) {
    const Vec largest = largest_of_row(rows, position);
    *all_usable &= usable(largest);
    const Vec scale = scale_of(spread(_mm512_reduce_max_ps((__m512)largest)));
    const Vec factor = spread(sign * 65536) / scale;
    const Vec factors[4] = {factor, factor, factor, factor};
    for (int64_t chunk = 0; chunk < chunks; ++chunk, to += chunk_step) {
      Vec numbers[4];
      for (int64_t j = 0; j < 4; ++j) numbers[j] = rows.read(position, chunk * kDepth + j * kLanes);
      store_limbs(to, limb_step, numbers, factors, 0);
    }
    return scale[0];
  }

  template <class T>
  static bool pack_keys(const HeadRows<T>& keys, int64_t panel, const PackedKeysValues& packed, int64_t head) {
    constexpr int64_t kMaxChunks = kMaxLimbWidth / kDepth;
    alignas(64) char rows[kMaxChunks * kPieces * kTileBytes];
    bool all_usable = true;
    for (int64_t i = 0; i < kKeys; ++i) {
      *key_scales(packed, head, panel * kKeys + i) =
          store_row(keys, panel * kKeys + i, packed.width_chunks, rows + i * kRowBytes, kPieces * kTileBytes,
                    kTileBytes, 1.0f, &all_usable);
    }
    char* to = packed.key_panel(head, panel);
    for (int64_t at = 0; at < packed.width_chunks * kPieces * kTileBytes; at += kTileBytes) {
      __m512i words[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) words[i] = _mm512_load_si512(rows + at + i * kRowBytes);
      transpose(words);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + at + i * kRowBytes, words[i]);
    }
    return all_usable;
  }

  // 16 columns of a block of values. Rows of a tile have four keys each, in the order of store_weights.
  template <class T>
  static bool pack_values(const HeadRows<T>& values, int64_t block, int64_t tile, const PackedKeysValues& packed,
                          int64_t head) {
    const int64_t first = block * kKeyBlock, end = std::min(first + kKeyBlock, packed.keys);
    Vec largest = {};
    for (int64_t key = first; key < end; ++key) {
      largest = larger_or_nan(largest, magnitude(values.read(key, tile * kLanes)));
    }
    const Vec scale = scale_of(largest), factor = spread(65536.0f) / scale;
    store(value_scales(packed, head, block) + tile * kLanes, scale * spread(0x1p16f / kWeightUnit));
    const __m512i flips = _mm512_set1_epi32(0x00808080), byte = _mm512_set1_epi32(255);
    for (int64_t chunk = first / kDepth; chunk * kDepth < end; ++chunk) {
      char* to = packed.value_panel(head, tile, chunk);
      for (int64_t row = 0; row < 16; ++row, to += kRowBytes) {
        __m512i limbs[kPieces] = {};
        for (int k = 0; k < 4; ++k) {
          const int64_t key = chunk * kDepth + row % 4 * 16 + row / 4 * 4 + k;
          const __m512i whole = _mm512_cvtps_epi32((__m512)(values.read(key, tile * kLanes) * factor));
          const __m512i bytes = _mm512_xor_si512(_mm512_add_epi32(whole, flips), flips);
          for (int limb = 0; limb < kPieces; ++limb) {
            const __m512i part = _mm512_and_si512(_mm512_srl_epi32(bytes, _mm_cvtsi32_si128(16 - 8 * limb)), byte);
            limbs[limb] = _mm512_or_si512(limbs[limb], _mm512_sll_epi32(part, _mm_cvtsi32_si128(8 * k)));
          }
        }
        for (int limb = 0; limb < kPieces; ++limb) _mm512_storeu_si512(to + limb * kTileBytes, limbs[limb]);
      }
    }
    return usable(largest);
  }

  // Items: panels of keys, then tiles of each block of values, of all heads of the group.
  template <class T>
  static void pack(const AttentionArguments& g, const PackedKeysValues& packed, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = packed.first + item / packed.items(), part = item % packed.items();
      const int64_t tile = part - packed.key_panels;
      const bool usable = part < packed.key_panels ? pack_keys(rows_of<T>(g.k, head, g.keys, g), part, packed, head)
                                                   : pack_values(rows_of<T>(g.v, head, g.keys, g), tile / packed.tiles,
                                                                 tile % packed.tiles, packed, head);
      if (!usable) packed.refuse(head);
    }
  }

  // Items: all queries of the group of heads. Refuses heads with queries that limbs cannot hold.
  template <class T>
  static void check_queries(const AttentionArguments& g, const PackedKeysValues& packed, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = packed.first + item / g.positions;
      if (!usable(largest_of_row(rows_of<T>(g.q, head, g.positions, g), item % g.positions))) packed.refuse(head);
    }
  }

  template <class T>
  static FD_HD void pack_queries(const HeadRows<T>& rows, int64_t block, const PackedKeysValues& packed, float scale,
                                 QueryBlock& q) {
    bool all_usable = true;
    for (int64_t i = 0; i < kBlock; ++i) {
      const float unit =
          store_row(rows, block * kBlock + i, packed.width_chunks, q.queries + i * kRowBytes,
                    kPieces * kBlock * kRowBytes, kBlock * kRowBytes, std::signbit(scale) ? -1.0f : 1.0f, &all_usable);
      q.factor[i] = unit * std::fabs(scale) * kLog2E;
    }
  }

  template <class Overlapped>
  static FD_HD void multiply_keys(int64_t queries, const Factors& f, float*, void* sums, const Overlapped& overlapped) {
    if (queries > 16) sum_limb_products<2>(f, kZeros, static_cast<int32_t*>(sums), overlapped);
    else sum_limb_products<1>(f, kZeros, static_cast<int32_t*>(sums), overlapped);
  }

  // Of most weights, which are far smaller than the largest, no limb may be lost.
  template <class Overlapped>
  static FD_HD void multiply_values(int64_t queries, int64_t, const Factors& f, void* sums,
                                    const Overlapped& overlapped) {
    int32_t *to = static_cast<int32_t*>(sums), *low = to + 3 * kBlock * kLanes;
    if (queries > 16) {
      sum_limb_products<2, true>(f, kZeros, to, overlapped);
      sum_low_limb_products<2>(f, low, overlapped);
    } else {
      sum_limb_products<1, true>(f, kZeros, to, overlapped);
      sum_low_limb_products<1>(f, low, overlapped);
    }
  }
  static constexpr int64_t kValuePasses = 2;

  // Row `row` of the sums of products in one unit.
  static FD_HD __m512i whole(const int32_t* sums, int unit, int64_t row) {
    return _mm512_load_si512(sums + unit * kBlock * kLanes + row * kLanes);
  }

  // The sum of a row's products, in units of both scales. low: that of the smallest of these products.
  static FD_HD Vec total(const int32_t* sums, int64_t row, Vec low) {
    const auto unit = [&](int index) FD_INLINE { return (Vec)_mm512_cvtepi32_ps(whole(sums, index, row)); };
    return fma(fma(low, spread(0x1p-8f), unit(1)), spread(0x1p-8f), unit(0));
  }

  // Writes a panel's logits, in units of the query's factor, and takes them into the largest of each row.
  static FD_HD void finish_keys(int64_t queries, float* logits, const void* sums, const float* key_scales, int64_t keys,
                                float* largest) {
    const Vec scales = load(key_scales);
    const __mmask16 mask = first_lanes(keys);
    for (int64_t i = 0; i < queries; ++i, logits += kKeyBlock, largest += kLanes) {
      const int32_t* from = static_cast<const int32_t*>(sums);
      const Vec row = total(from, i, (Vec)_mm512_cvtepi32_ps(whole(from, 2, i))) * scales;
      store(logits, row);
      const __m512 before = (__m512)load(largest);
      store(largest, (Vec)_mm512_mask_max_ps(before, mask, before, (__m512)row));
    }
  }

  static FD_HD Vec value_sum(const void* sums, int64_t i, int64_t, Vec scales) {
    const int32_t* from = static_cast<const int32_t*>(sums);
    const Vec lowest = (Vec)_mm512_cvtepi32_ps(_mm512_add_epi32(whole(from, 3, i), whole(from, 4, i)));
    return total(from, i, fma(lowest, spread(0x1p-8f), (Vec)_mm512_cvtepi32_ps(whole(from, 2, i)))) * scales;
  }

  // Weights are whole numbers of at most 2^23, in limbs without a sign.
  static constexpr float kWeightUnit = 0x1p23f;

  template <bool>
  static FD_HD Vec weight(Vec u) {
    return exp2_of<true, 23>(u);
  }

  static FD_HD void store_weights(char* to, const Vec (&weights)[4]) {
    store_unsigned_limbs(to, kBlock * kRowBytes, weights);
  }
};
