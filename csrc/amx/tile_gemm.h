// Matrix products by AMX, in tiles of 16 rows by 16 columns. Included after simd/vec.h.
//
// bfloat16: a row of 64 bytes holds 32 numbers, sums are float32. A float32 is the sum of three bfloat16 splits: each
// split is the rounded difference between the number and the sum of the splits before it. Three of the nine products
// of splits are omitted: each is at most 2^-24 of the whole.
//
// int8: a row holds 64 numbers, takes half the time, sums are int32. A float32 is an integer of three limbs,
// q = limb[0] * 2^16 + limb[1] * 2^8 + limb[2], times a scale that all numbers of a sum share. limb[0] is from -127 to
// 127, the others from -128 to 127. The three smallest of the nine products of limbs are omitted.

constexpr int64_t kRowBytes = 64, kTileBytes = 1024;

// 32 numbers as kSplits splits of bfloat16, `split_step` bytes apart.
template <int kSplits>
FD_HD void store_splits(char* to, int64_t split_step, Vec first, Vec second) {
#pragma GCC unroll 3
  for (int split = 0; split < kSplits; ++split, to += split_step) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    _mm512_storeu_si512(to, (__m512i)rounded);
    const Bits16* bits = reinterpret_cast<const Bits16*>(&rounded);
    first -= widened(bits[0], static_cast<BFloat16*>(nullptr));
    second -= widened(bits[1], static_cast<BFloat16*>(nullptr));
  }
}

// 64 numbers times their factors, less zero * 2^16, as int8 limbs: a row of top limbs, and the rows of the other limbs
// `step` and 2 `step` bytes behind. Within a row, number 16 j + 4 i + k is at 16 i + 4 j + k, for i, j and k from 0
// to 3.
FD_HD void store_limbs(char* to, int64_t step, const Vec (&numbers)[4], const Vec (&factors)[4], int32_t zero) {
  // The bytes of q + 0x808080 are the limbs plus 128; flipping a byte's top bit subtracts the 128.
  const __m512i top_bits = _mm512_set1_epi32(0x00808080), addend = _mm512_set1_epi32(0x00808080 - (zero << 16));
  const __m512i bytes = _mm512_set4_epi32(0x0F0B0703, 0x0E0A0602, 0x0D090501, 0x0C080400);
  __m512i lanes[4];  // in each 128 bits: four limbs [2], four limbs [1], four limbs [0]
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i whole = _mm512_cvtps_epi32((__m512)(numbers[j] * factors[j]));
    lanes[j] = _mm512_shuffle_epi8(_mm512_xor_si512(_mm512_add_epi32(whole, addend), top_bits), bytes);
  }
  const __m512i a = _mm512_unpacklo_epi32(lanes[0], lanes[1]), b = _mm512_unpacklo_epi32(lanes[2], lanes[3]);
  const __m512i c = _mm512_unpackhi_epi32(lanes[0], lanes[1]), d = _mm512_unpackhi_epi32(lanes[2], lanes[3]);
  _mm512_storeu_si512(to, _mm512_unpacklo_epi64(c, d));
  _mm512_storeu_si512(to + step, _mm512_unpackhi_epi64(a, b));
  _mm512_storeu_si512(to + 2 * step, _mm512_unpacklo_epi64(a, b));
}

// Transposes 16 x 16 numbers of 32 bits.
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

// Tile registers of products of bfloat16: 2 x 2 tiles of sums, two of the left factor, two of the right one. Macros,
// because GCC's tile intrinsics paste the number into assembly.
#define FD_SUM_00 0
#define FD_SUM_01 1
#define FD_SUM_10 2
#define FD_SUM_11 3
#define FD_LEFT_0 4
#define FD_LEFT_1 5
#define FD_RIGHT_0 6
#define FD_RIGHT_1 7

// Tile registers of products of int8 limbs: sums FD_UNIT_<unit>_<upper or lower 16 rows>, and one tile of each factor.
#define FD_UNIT_0_0 0
#define FD_UNIT_0_1 1
#define FD_UNIT_1_0 2
#define FD_UNIT_1_1 3
#define FD_UNIT_2_0 4
#define FD_UNIT_2_1 5
#define FD_LEFT 6
#define FD_RIGHT 7

// A mask of the first `count` lanes of 16: none for a negative count, all for a large one.
FD_HD __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xFFFF : count > 0 ? (1 << count) - 1 : 0; }

// The pairs (bits[i], bits[16 + i]) of numbers of 16 bits.
FD_HD __m512i interleaved(__m512i bits) {
  alignas(64) static constexpr int16_t kPairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kPairs), bits);
}

// Operand of LDTILECFG: eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline void load_shapes() {
  static constexpr TileShapes kShapes;
  _tile_loadconfig(&kShapes);
}

// On Sapphire Rapids a tile store takes some 1000 cycles longer if the last store was over a hundred tile products ago
// (measured; the cause is unknown). The workaround: a tile is stored to a dummy buffer every 48 products.
struct TileStoreKeepAlive {
  int64_t products = 0;

