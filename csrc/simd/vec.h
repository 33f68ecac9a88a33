// Vectors of float32 on one instruction set. A kernel's .cpp includes this file once for each set, inside a
// namespace and a target pragma of its own, with FD_LANES floats to a vector, with FD_BFLOAT16 where the processor
// rounds to bfloat16 itself, and with FD_RECIPROCALS where a division takes longer than to approximate it.

typedef float Vec __attribute__((vector_size(4 * FD_LANES), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * FD_LANES)));
typedef uint32_t Unsigned __attribute__((vector_size(4 * FD_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * FD_LANES), may_alias));
typedef float UnalignedVec __attribute__((vector_size(4 * FD_LANES), aligned(1), may_alias));
typedef uint16_t UnalignedHalves __attribute__((vector_size(2 * FD_LANES), aligned(1), may_alias));

constexpr int kLanes = FD_LANES;

#if FD_LANES == 16
FD_HD Vec spread(float value) { return (Vec)_mm512_set1_ps(value); }
FD_HD Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_ps(a, b, c); }
#elif FD_LANES == 8
FD_HD Vec spread(float value) { return (Vec)_mm256_set1_ps(value); }
FD_HD Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps(a, b, c); }
#else
FD_HD Vec spread(float value) { return Vec{value, value, value, value}; }
FD_HD Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }  // without the instruction, two roundings
#endif

// ---- Reading and writing vectors of any element type.

// The intrinsics where GCC 12 takes four instructions for one.
FD_HD Unsigned widened_bits(Halves bits) {
#if FD_LANES == 16
  return (Unsigned)_mm512_cvtepu16_epi32((__m256i)bits);
#elif FD_LANES == 8
  return (Unsigned)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, Unsigned);
#endif
}

FD_HD Halves narrowed_bits(Unsigned bits) {
#if FD_LANES == 16
  return (Halves)_mm512_cvtepi32_epi16((__m512i)bits);
#else
  return __builtin_convertvector(bits, Halves);
#endif
}

FD_HD Vec widened(Vec value, float*) { return value; }

FD_HD Vec widened(Halves bits, BFloat16*) { return (Vec)(widened_bits(bits) << 16); }

FD_HD Vec widened(Halves bits, Half*) {
#if FD_LANES == 16
  return (Vec)_mm512_cvtph_ps((__m256i)bits);
#else
  const Unsigned wide = widened_bits(bits);
  const Unsigned magnitude = wide & 0x7FFFu, sign = (wide & 0x8000u) << 16;
  const Unsigned finite = (Unsigned)((Vec)(magnitude << 13) * spread(0x1p112f));
  return (Vec)((magnitude < 0x7C00u ? finite : magnitude << 13 | 0x7F800000u) | sign);
#endif
}

FD_HD Vec narrowed(Vec value, float*) { return value; }

FD_HD Halves narrowed(Vec value, BFloat16*) {
#if FD_BFLOAT16
  return (Halves)_mm512_cvtneps_pbh(value);
#else
  return narrowed_bits(bfloat16_bits<Unsigned>(value));
#endif
}

FD_HD Halves narrowed(Vec value, Half*) {
#if FD_LANES == 16
  return (Halves)_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return narrowed_bits(half_bits<Unsigned>(value));
#endif
}

template <class T>
FD_HD Vec load(const T* from) {
  if constexpr (sizeof(T) == 4) return *reinterpret_cast<const UnalignedVec*>(from);
  else return widened(*reinterpret_cast<const UnalignedHalves*>(from), static_cast<T*>(nullptr));
}

template <class T>
FD_HD void store(T* to, Vec value) {
  const auto bits = narrowed(value, to);
  if constexpr (sizeof(T) == 4) *reinterpret_cast<UnalignedVec*>(to) = bits;
  else *reinterpret_cast<UnalignedHalves*>(to) = bits;
}

// The first `count` lanes alone; the others are read as 0.
template <class T>
FD_HD Vec load(const T* from, int64_t count) {
#if FD_LANES == 16
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 4) return (Vec)_mm512_maskz_loadu_ps(mask, from);
  else return widened((Halves)_mm256_maskz_loadu_epi16(mask, from), static_cast<T*>(nullptr));
#else
  T lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return load(lanes);
#endif
}

template <class T>
FD_HD void store(T* to, Vec value, int64_t count) {
#if FD_LANES == 16
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(to, mask, value);
  else _mm256_mask_storeu_epi16(to, mask, (__m256i)narrowed(value, to));
#else
  T lanes[kLanes];
  store(lanes, value);
  for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
#endif
}

// ---- Comparisons.

// Whether every lane is finite, where none is below 0.
FD_HD bool all_finite(Vec value) {
  const float infinity = __builtin_inff();
#if FD_LANES == 16
  return _mm512_cmp_ps_mask((__m512)value, (__m512)spread(infinity), _CMP_LT_OQ) == 0xFFFF;
#elif FD_LANES == 8
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)value, (__m256)spread(infinity), _CMP_LT_OQ)) == 0xFF;
#else
  bool finite = true;
  for (int i = 0; i < kLanes; ++i) finite &= value[i] < infinity;
  return finite;
#endif
}

// ---- Elementary functions.

// 2^u for u up to 127, with a relative error below 2^-23, 2^-18 or 2^-13 for T of float32, float16 and bfloat16;
// at least 2^-126; NaN stays NaN.
template <class T>
FD_HD Vec power_of_two(Vec u) {
#if FD_LANES < 16
  u = u < spread(-126.0f) ? spread(-126.0f) : u;
#endif
  const Vec shifted = u + spread(0x1.8p23f);  // the low bits of this sum are the nearest integer
  const Vec whole = shifted - spread(0x1.8p23f), r = u - whole;
  Vec p;
  if constexpr (sizeof(T) == 4) {
    p = fma(spread(0x1.5bba14p-10f), r, spread(0x1.3cea88p-7f));
    p = fma(p, r, spread(0x1.c6b752p-5f));
    p = fma(p, r, spread(0x1.ebf9bcp-3f));
    p = fma(p, r, spread(0x1.62e42ap-1f));
  } else if constexpr (std::is_same_v<T, Half>) {
    p = fma(spread(0x1.3a02ccp-7f), r, spread(0x1.c9fc46p-5f));
    p = fma(p, r, spread(0x1.ec0378p-3f));
    p = fma(p, r, spread(0x1.62e12cp-1f));
  } else {
    p = fma(spread(0x1.c2a218p-5f), r, spread(0x1.f00c4ep-3f));
    p = fma(p, r, spread(0x1.62f5fap-1f));
  }
  p = fma(p, r, spread(1.0f));
#if FD_LANES == 16
  return (Vec)_mm512_scalef_ps(p, whole);
#else
  return (Vec)((Integers)p + ((Integers)shifted << 23));
#endif
}

// silu(z) of u = -z * log2(e).
template <class T>
FD_HD Vec silu(Vec u) {
#if FD_LANES < 16
  u = u > spread(127.0f) ? spread(127.0f) : u;
#endif
  const Vec factor = spread(-kLog2E);
#if FD_RECIPROCALS
  u = (Vec)_mm512_min_ps(spread(126.0f), u);  // NaN stays NaN
  const Vec divisor = fma(power_of_two<T>(u), factor, factor);
  const Vec inverse = (Vec)_mm512_rcp14_ps((__m512)divisor);
  if constexpr (sizeof(T) == 2) return u * inverse;
  return u * fma(fma(-divisor, inverse, spread(1.0f)), inverse, inverse);
#else
  return u / fma(power_of_two<T>(u), factor, factor);
#endif
}
