// What the host and the device share: annotations, a constant, division, bit casts, a fused multiply-add that rounds once.
#pragma once

#include <cstdint>
#include <cstring>

#define FD_INLINE __attribute__((always_inline))  // what is not inlined is not compiled for AVX either
#if defined(__CUDACC__)
#define FD_HD __host__ __device__ __forceinline__
#else
#define FD_HD inline FD_INLINE
#endif

namespace fused_diffusion {

constexpr float kLog2E = 0x1.715476p+0f;

FD_HD int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class To, class From>
FD_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
#if defined(__CUDACC__)
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
#else
  return __builtin_bit_cast(To, from);
#endif
}

// The processor's own instruction. Which one it is, the compiler knows once this is inlined.
struct HardwareFma {
  static FD_HD float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

  // A word rounded to float32.
  static FD_HD float from_word(uint32_t w) {
#if defined(__CUDACC__)
    return static_cast<float>(w);
#else  // no instruction before AVX-512: the halves are exact, so their sum rounds once
    return fma(static_cast<float>(static_cast<int32_t>(w >> 16)), 65536.0f,
               static_cast<float>(static_cast<int32_t>(w & 0xFFFF)));
#endif
  }
};

// The same bits without the instruction: the product is exact in float64, and a sum rounded to odd there
// rounds correctly to float32 (Boldo & Melquiond 2008).
struct PortableFma {
  static FD_HD float fma(float a, float b, float c) {
    const double product = static_cast<double>(a) * b, addend = c;
    const double sum = product + addend;
    const double back = sum - product;
    const double error = (product - (sum - back)) + (addend - back);
    const int64_t bits = bit_cast<int64_t>(sum);
    const int64_t even = ~bits & 1;  // only an even last bit moves, towards the exact sum
    const int64_t step = (error > 0) == (sum > 0) ? even : -even;
    const bool inexact = error < 0 || error > 0;  // false for NaN
    return static_cast<float>(bit_cast<double>(inexact ? bits + step : bits));
  }

  static FD_HD float from_word(uint32_t w) {
    return static_cast<float>(static_cast<int32_t>(w >> 16)) * 65536.0f +
           static_cast<float>(static_cast<int32_t>(w & 0xFFFF));
  }
};

}  // namespace fused_diffusion
