// Vectors of float32 on one instruction set: simd/foreach_isa.inc includes this file once for each, and explains the
// macros FD_LANES, FD_BFLOAT16 and FD_RECIPROCALS.

typedef float Vec __attribute__((vector_size(4 * FD_LANES), may_alias));
typedef int32_t Int32 __attribute__((vector_size(4 * FD_LANES)));
typedef uint32_t Uint32 __attribute__((vector_size(4 * FD_LANES)));
typedef uint16_t Bits16 __attribute__((vector_size(2 * FD_LANES), may_alias));
typedef float UnalignedVec __attribute__((vector_size(4 * FD_LANES), aligned(1), may_alias));
typedef uint16_t UnalignedBits16 __attribute__((vector_size(2 * FD_LANES), aligned(1), may_alias));

constexpr int kLanes = FD_LANES;

// Scalar arithmetic with the same bits on every instruction set: the M of philox/math.h and reverse_step/math.h.
#if FD_LANES == 16
typedef Avx512Fma Scalar;
#elif FD_LANES == 8 || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
typedef HardwareFma Scalar;
#else
typedef PortableFma Scalar;
#endif

// fma(a, b, c) is a * b + c rounded once, so its bits are the same on every instruction set; the baseline takes some
// twenty operations for it. mul_add(a, b, c) is the fastest: it rounds once or, on the baseline, twice.
#if FD_LANES == 16
FD_HD Vec spread(float value) { return (Vec)_mm512_set1_ps(value); }
FD_HD Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_ps(a, b, c); }
FD_HD Vec mul_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
#elif FD_LANES == 8
FD_HD Vec spread(float value) { return (Vec)_mm256_set1_ps(value); }
FD_HD Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps(a, b, c); }
FD_HD Vec mul_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }
#else
FD_HD Vec spread(float value) { return Vec{value, value, value, value}; }
FD_HD Vec fma(Vec a, Vec b, Vec c) {
  Vec result;
  for (int i = 0; i < kLanes; ++i) result[i] = Scalar::fma(a[i], b[i], c[i]);
  return result;
}
FD_HD Vec mul_add(Vec a, Vec b, Vec c) { return a * b + c; }
#endif

// The larger of both. Where either is NaN, max_or_a gives a and max_or_b gives b.
FD_HD Vec max_or_a(Vec a, Vec b) { return a < b ? b : a; }
FD_HD Vec max_or_b(Vec a, Vec b) { return a > b ? a : b; }

// ---- Reading and writing vectors of any element type.

// Intrinsics, because GCC 12 needs four instructions for __builtin_convertvector where one does.
FD_HD Uint32 widened_bits(Bits16 bits) {
#if FD_LANES == 16
  return (Uint32)_mm512_cvtepu16_epi32((__m256i)bits);
#elif FD_LANES == 8
  return (Uint32)_mm256_cvtepu16_epi32((__m128i)bits);
#else
  return __builtin_convertvector(bits, Uint32);
#endif
}

FD_HD Bits16 narrowed_bits(Uint32 bits) {
#if FD_LANES == 16
  return (Bits16)_mm512_cvtepi32_epi16((__m512i)bits);
#else
  return __builtin_convertvector(bits, Bits16);
#endif
}

FD_HD Vec widened(Vec value, float*) { return value; }

FD_HD Vec widened(Bits16 bits, BFloat16*) { return (Vec)(widened_bits(bits) << 16); }

FD_HD Vec widened(Bits16 bits, Half*) {
#if FD_LANES == 16
  return (Vec)_mm512_cvtph_ps((__m256i)bits);
#else
  const Uint32 wide = widened_bits(bits);
  const Uint32 magnitude = wide & 0x7FFFu, sign = (wide & 0x8000u) << 16;
  const Uint32 finite = (Uint32)((Vec)(magnitude << 13) * spread(0x1p112f));
  return (Vec)((magnitude < 0x7C00u ? finite : magnitude << 13 | 0x7F800000u) | sign);
#endif
}

FD_HD Vec narrowed(Vec value, float*) { return value; }

FD_HD Bits16 narrowed(Vec value, BFloat16*) {
#if FD_BFLOAT16
  return (Bits16)_mm512_cvtneps_pbh(value);
#else
  return narrowed_bits(bfloat16_bits<Uint32>(value));
#endif
}

FD_HD Bits16 narrowed(Vec value, Half*) {
#if FD_LANES == 16
  return (Bits16)_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return narrowed_bits(half_bits<Uint32>(value));
#endif
}

template <class T>
FD_HD Vec load(const T* from) {
  if constexpr (sizeof(T) == 4) return *reinterpret_cast<const UnalignedVec*>(from);
  else return widened(*reinterpret_cast<const UnalignedBits16*>(from), static_cast<T*>(nullptr));
}

template <class T>
FD_HD void store(T* to, Vec value) {
  const auto bits = narrowed(value, to);
  if constexpr (sizeof(T) == 4) *reinterpret_cast<UnalignedVec*>(to) = bits;
  else *reinterpret_cast<UnalignedBits16*>(to) = bits;
}

// The first `count` lanes; the other lanes are 0.
template <class T>
FD_HD Vec load(const T* from, int64_t count) {
#if FD_LANES == 16
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 4) return (Vec)_mm512_maskz_loadu_ps(mask, from);
  else return widened((Bits16)_mm256_maskz_loadu_epi16(mask, from), static_cast<T*>(nullptr));
#else
  if (count == kLanes) return load(from);  // the copy below takes as long as some twenty additions
  T lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return load(lanes);
#endif
}

// Writes the first `count` lanes alone.
template <class T>
FD_HD void store(T* to, Vec value, int64_t count) {
#if FD_LANES == 16
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(to, mask, value);
  else _mm256_mask_storeu_epi16(to, mask, (__m256i)narrowed(value, to));
#else
  if (count == kLanes) return store(to, value);
  T lanes[kLanes];
  store(lanes, value);
  for (int64_t i = 0; i < count; ++i) to[i] = lanes[i];
#endif
}

// ---- Comparisons.

// Whether every lane is finite. No lane may be negative.
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
