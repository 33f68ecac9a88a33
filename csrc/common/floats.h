// The 16-bit floating-point types, and their conversions to and from float32, rounding to the nearest even.
#pragma once

#include "common/common.h"

namespace fused_diffusion {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

FD_HD float to_float(float value) { return value; }

FD_HD float to_float(BFloat16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

FD_HD float to_float(Half value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const uint32_t magnitude = value.bits & 0x7FFFu, sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f);
  return bit_cast<float>((magnitude < 0x7C00u ? finite : magnitude << 13 | 0x7F800000u) | sign);
#endif
}

// A float32 rounded to bfloat16, as its 16 bits. For one number, Bits is uint32_t; for a vector, a vector of uint32_t.
template <class Bits, class Float>
FD_HD Bits bfloat16_bits(Float value) {
  const Bits bits = bit_cast<Bits>(value);
  const Bits rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16, nan = bits >> 16 | 0x40u;
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded;
}

// The same for float16.
template <class Bits, class Float>
FD_HD Bits half_bits(Float value) {
  const Bits bits = bit_cast<Bits>(value), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  const Bits normal = (magnitude + 0xC8000FFFu + (magnitude >> 13 & 1u)) >> 13;
  // Below 2^-14, the last bit of magnitude + 0.5 is worth the last bit of a subnormal float16, so the sum rounds there.
  const Bits subnormal = bit_cast<Bits>(bit_cast<Float>(magnitude) + 0.5f) - 0x3F000000u;
  const Bits finite = magnitude < 0x38800000u ? subnormal : normal;
  const Bits nan = Bits{} + 0x7E00u, infinity = Bits{} + 0x7C00u;
  const Bits special = magnitude > 0x7F800000u ? nan : infinity;
  return (magnitude < 0x477FF000u ? finite : special) | sign >> 16;
}

FD_HD void from_float(float value, float& to) { to = value; }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800  // the same in one instruction, but that NaN has other bits
__device__ __forceinline__ void from_float(float value, BFloat16& to) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
}

__device__ __forceinline__ void from_float(float value, Half& to) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(value));
}
#else
FD_HD void from_float(float value, BFloat16& to) { to.bits = static_cast<uint16_t>(bfloat16_bits<uint32_t>(value)); }

FD_HD void from_float(float value, Half& to) { to.bits = static_cast<uint16_t>(half_bits<uint32_t>(value)); }
#endif

}  // namespace fused_diffusion
