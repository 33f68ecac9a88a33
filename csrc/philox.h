// Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011) and Box-Muller in float32: the lines that every
// processor runs. No operation here may be contracted or reassociated, so all of them give the same bits.
#pragma once

#include "common.h"

namespace fused_diffusion {

struct Words {
  uint32_t w0, w1, w2, w3;
};

FD_HD Words philox4x32(Words c, uint32_t k0, uint32_t k1) {
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c.w0;
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c.w2;
    c = {static_cast<uint32_t>(p1 >> 32) ^ c.w1 ^ k0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c.w3 ^ k1, static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// One block of four normals: counter (block, stream, sample_id), key seed.
FD_HD Words philox_block(uint32_t block, uint32_t stream, uint64_t sample_id, uint64_t seed) {
  return philox4x32({block, stream, static_cast<uint32_t>(sample_id), static_cast<uint32_t>(sample_id >> 32)},
                    static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// A word in (0, 1]: float32(w) * 2^-32 + 2^-33. The halves are exact, so their sum is float32(w).
FD_HD float uniform(uint32_t w) {
  const float word = static_cast<float>(static_cast<int32_t>(w >> 16)) * 65536.0f +
                     static_cast<float>(static_cast<int32_t>(w & 0xFFFF));
  return word * 0x1p-32f + 0x1p-33f;
}

// sqrt(-2 ln u) for u in [2^-33, 1] as radius + tail.
template <class M>
FD_HD void box_muller_radius(float u, float& radius, float& tail) {
  // u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
  const int32_t bits = bit_cast<int32_t>(u);
  const int32_t e = (bits - 0x3F3504F3) >> 23;
  const float f = bit_cast<float>(bits - static_cast<int32_t>(static_cast<uint32_t>(e) << 23)) - 1.0f;

  // ln u = e ln2 + f - f^2/2 + f^3 P(f); the large terms are summed with their rounding errors.
  const float square = f * f;
  const float square_tail = M::fma(f, f, -square);
  float p = -0x1.48075ap-4f;
  p = M::fma(p, f, 0x1.0bdf94p-3f);
  p = M::fma(p, f, -0x1.0d3346p-3f);
  p = M::fma(p, f, 0x1.219d8ep-3f);
  p = M::fma(p, f, -0x1.545de8p-3f);
  p = M::fma(p, f, 0x1.99b40cp-3f);
  p = M::fma(p, f, -0x1.0002b4p-2f);
  p = M::fma(p, f, 0x1.55551ep-2f);
  const float exponent = static_cast<float>(e);
  const float scaled = exponent * 0x1.62e4p-1f;  // exact: 15 bits times 6 bits
  const float sum = scaled + f;
  const float sum_tail = (scaled - sum) + f;
  const float log = sum - 0.5f * square;
  float log_tail = (sum - log) - 0.5f * square;
  log_tail += sum_tail - 0.5f * square_tail;
  log_tail = M::fma(exponent, 0x1.7f7d1cp-20f, log_tail);
  log_tail = M::fma(square * f, p, log_tail);

  const float x = -2.0f * (log + log_tail);
  const float x_tail = -2.0f * ((log - (log + log_tail)) + log_tail);
  radius = __builtin_sqrtf(x);
  // One Newton step; 12 % accuracy is plenty for 1 / radius here, and it is finite at radius 0.
  const float reciprocal = bit_cast<float>(0x7EF311C7 - bit_cast<int32_t>(radius));
  tail = (M::fma(-radius, radius, x) + x_tail) * (0.5f * reciprocal);
}

// (radius + tail) * (cos, sin)(2 pi u); the angle is reduced in turns, where that is exact.
template <class M>
FD_HD void box_muller_rotate(float radius, float tail, float u, float& n0, float& n1) {
  const float turns = 4.0f * u;
  const float shifted = turns + 0x1.8p23f;  // the low bits of this sum are round(turns)
  const uint32_t quarter = bit_cast<uint32_t>(shifted);
  const float f = turns - (shifted - 0x1.8p23f);
  const float g = f * f;

  // cos(pi f / 2) = 1 + g C(g), sin(pi f / 2) = f (pi / 2 + g S(g)), each as a large and a small part.
  float c = 0x1.d4748p-11f;
  c = M::fma(c, g, -0x1.55b138p-6f);
  c = M::fma(c, g, 0x1.03c1aep-2f);
  c = M::fma(c, g, -0x1.3bd3ccp+0f);
  const float cos_tail = c * g;
  float s = -0x1.2ddcecp-8f;
  s = M::fma(s, g, 0x1.46607ep-4f);
  s = M::fma(s, g, -0x1.4abbcp-1f);
  s = M::fma(s, g, -0x1.777a5cp-25f);
  const float sin = f * 0x1.921fb6p+0f;
  const float sin_tail = M::fma(f, s, M::fma(f, 0x1.921fb6p+0f, -sin));

  const bool odd = (quarter & 1) != 0;
  const float a = odd ? sin : 1.0f, a_tail = odd ? sin_tail : cos_tail;
  const float b = odd ? 1.0f : sin, b_tail = odd ? cos_tail : sin_tail;
  const float x = M::fma(radius, a, M::fma(radius, a_tail, tail * (a + a_tail)));
  const float y = M::fma(radius, b, M::fma(radius, b_tail, tail * (b + b_tail)));
  n0 = bit_cast<float>(bit_cast<uint32_t>(x) ^ ((quarter + 1) & 2) << 30);
  n1 = bit_cast<float>(bit_cast<uint32_t>(y) ^ (quarter & 2) << 30);
}

template <class M>
FD_HD void box_muller(uint32_t w0, uint32_t w1, float& n0, float& n1) {
  float radius, tail;
  box_muller_radius<M>(uniform(w0), radius, tail);
  box_muller_rotate<M>(radius, tail, uniform(w1), n0, n1);
}

}  // namespace fused_diffusion