  FD_HD void after(int64_t count) {
    alignas(64) static thread_local char dummy[kTileBytes];
    products += count;
    if (products >= 48) {
      _tile_stored(FD_RIGHT_1, dummy, 64);
      products = 0;
    }
  }
};

template <int kM>
FD_HD void load_left(const char* from, int64_t row_step) {
  _tile_loadd(FD_LEFT_0, from, row_step);
  if constexpr (kM == 2) _tile_loadd(FD_LEFT_1, from + 16 * row_step, row_step);
}

template <int kN>
FD_HD void load_right(const char* from) {
  _tile_loadd(FD_RIGHT_0, from, 64);
  if constexpr (kN == 2) _tile_loadd(FD_RIGHT_1, from + kTileBytes, 64);
}

template <int kM, int kN>
FD_HD void multiply_tiles() {
  _tile_dpbf16ps(FD_SUM_00, FD_LEFT_0, FD_RIGHT_0);
  if constexpr (kN == 2) _tile_dpbf16ps(FD_SUM_01, FD_LEFT_0, FD_RIGHT_1);
  if constexpr (kM == 2) _tile_dpbf16ps(FD_SUM_10, FD_LEFT_1, FD_RIGHT_0);
  if constexpr (kM == 2 && kN == 2) _tile_dpbf16ps(FD_SUM_11, FD_LEFT_1, FD_RIGHT_1);
}

// Both factors of a product. A piece is a split of bfloat16 or a limb of int8; a chunk is 64 bytes of depth.
struct Factors {
  const char* left;                          // [chunk][piece][up to 32 rows][64 bytes]
  int64_t row_step, piece_step, chunk_step;  // bytes
  int64_t chunks;
  const int64_t* taps;  // offsets in bytes at which each chunk of `left` is read; each has a right factor of its own
  int64_t tap_count;
  // [chunk][tap][piece][tile]. bfloat16: the last split first, 32 columns in two tiles [pair of rows][16 columns][2].
  // int8: 16 columns in a tile [four rows][16 columns][4].
  const char* right;
  const char* next;  // where to prefetch from, or null: `fetch` cache lines for each chunk and tap
  int64_t fetch;
};

// Sums of 16 kM rows and 16 kN columns, rows `step` bytes apart. `overlapped` is called for each chunk and tap, to do
// other work while AMX is busy.
template <int kM, int kN, int kSplits, class Overlapped>
FD_HD void sum_products(const Factors& f, float* sums, int64_t step, const Overlapped& overlapped) {
  asm volatile("" ::: "memory");  // GCC's tile intrinsics do not declare which memory they read
  _tile_zero(FD_SUM_00);
  _tile_zero(FD_SUM_01);
  _tile_zero(FD_SUM_10);
  _tile_zero(FD_SUM_11);
  const char *right = f.right, *next = f.next;
  TileStoreKeepAlive keep_alive;
  for (int64_t chunk = 0; chunk < f.chunks; ++chunk) {
    for (int64_t tap = 0; tap < f.tap_count; ++tap) {
      const char* left = f.left + chunk * f.chunk_step + f.taps[tap];
      for (int64_t i = 0; i < f.fetch; ++i, next += 64) _mm_prefetch(next, _MM_HINT_T1);
      const auto next_right = [&]() FD_INLINE {
        load_right<kN>(right);
        right += kN * kTileBytes;
      };
      load_left<kM>(left, f.row_step);
      next_right();
      multiply_tiles<kM, kN>();
      if constexpr (kSplits == 3) {  // the smallest products first
        next_right();
        multiply_tiles<kM, kN>();
        load_left<kM>(left + f.piece_step, f.row_step);
        multiply_tiles<kM, kN>();
        next_right();
        multiply_tiles<kM, kN>();
        load_left<kM>(left + 2 * f.piece_step, f.row_step);
        multiply_tiles<kM, kN>();
        load_left<kM>(left, f.row_step);
        multiply_tiles<kM, kN>();
      }
      keep_alive.after(kM * kN * (kSplits == 3 ? 6 : 1));
      overlapped();
    }
  }
  float* below = sums + 16 * step / sizeof(float);
  _tile_stored(FD_SUM_00, sums, step);
  if constexpr (kN == 2) _tile_stored(FD_SUM_01, sums + 16, step);
  if constexpr (kM == 2) _tile_stored(FD_SUM_10, below, step);
  if constexpr (kM == 2 && kN == 2) _tile_stored(FD_SUM_11, below + 16, step);
  asm volatile("" ::: "memory");
}

// The same for up to 32 rows and columns, with as many tiles as they need.
template <int kSplits, class Overlapped>
FD_HD void sum_products(int64_t rows, int64_t columns, const Factors& f, float* sums, int64_t step,
                        const Overlapped& overlapped) {
  if (rows > 16 && columns > 16) sum_products<2, 2, kSplits>(f, sums, step, overlapped);
  else if (rows > 16) sum_products<2, 1, kSplits>(f, sums, step, overlapped);
  else if (columns > 16) sum_products<1, 2, kSplits>(f, sums, step, overlapped);
  else sum_products<1, 1, kSplits>(f, sums, step, overlapped);
}

