// Lanes of vectors in another order, on one instruction set. Included after simd/vec.h.

#if defined(__clang__)
#define FD_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FD_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Int32{__VA_ARGS__})
#endif

// Every kStep-th of the lanes of a and then of b, from number kFirst on.
template <int kFirst, int kStep, int... kLane>
FD_HD Vec lanes_of(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
  return FD_SHUFFLE(a, b, (kFirst + kStep * kLane)...);
}

FD_HD Vec even_lanes(Vec a, Vec b) { return lanes_of<0, 2>(a, b, std::make_integer_sequence<int, kLanes>{}); }
FD_HD Vec odd_lanes(Vec a, Vec b) { return lanes_of<1, 2>(a, b, std::make_integer_sequence<int, kLanes>{}); }

// The upper half of a, then the lower half of b.
FD_HD Vec upper_then_lower(Vec a, Vec b) {
  return lanes_of<kLanes / 2, 1>(a, b, std::make_integer_sequence<int, kLanes>{});
}
