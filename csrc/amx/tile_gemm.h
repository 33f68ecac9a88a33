// Matrix products by AMX, in tiles of 16 rows by 16 columns. Included after simd/vec.h, in the same namespace.
//
// Numbers of bfloat16 are multiplied 32 to a row, sums being in float32. float32 is then in three parts, whose sum it
// is: each is what the ones before leave, rounded. Of the nine products of parts the three smallest, 2^-24 of the whole
// and less, are left out.
//
// Bytes are multiplied 64 to a row, in half the time, sums being whole. float32 is then in three digits: a whole
// number, d[0] * 2^16 + d[1] * 2^8 + d[2], times a scale that is the same for all that are summed, the last two from
// -128 to 127, the first from -127 to 127. Of the nine products of digits the three smallest are left out here, too.

constexpr int64_t kRowBytes = 64, kTileBytes = 1024;

// 32 numbers as bfloat16: what rounding leaves of them follows `part_step` bytes behind, and so on.
template <int kParts>
FD_HD void store_parts(char* to, int64_t part_step, Vec first, Vec second) {
#pragma GCC unroll 3
  for (int part = 0; part < kParts; ++part, to += part_step) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    _mm512_storeu_si512(to, (__m512i)rounded);
    const Halves* halves = reinterpret_cast<const Halves*>(&rounded);
    first -= widened(halves[0], static_cast<BFloat16*>(nullptr));
    second -= widened(halves[1], static_cast<BFloat16*>(nullptr));
  }
}

// 64 numbers times their factors, less `zero` units of the first digit, as digits: the first digit of all, `step` bytes on the second, then the third.
// Within a row, numbers 16 j + 4 i + k are at 16 i + 4 j + k, for j, i and k up to 3.
FD_HD void store_digits(char* to, int64_t step, const Vec (&numbers)[4], const Vec (&factors)[4], int32_t zero) {
  // Bytes of w + 0x808080 are those digits plus 128.
  const __m512i halves = _mm512_set1_epi32(0x00808080), half = _mm512_set1_epi32(0x00808080 - (zero << 16));
  const __m512i bytes = _mm512_set4_epi32(0x0F0B0703, 0x0E0A0602, 0x0D090501, 0x0C080400);
  __m512i lanes[4];  // in each quarter: four third digits, four second, four first ones
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i whole = _mm512_cvtps_epi32((__m512)(numbers[j] * factors[j]));
    lanes[j] = _mm512_shuffle_epi8(_mm512_xor_si512(_mm512_add_epi32(whole, half), halves), bytes);
  }
  const __m512i a = _mm512_unpacklo_epi32(lanes[0], lanes[1]), b = _mm512_unpacklo_epi32(lanes[2], lanes[3]);
  const __m512i c = _mm512_unpackhi_epi32(lanes[0], lanes[1]), d = _mm512_unpackhi_epi32(lanes[2], lanes[3]);
  _mm512_storeu_si512(to, _mm512_unpacklo_epi64(c, d));
  _mm512_storeu_si512(to + step, _mm512_unpackhi_epi64(a, b));
  _mm512_storeu_si512(to + 2 * step, _mm512_unpacklo_epi64(a, b));
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

// The first lanes of 16; as many as there are, from none to all.
FD_HD __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xFFFF : count > 0 ? (1 << count) - 1 : 0; }

// 16 numbers of 16 bits, and 16 more, in pairs of one of each.
FD_HD __m512i interleaved(__m512i halves) {
  alignas(64) static constexpr int16_t kPairs[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kPairs), halves);
}

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline void load_shapes() {
  static constexpr TileShapes kShapes;
  _tile_loadconfig(&kShapes);
}

// On Sapphire Rapids a tile store takes some 1000 cycles more where the last one was over a hundred products ago, in
// whatever state the processor is then. So some tile is stored every few products, to where nobody reads.
struct Awake {
  int64_t products = 0;

  FD_HD void after(int64_t count) {
    alignas(64) static thread_local char nowhere[kTileBytes];
    products += count;
    if (products >= 48) {
      _tile_stored(7, nowhere, 64);
      products = 0;
    }
  }
};

// Tiles 0..3 are sums, 4 and 5 left factors, 6 and 7 right ones.
template <int kM>
FD_HD void load_left(const char* from, int64_t row_step) {
  _tile_loadd(4, from, row_step);
  if constexpr (kM == 2) _tile_loadd(5, from + 16 * row_step, row_step);
}

template <int kN>
FD_HD void load_right(const char* from) {
  _tile_loadd(6, from, 64);
  if constexpr (kN == 2) _tile_loadd(7, from + kTileBytes, 64);
}

template <int kM, int kN>
FD_HD void multiply_tiles() {
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (kN == 2) _tile_dpbf16ps(1, 4, 7);
  if constexpr (kM == 2) _tile_dpbf16ps(2, 5, 6);
  if constexpr (kM == 2 && kN == 2) _tile_dpbf16ps(3, 5, 7);
}

// 32 rows of the left factor, as [chunk of columns][part][row][64 bytes], and the right one as [chunk][tap][part][tile]:
// 32 columns of parts, the last first, a tile being [pair of rows][16 columns][2], or 16 columns of digits, a tile being
// [four rows][16 columns][4].
struct Factors {
  const char* left;
  int64_t row_step, part_step, chunk_step, chunks;  // bytes
  const int64_t* taps;  // each chunk is read this many bytes further, with a right factor for each
  int64_t tap_count;
  const char *right, *next;  // next: to fetch meanwhile, from here on, `fetch` cache lines a product; may be null
  int64_t fetch;
};

