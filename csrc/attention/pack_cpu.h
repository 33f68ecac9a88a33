// Attention on one instruction set: copies of queries, keys and values in the order in which products read them, and of
// results to the outputs. Included after simd/gemm.h and simd/transpose.h.
//
// A unit is kPack numbers of the type that is multiplied, in 32 bits: a float, or a pair of bfloat16.

typedef uint32_t UnitBits __attribute__((may_alias));

template <class Math>
FD_HD int64_t units_of(int64_t count) {
  return divide_up(count, Math::kPack);
}

// kLanes units from p on, which points to `count` numbers; missing numbers are 0.
template <class Math, class T>
FD_HD Vec load_units(const T* p, int64_t count) {
  if constexpr (Math::kPack == 2) {
    if (count >= kLanes * Math::kPack) return load(reinterpret_cast<const float*>(p));
    Vec units = {};
    memcpy(&units, p, count * sizeof(T));
    return units;
  } else {
    return count >= kLanes ? load(p) : load(p, count);
  }
}

// to[width / kPack][kQueries] units from rows [count][width]; lanes beyond count, up to a whole vector, are 0.
template <class Math, class T>
__attribute__((noinline)) void pack_transposed(float* to, const T* from, int64_t row, int64_t count, int64_t width) {
  const int64_t units = units_of<Math>(width);
  for (int64_t lane = 0; lane < count; lane += kLanes) {
    for (int64_t unit = 0; unit < units; unit += kLanes) {
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        square[i] = lane + i < count
                        ? load_units<Math>(from + (lane + i) * row + unit * Math::kPack, width - unit * Math::kPack)
                        : Vec{};
      }
      transpose_square(square);
      for (int i = 0; i < kLanes && unit + i < units; ++i) store(to + (unit + i) * kQueries + lane, square[i]);
    }
  }
}

// `width` numbers as float32.
template <class T>
FD_HD void widen_row(float* to, const T* from, int64_t width) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) store(to + d, load(from + d));
  for (; d < width; ++d) to[d] = to_float(from[d]);
}

// to[count / kPack][padded] units, each of kPack numbers of one column: 0 beyond the rows and the width.
template <class Math, class T>
__attribute__((noinline)) void pack_stacked(float* to, const T* from, int64_t row, int64_t count, int64_t width) {
  const int64_t padded = round_up(width, kLanes);
  for (int64_t i = 0; i < count; i += Math::kPack, from += Math::kPack * row, to += padded) {
    if constexpr (Math::kPack == 1) {
      widen_row(to, from, width);
      for (int64_t d = width; d < padded; ++d) to[d] = 0.0f;
    } else {
      const bool second = i + 1 < count;  // whether the pair has a second row
      UnitBits* units = reinterpret_cast<UnitBits*>(to);
      const T* next = second ? from + row : from;
      const uint32_t keep = second ? 0xFFFF0000u : 0u;
      for (int64_t d = 0; d < width; ++d) {
        units[d] = from[d].bits | (static_cast<uint32_t>(next[d].bits) << 16 & keep);
      }
      for (int64_t d = width; d < padded; ++d) units[d] = 0;
    }
  }
}

// Rows of a tensor as a left factor [count][width / kPack]: in place, or converted and copied to `scratch`.
template <class Math, class T>
FD_HD StridedRows rows_as_lhs(float* scratch, const T* from, int64_t row, int64_t count, int64_t width) {
  const int64_t units = units_of<Math>(width);
  if (sizeof(T) == sizeof(float) || (Math::kPack == 2 && width % 2 == 0)) {
    return {reinterpret_cast<const char*>(from), row * static_cast<int64_t>(sizeof(T)), 4, units};
  }
  for (int64_t i = 0; i < count; ++i, from += row) {
    float* to = scratch + i * units;
    if constexpr (Math::kPack == 1) {
      widen_row(to, from, width);
    } else {
      to[units - 1] = 0.0f;
      memcpy(to, from, width * sizeof(T));
    }
  }
  return {reinterpret_cast<const char*>(scratch), 4 * units, 4, units};
}

// The transposed rows as a left factor [width][count / kPack].
template <class Math, class T>
FD_HD StridedRows columns_as_lhs(float* scratch, const T* from, int64_t row, int64_t count, int64_t width) {
  if (sizeof(T) == sizeof(float)) {
    return {reinterpret_cast<const char*>(from), 4, row * static_cast<int64_t>(sizeof(T)), count};
  }
  pack_stacked<Math>(scratch, from, row, count, width);
  return {reinterpret_cast<const char*>(scratch), 4, 4 * round_up(width, kLanes), units_of<Math>(count)};
}

// The first `count` lanes, or all where there are more.
template <class T>
FD_HD void store_at_most(T* to, Vec value, int64_t count) {
  if (count >= kLanes) store(to, value);
  else store(to, value, count);
}

// out[count][width] from from[width][kQueries], each query's numbers times its factor.
template <class T>
__attribute__((noinline)) void unpack_transposed(T* out, int64_t row, const float* from, const float* factor,
                                                 int64_t count, int64_t width) {
  for (int64_t lane = 0; lane < count; lane += kLanes) {
    const Vec scaled = load(factor + lane);
    for (int64_t d = 0; d < width; d += kLanes) {
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        square[i] = d + i < width ? load(from + (d + i) * kQueries + lane) * scaled : Vec{};
      }
      transpose_square(square);
      for (int i = 0; i < kLanes && lane + i < count; ++i) {
        store_at_most(out + (lane + i) * row + d, square[i], width - d);
      }
    }
  }
}
