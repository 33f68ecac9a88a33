// Transposition of a square of vectors on one instruction set, included after simd/vec.h.

#if defined(__clang__)
#define FD_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FD_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Int32{__VA_ARGS__})
#endif

template <int kBlock, int... kLane>
FD_HD void exchange_blocks(Vec& a, Vec& b, std::integer_sequence<int, kLane...>) {
  const Vec upper = FD_SHUFFLE(a, b, (kLane & kBlock ? kLanes + kLane - kBlock : kLane)...);
  b = FD_SHUFFLE(a, b, (kLane & kBlock ? kLanes + kLane : kLane + kBlock)...);
  a = upper;
}

// Exchanges ever smaller blocks across the diagonal.
template <int kBlock = kLanes / 2>
FD_HD void transpose_square(Vec (&rows)[kLanes]) {
  if constexpr (kBlock > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (!(i & kBlock)) exchange_blocks<kBlock>(rows[i], rows[i + kBlock], std::make_integer_sequence<int, kLanes>{});
    }
    transpose_square<kBlock / 2>(rows);
  }
}

#undef FD_SHUFFLE
