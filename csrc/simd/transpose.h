// Transposition of a square of vectors on one instruction set. Included after simd/lanes.h.

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
