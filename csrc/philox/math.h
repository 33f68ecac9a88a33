// Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011) and the Box-Muller transform in float32, for every processor. No
// operation here may be contracted or reassociated, so all processors compute the same bits.
//
// M is the scalar arithmetic: HardwareFma, PortableFma, or Scalar of simd/vec.h.
#pragma once

#include "common/common.h"

namespace fused_diffusion {

FD_HD uint64_t wide_product(uint64_t word, uint32_t constant) {
  return static_cast<uint64_t>(static_cast<uint32_t>(word)) * constant;
}

#include "philox/rounds.h"

// One block of four normals: counter (block, stream, sample_id), key seed.
FD_HD Words<uint32_t> philox_block(uint32_t block, uint32_t stream, uint64_t sample_id, uint64_t seed) {
  Words<uint64_t> c[1] = {{block, stream, sample_id, sample_id >> 32}};
  philox4x32(c, seed);
  return {static_cast<uint32_t>(c[0].w0), static_cast<uint32_t>(c[0].w1), static_cast<uint32_t>(c[0].w2),
          static_cast<uint32_t>(c[0].w3)};
}

// sqrt(-2 ln u) as radius + tail, for u = float32(w) 2^-32 + 2^-33 in [2^-33, 1].
template <class M>
FD_HD void box_muller_radius(uint32_t w, float& radius, float& tail) {
  // u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
  const int32_t bits = bit_cast<int32_t>(M::fma(M::from_uint32(w), 0x1p-32f, 0x1p-33f));
  const int32_t e = (bits - 0x3F3504F3) >> 23;
  const float f = bit_cast<float>(bits - static_cast<int32_t>(static_cast<uint32_t>(e) << 23)) - 1.0f;

  // -2 ln u = -2 e ln2 - 2 f + f^2 + f^3 P(f); the large terms are summed with their rounding errors.
  const float square = f * f;
  const float square_tail = M::fma(f, f, -square);
  float p = 0x1.48075ap-3f;
  p = M::fma(p, f, -0x1.0bdf94p-2f);
  p = M::fma(p, f, 0x1.0d3346p-2f);
  p = M::fma(p, f, -0x1.219d8ep-2f);
  p = M::fma(p, f, 0x1.545de8p-2f);
  p = M::fma(p, f, -0x1.99b40cp-2f);
  p = M::fma(p, f, 0x1.0002b4p-1f);
  p = M::fma(p, f, -0x1.55551ep-1f);
  const float exponent = static_cast<float>(e);
  const float scaled = exponent * -0x1.62e4p+0f;  // exact: 15 bits times 6 bits
  const float sum = M::fma(f, -2.0f, scaled);
  const float sum_tail = M::fma(f, -2.0f, scaled - sum);
  const float log = sum + square;
  float log_tail = (sum - log) + square;
  log_tail += sum_tail + square_tail;
  log_tail = M::fma(exponent, -0x1.7f7d1cp-19f, log_tail);
  log_tail = M::fma(square * f, p, log_tail);

  const float x = log + log_tail;
  const float x_tail = (log - x) + log_tail;
  radius = __builtin_sqrtf(x);
  // One Newton step, for which an approximation of 1 / (2 radius) to 12 % is enough; it is finite at radius 0.
  const float half_reciprocal = bit_cast<float>(0x7E7311C7 - bit_cast<int32_t>(radius));
  tail = (M::fma(-radius, radius, x) + x_tail) * half_reciprocal;
}

// (radius + tail) * (cos, sin)(2 pi u); the angle is reduced in turns, where that is exact.
template <class M>
FD_HD void box_muller_rotate(float radius, float tail, uint32_t w, float& n0, float& n1) {
  const float turns = M::fma(M::from_uint32(w), 0x1p-30f, 0x1p-31f);  // 4 u
  const float shifted = turns + 0x1.8p23f;  // adding 1.5 * 2^23 rounds turns to an integer, in the low bits
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
  box_muller_radius<M>(w0, radius, tail);
  box_muller_rotate<M>(radius, tail, w1, n0, n1);
}

}  // namespace fused_diffusion
