// Matrix products by AMX, in tiles of 16 rows x 32 by 32 x 16 columns: numbers of bfloat16, sums in float32. Included
// after vectors.h, in the same namespace.
//
// float32 is multiplied in two parts: x = high + low, but for 2^-16 of it at most and 2^-18 as a rule, and of the four
// products of parts the smallest, as small as that, is left out. Sums are in float32 as in any other kernel.

constexpr int64_t kRowBytes = 64, kTileBytes = 1024;

// 32 numbers as bfloat16: the high parts, and `part_step` bytes behind them the low ones.
template <int kParts>
FD_HD void store_parts(char* to, int64_t part_step, Vec first, Vec second) {
  const __m512bh high = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  _mm512_storeu_si512(to, (__m512i)high);
  if constexpr (kParts == 2) {
    const Halves* halves = reinterpret_cast<const Halves*>(&high);
    const Vec a = first - widened(halves[0], static_cast<BFloat16*>(nullptr));
    const Vec b = second - widened(halves[1], static_cast<BFloat16*>(nullptr));
    _mm512_storeu_si512(to + part_step, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
  }
}

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
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

// 32 rows of the left factor, as [chunk of 32 columns][part][row][32], and 32 columns of the right one, as
// [chunk][tap][part, low first][tile], a tile being [pair of rows][16 columns][2].
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
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const char *right = f.right, *next = f.next;
  for (int64_t chunk = 0; chunk < f.chunks; ++chunk) {
    for (int64_t tap = 0; tap < f.tap_count; ++tap) {
      const char* left = f.left + chunk * f.chunk_step + f.taps[tap];
      for (int64_t i = 0; i < f.fetch; ++i, next += 64) _mm_prefetch(next, _MM_HINT_T1);
      load_left<kM>(left, f.row_step);
      load_right<kN>(right);
      right += kN * kTileBytes;
      multiply_tiles<kM, kN>();
      if constexpr (kParts == 2) {  // the low parts on the right were first
        load_right<kN>(right);
        right += kN * kTileBytes;
        multiply_tiles<kM, kN>();
        load_left<kM>(left + f.part_step, f.row_step);
        multiply_tiles<kM, kN>();
      }
      meanwhile();
    }
  }
  float* below = sums + 16 * step / sizeof(float);
  _tile_stored(0, sums, step);
  if constexpr (kN == 2) _tile_stored(1, sums + 16, step);
  if constexpr (kM == 2) _tile_stored(2, below, step);
  if constexpr (kM == 2 && kN == 2) _tile_stored(3, below + 16, step);
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
