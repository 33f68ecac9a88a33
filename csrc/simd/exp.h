// Exponentials of vectors on one instruction set, included after simd/vec.h.
//
// exp2_fast has no more accuracy than its element type needs, and uses mul_add: its bits differ on the baseline.
// exp_reproducible rounds each multiply-add once, so its bits are the same on every instruction set. The third
// exponential, exp_scalar of reverse_step/math.h, is accurate to 1 ulp over all of float32, on the host as on CUDA.

// 2^u for u up to 127, and 2^-126 below u = -126. The relative error is below 2^-23 for T = float, 2^-18 for T = Half
// and 2^-13 for T = BFloat16. NaN stays NaN.
template <class T>
FD_HD Vec exp2_fast(Vec u) {
#if FD_LANES < 16
  u = u < spread(-126.0f) ? spread(-126.0f) : u;
#endif
  const Vec shifted = u + spread(0x1.8p23f);  // adding 1.5 * 2^23 rounds u to an integer, in the low bits
  const Vec whole = shifted - spread(0x1.8p23f), r = u - whole;
  Vec p;
  if constexpr (sizeof(T) == 4) {
    p = mul_add(spread(0x1.5bba14p-10f), r, spread(0x1.3cea88p-7f));
    p = mul_add(p, r, spread(0x1.c6b752p-5f));
    p = mul_add(p, r, spread(0x1.ebf9bcp-3f));
    p = mul_add(p, r, spread(0x1.62e42ap-1f));
  } else if constexpr (std::is_same_v<T, Half>) {
    p = mul_add(spread(0x1.3a02ccp-7f), r, spread(0x1.c9fc46p-5f));
    p = mul_add(p, r, spread(0x1.ec0378p-3f));
    p = mul_add(p, r, spread(0x1.62e12cp-1f));
  } else {
    p = mul_add(spread(0x1.c2a218p-5f), r, spread(0x1.f00c4ep-3f));
    p = mul_add(p, r, spread(0x1.62f5fap-1f));
  }
  p = mul_add(p, r, spread(1.0f));
#if FD_LANES == 16
  return (Vec)_mm512_scalef_ps(p, whole);
#else
  return (Vec)((Int32)p + ((Int32)shifted << 23));
#endif
}

// silu(z) = z / (1 + 2^u), given u = -z * log2(e).
template <class T>
FD_HD Vec silu(Vec u) {
#if FD_LANES < 16
  u = u > spread(127.0f) ? spread(127.0f) : u;
#endif
  const Vec factor = spread(-kLog2E);
#if FD_RECIPROCALS
  u = (Vec)_mm512_min_ps(spread(126.0f), u);  // NaN stays NaN
  const Vec divisor = mul_add(exp2_fast<T>(u), factor, factor);
  const Vec inverse = (Vec)_mm512_rcp14_ps((__m512)divisor);
  if constexpr (sizeof(T) == 2) return u * inverse;
  return u * mul_add(mul_add(-divisor, inverse, spread(1.0f)), inverse, inverse);
#else
  return u / mul_add(exp2_fast<T>(u), factor, factor);
#endif
}

// e^x for x up to 88, and 0 below -87.7. The error is 1 ulp near 0 and |x| / 2 ulps far from it. NaN stays NaN.
FD_HD Vec exp_reproducible(Vec x) {
  x = x * spread(kLog2E);
  x = x < spread(-127.0f) ? spread(-127.0f) : x;
  const Vec shifted = x + spread(0x1.8p23f);  // adding 1.5 * 2^23 rounds x to an integer, in the low bits
  const Vec r = x - (shifted - spread(0x1.8p23f));
  Vec p = spread(0x1.41fbbap-13f);
  p = fma(p, r, spread(0x1.5f3e54p-10f));
  p = fma(p, r, spread(0x1.3b2d4cp-7f));
  p = fma(p, r, spread(0x1.c6aee8p-5f));
  p = fma(p, r, spread(0x1.ebfbdcp-3f));
  p = fma(p, r, spread(0x1.62e43p-1f));
  p = fma(p, r, spread(1.0f));
  const Int32 exponent = ((Int32)shifted - (0x4B400000 - 127)) << 23;
  return p * (Vec)exponent;
}