// Sums of 16 kM rows and 16 columns of limbs, int32 [unit][32 rows][16]. Unit u holds the products limb[i] * limb[j]
// with i + j = u, so it counts in 2^(-8 u) of unit 0. start: [unit][16], the initial values of the sums of each column.
template <int kM, class Overlapped>
FD_HD void sum_limb_products(const Factors& f, const int32_t* start, int32_t* sums, const Overlapped& overlapped) {
  asm volatile("" ::: "memory");
  _tile_loadd(FD_UNIT_0_0, start, 0);
  _tile_loadd(FD_UNIT_1_0, start + 16, 0);
  _tile_loadd(FD_UNIT_2_0, start + 32, 0);
  if constexpr (kM == 2) {
    _tile_loadd(FD_UNIT_0_1, start, 0);
    _tile_loadd(FD_UNIT_1_1, start + 16, 0);
    _tile_loadd(FD_UNIT_2_1, start + 32, 0);
  }
  const char *right = f.right, *next = f.next;
  TileStoreKeepAlive keep_alive;
  for (int64_t chunk = 0; chunk < f.chunks; ++chunk) {
    for (int64_t tap = 0; tap < f.tap_count; ++tap) {
      const char *first = f.left + chunk * f.chunk_step + f.taps[tap], *second = first + f.piece_step;
      const char* third = second + f.piece_step;
      const int64_t below = 16 * f.row_step;
      for (int64_t i = 0; i < f.fetch; ++i, next += 64) _mm_prefetch(next, _MM_HINT_T1);
      // At least four products lie between two that add to one tile; the left tile stays where the next product uses
      // it.
      _tile_loadd(FD_RIGHT, right, 64);
      _tile_loadd(FD_LEFT, first, f.row_step);
      _tile_dpbssd(FD_UNIT_0_0, FD_LEFT, FD_RIGHT);
      if constexpr (kM == 2) {
        _tile_loadd(FD_LEFT, first + below, f.row_step);
        _tile_dpbssd(FD_UNIT_0_1, FD_LEFT, FD_RIGHT);
        _tile_loadd(FD_LEFT, third + below, f.row_step);
        _tile_dpbssd(FD_UNIT_2_1, FD_LEFT, FD_RIGHT);
      }
      _tile_loadd(FD_LEFT, third, f.row_step);
      _tile_dpbssd(FD_UNIT_2_0, FD_LEFT, FD_RIGHT);
      _tile_loadd(FD_LEFT, second, f.row_step);
      _tile_dpbssd(FD_UNIT_1_0, FD_LEFT, FD_RIGHT);
      if constexpr (kM == 2) {
        _tile_loadd(FD_LEFT, second + below, f.row_step);
        _tile_dpbssd(FD_UNIT_1_1, FD_LEFT, FD_RIGHT);
      }
      _tile_loadd(FD_RIGHT, right + kTileBytes, 64);
      if constexpr (kM == 2) {
        _tile_dpbssd(FD_UNIT_2_1, FD_LEFT, FD_RIGHT);
        _tile_loadd(FD_LEFT, second, f.row_step);
      }
      _tile_dpbssd(FD_UNIT_2_0, FD_LEFT, FD_RIGHT);
      _tile_loadd(FD_LEFT, first, f.row_step);
      _tile_dpbssd(FD_UNIT_1_0, FD_LEFT, FD_RIGHT);
      if constexpr (kM == 2) {
        _tile_loadd(FD_LEFT, first + below, f.row_step);
        _tile_dpbssd(FD_UNIT_1_1, FD_LEFT, FD_RIGHT);
      }
      _tile_loadd(FD_RIGHT, right + 2 * kTileBytes, 64);
      if constexpr (kM == 2) {
        _tile_dpbssd(FD_UNIT_2_1, FD_LEFT, FD_RIGHT);
        _tile_loadd(FD_LEFT, first, f.row_step);
      }
      _tile_dpbssd(FD_UNIT_2_0, FD_LEFT, FD_RIGHT);
      right += 3 * kTileBytes;
      keep_alive.after(6 * kM);
      overlapped();
    }
  }
  _tile_stored(FD_UNIT_0_0, sums, 64);
  _tile_stored(FD_UNIT_1_0, sums + 512, 64);
  _tile_stored(FD_UNIT_2_0, sums + 1024, 64);
  if constexpr (kM == 2) {
    _tile_stored(FD_UNIT_0_1, sums + 256, 64);
    _tile_stored(FD_UNIT_1_1, sums + 768, 64);
    _tile_stored(FD_UNIT_2_1, sums + 1280, 64);
  }
  asm volatile("" ::: "memory");
}
