// Attention's products by AMX, of numbers rounded to bfloat16: how keys and values are packed and multiplied. Included
// after attention/amx_rows.h.

struct Bfloat16Products {
  static constexpr int64_t kKeys = 32, kColumns = 32;  // of a panel of keys or values: two tiles
  static constexpr int64_t kDepth = 32, kPieces = 1;   // numbers in a row of a factor, and rows of a number
  static constexpr int64_t kSumFloats = 32 * 32;       // of 32 queries and a panel of values

  static int64_t header_bytes(const PackedKeysValues&) { return 0; }

  // Items: panels of keys, then panels of values, of all heads of the group.
  template <class T>
  static void pack(const AttentionArguments& g, const PackedKeysValues& packed, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t head = packed.first + item / packed.items(), part = item % packed.items();
      if (part < packed.key_panels) {
        pack_transposed(rows_of<T>(g.k, head, g.keys, g), part, packed.width_chunks, packed.key_panel(head, part));
        continue;
      }
      const HeadRows<T> values = rows_of<T>(g.v, head, g.keys, g);
      const int64_t panel = part - packed.key_panels, tiles = packed.value_tiles(panel);
      for (int64_t chunk = 0; chunk < packed.key_chunks; ++chunk) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
          pack_pairs_tile(values, chunk, panel * kColumns + tile * kLanes,
                          packed.value_panel(head, panel, chunk) + tile * kTileBytes);
        }
      }
    }
  }

  // 32 queries as a left factor; the sign of the scale goes into them.
  template <class T>
  static void pack_queries(const HeadRows<T>& rows, int64_t block, const PackedKeysValues& packed, float scale,
                           QueryBlock& q) {
    pack_left(rows, block, packed.width_chunks, q.queries);
    for (int64_t at = 0; std::signbit(scale) && at < packed.width_chunks * kBlock * kRowBytes; at += kRowBytes) {
      const __m512i bits = _mm512_loadu_si512(q.queries + at);
      _mm512_storeu_si512(q.queries + at, _mm512_xor_si512(bits, _mm512_set1_epi16(-0x8000)));
    }
    for (int64_t i = 0; i < kBlock; ++i) q.factor[i] = std::fabs(scale) * kLog2E;
  }

  // Products of 32 queries and a panel of keys, written to `logits` as the logits without their factor.
  template <class Overlapped>
  static FD_HD void multiply_keys(int64_t queries, const Factors& f, float* logits, void*,
                                  const Overlapped& overlapped) {
    sum_products(queries, kKeys, f, logits, kKeyBlock * 4, overlapped);
  }

  // Takes a panel's logits into the largest of each row, of every 16th key in each lane.
  static FD_HD void finish_keys(int64_t queries, float* logits, const void*, const float*, int64_t keys,
                                float* largest) {
    const __mmask16 masks[2] = {first_lanes(keys), first_lanes(keys - kLanes)};
    for (int64_t i = 0; i < queries; ++i, logits += kKeyBlock, largest += kLanes) {
      __m512 row = (__m512)load(largest);
      row = _mm512_mask_max_ps(row, masks[0], row, (__m512)load(logits));
      row = _mm512_mask_max_ps(row, masks[1], row, (__m512)load(logits + kLanes));
      store(largest, (Vec)row);
    }
  }

  // Products of the weights and a panel of values.
  template <class Overlapped>
  static FD_HD void multiply_values(int64_t queries, int64_t tiles, const Factors& f, void* sums,
                                    const Overlapped& overlapped) {
    sum_products(queries, tiles * kLanes, f, static_cast<float*>(sums), kColumns * 4, overlapped);
  }

  static constexpr int64_t kValuePasses = 1;

  // 16 columns of the products of query `i`.
  static FD_HD Vec value_sum(const void* sums, int64_t i, int64_t tile, Vec) {
    return load(static_cast<const float*>(sums) + i * kColumns + tile * kLanes);
  }

  static FD_HD const float* value_scales(const PackedKeysValues&, int64_t, int64_t) { return nullptr; }
  static FD_HD const float* key_scales(const PackedKeysValues&, int64_t, int64_t) { return nullptr; }

  // 2^u and how four vectors of weights, of 64 keys, are written to the left factor of the second product.
  template <bool kPrecise>
  static FD_HD Vec weight(Vec u) {
    return exp2_of<kPrecise>(u);
  }
  static constexpr float kWeightUnit = 1;

  static FD_HD void store_weights(char* to, const Vec (&weights)[4]) {
    store_rounded(to, weights[0], weights[1]);
    store_rounded(to + kBlock * kRowBytes, weights[2], weights[3]);
  }
};