// Sums of 16 kM rows and 16 kN columns, rows `step` bytes apart; `meanwhile` is called for each product.
template <int kM, int kN, int kParts, class Meanwhile>
FD_HD void sum_products(const Factors& f, float* sums, int64_t step, const Meanwhile& meanwhile) {
  asm volatile("" ::: "memory");  // GCC's tile intrinsics do not say what memory they read
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const char *right = f.right, *next = f.next;
  Awake awake;
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
      if constexpr (kParts == 3) {  // the smallest products are first
        next_right();
        multiply_tiles<kM, kN>();
        load_left<kM>(left + f.part_step, f.row_step);
        multiply_tiles<kM, kN>();
        next_right();
        multiply_tiles<kM, kN>();
        load_left<kM>(left + 2 * f.part_step, f.row_step);
        multiply_tiles<kM, kN>();
        load_left<kM>(left, f.row_step);
        multiply_tiles<kM, kN>();
      }
      awake.after(kM * kN * (kParts == 3 ? 6 : 1));
      meanwhile();
    }
  }
  float* below = sums + 16 * step / sizeof(float);
  _tile_stored(0, sums, step);
  if constexpr (kN == 2) _tile_stored(1, sums + 16, step);
  if constexpr (kM == 2) _tile_stored(2, below, step);
  if constexpr (kM == 2 && kN == 2) _tile_stored(3, below + 16, step);
  asm volatile("" ::: "memory");
}

// The same for as many tiles as are wanted.
template <int kParts, class Meanwhile>
FD_HD void sum_products(int64_t rows, int64_t columns, const Factors& f, float* sums, int64_t step,
                        const Meanwhile& meanwhile) {
  if (rows > 16 && columns > 16) sum_products<2, 2, kParts>(f, sums, step, meanwhile);
  else if (rows > 16) sum_products<2, 1, kParts>(f, sums, step, meanwhile);
  else if (columns > 16) sum_products<1, 2, kParts>(f, sums, step, meanwhile);
  else sum_products<1, 1, kParts>(f, sums, step, meanwhile);
}

// The sums of 16 kM rows and 16 columns of digits, as whole numbers: of products of first digits, then in units of 2^-8
// and of 2^-16 of those, [unit][32 rows][16]. start: [unit][16], what the sums of each column start from.
template <int kM, class Meanwhile>
FD_HD void sum_digit_products(const Factors& f, const int32_t* start, int32_t* sums, const Meanwhile& meanwhile) {
  asm volatile("" ::: "memory");
  _tile_loadd(0, start, 0);
  _tile_loadd(2, start + 16, 0);
  _tile_loadd(4, start + 32, 0);
  if constexpr (kM == 2) {
    _tile_loadd(1, start, 0);
    _tile_loadd(3, start + 16, 0);
    _tile_loadd(5, start + 32, 0);
  }
  const char *right = f.right, *next = f.next;
  Awake awake;
  for (int64_t chunk = 0; chunk < f.chunks; ++chunk) {
    for (int64_t tap = 0; tap < f.tap_count; ++tap) {
      const char *first = f.left + chunk * f.chunk_step + f.taps[tap], *second = first + f.part_step;
      const char* third = second + f.part_step;
      const int64_t below = 16 * f.row_step;
      for (int64_t i = 0; i < f.fetch; ++i, next += 64) _mm_prefetch(next, _MM_HINT_T1);
      // Four products or more lie between two that add to one tile; 6 is kept where two have the same left factor.
      _tile_loadd(7, right, 64);
      _tile_loadd(6, first, f.row_step);
      _tile_dpbssd(0, 6, 7);
      if constexpr (kM == 2) {
        _tile_loadd(6, first + below, f.row_step);
        _tile_dpbssd(1, 6, 7);
        _tile_loadd(6, third + below, f.row_step);
        _tile_dpbssd(5, 6, 7);
      }
      _tile_loadd(6, third, f.row_step);
      _tile_dpbssd(4, 6, 7);
      _tile_loadd(6, second, f.row_step);
      _tile_dpbssd(2, 6, 7);
      if constexpr (kM == 2) {
        _tile_loadd(6, second + below, f.row_step);
        _tile_dpbssd(3, 6, 7);
      }
      _tile_loadd(7, right + kTileBytes, 64);
      if constexpr (kM == 2) {
        _tile_dpbssd(5, 6, 7);
        _tile_loadd(6, second, f.row_step);
      }
      _tile_dpbssd(4, 6, 7);
      _tile_loadd(6, first, f.row_step);
      _tile_dpbssd(2, 6, 7);
      if constexpr (kM == 2) {
        _tile_loadd(6, first + below, f.row_step);
        _tile_dpbssd(3, 6, 7);
      }
      _tile_loadd(7, right + 2 * kTileBytes, 64);
      if constexpr (kM == 2) {
        _tile_dpbssd(5, 6, 7);
        _tile_loadd(6, first, f.row_step);
      }
      _tile_dpbssd(4, 6, 7);
      right += 3 * kTileBytes;
      awake.after(6 * kM);
      meanwhile();
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(4, sums + 1024, 64);
  if constexpr (kM == 2) {
    _tile_stored(1, sums + 256, 64);
    _tile_stored(3, sums + 768, 64);
    _tile_stored(5, sums + 1280, 64);
  }
  asm volatile("" ::: "memory");
}
