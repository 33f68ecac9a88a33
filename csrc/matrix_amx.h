// Matrix products by AMX, in tiles of 16 rows x 32 by 32 x 16 columns: numbers of bfloat16, sums in float32. Included
// after vectors.h, in the same namespace.
//
// float32 is multiplied in three parts, whose sum it is: each is what the ones before leave, rounded. Of the nine
// products of parts the three smallest, 2^-24 of the whole and less, are left out.

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

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

inline void load_shapes() {
  static constexpr TileShapes kShapes;
  _tile_loadconfig(&kShapes);
}

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
// [chunk][tap][part, last first][tile], a tile being [pair of rows][16 columns][2].
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
