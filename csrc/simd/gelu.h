// GELU on vectors of one instruction set (Hendrycks & Gimpel 2016, arXiv:1606.08415). Included after simd/exp.h.

// 1 / d for positive d up to 2^126, as accurately as T needs.
template <class T>
FD_HD Vec reciprocal(Vec d) {
#if FD_LANES == 16
  if constexpr (sizeof(T) == 2) return (Vec)_mm512_rcp14_ps((__m512)d);
#endif
#if FD_RECIPROCALS
  const Vec inverse = (Vec)_mm512_rcp14_ps((__m512)d);
  return mul_add(mul_add(-d, inverse, spread(1.0f)), inverse, inverse);
#else
  return spread(1.0f) / d;
#endif
}

// gelu(x) = x * Phi(x), Phi being the normal distribution: torch.nn.functional.gelu(x). NaN stays NaN.
//
// For x < 0, Phi(x) = exp(-x^2 / 2) * erfcx(-x / sqrt(2)) / 2, and erfcx is a polynomial in 1 / (1 + p |x|), fitted to
// the least relative error; 1 - Phi(-x) serves for x > 0. The relative error is below 2e-6 for x > -5 and T = float,
// where the rounding of x^2 is most of it, and below 2^-12 for types of 16 bits.
template <class T>
FD_HD Vec gelu(Vec x) {
  const Vec lowered = (Vec)((Uint32)x & 0x7FFFFFFFu), limit = spread(16.0f);
  const Vec magnitude = lowered > limit ? limit : lowered;
  Vec p, t;
  if constexpr (sizeof(T) == 4) {
    t = reciprocal<T>(mul_add(spread(0.34f), magnitude, spread(1.0f)));
    p = mul_add(spread(-0x1.c369dap-6f), t, spread(0x1.2b5cccp-3f));
    p = mul_add(p, t, spread(-0x1.252a3ap-2f));
    p = mul_add(p, t, spread(0x1.bb578ep-3f));
    p = mul_add(p, t, spread(-0x1.baa3b6p-5f));
    p = mul_add(p, t, spread(0x1.e7bbacp-4f));
    p = mul_add(p, t, spread(0x1.d43b54p-4f));
    p = mul_add(p, t, spread(0x1.16fdc0p-3f));
    p = mul_add(p, t, spread(0x1.15bd02p-3f));
  } else {
    t = reciprocal<T>(mul_add(spread(0.25f), magnitude, spread(1.0f)));
    p = mul_add(spread(0x1.f786bep-3f), t, spread(-0x1.d40074p-4f));
    p = mul_add(p, t, spread(0x1.83e912p-3f));
    p = mul_add(p, t, spread(0x1.3c4f26p-4f));
    p = mul_add(p, t, spread(0x1.a0de0cp-4f));
  }
  typedef std::conditional_t<sizeof(T) == 4, float, Half> Accuracy;
  const Vec power = exp2_fast<Accuracy>(magnitude * magnitude * spread(-0.5f * kLog2E));
  const Vec below = p * t * power;
  return x * (x < spread(0.0f) ? below : spread(1.0f) - below);
}

// x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)): torch.nn.functional.gelu(x, approximate="tanh"). NaN stays NaN.
template <class T>
FD_HD Vec gelu_tanh(Vec x) {
  constexpr float kFactor = -1.5957691216f * kLog2E;  // -2 sqrt(2 / pi) log2(e)
  const Vec u = x * mul_add(x * x, spread(kFactor * 0.044715f), spread(kFactor)), limit = spread(125.0f);
  return x * reciprocal<T>(exp2_fast<T>(u > limit ? limit : u) + spread(1.0f));
}
