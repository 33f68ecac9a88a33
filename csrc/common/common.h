// Shared by host and device: annotations, a constant, integer division, bit casts, and a multiply-add that rounds once.
#pragma once

#include <cstdint>
#include <cstring>

// A function that is not inlined is compiled without the instruction set of its caller.
#define FD_INLINE __attribute__((always_inline))
#if defined(__CUDACC__)
#define FD_HD __host__ __device__ __forceinline__
#else
#define FD_HD inline FD_INLINE
#endif

namespace fused_diffusion {

constexpr float kLog2E = 0x1.715476p+0f;

FD_HD int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

FD_HD int64_t round_up(int64_t value, int64_t multiple) { return divide_up(value, multiple) * multiple; }

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

// Multiply-adds by the processor's own instruction, which the compiler chooses where this is inlined.
struct HardwareFma {
  static FD_HD float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

  // An integer rounded to float32.
  static FD_HD float from_uint32(uint32_t w) {
#if defined(__CUDACC__)
    return static_cast<float>(w);
#else  // There is no instruction before AVX-512. Both 16-bit halves are exact in float32, so their sum rounds once.
    return fma(static_cast<float>(static_cast<int32_t>(w >> 16)), 65536.0f,
               static_cast<float>(static_cast<int32_t>(w & 0xFFFF)));
#endif
  }
};

// The same with AVX-512's instruction for from_uint32. To be called from code that is compiled for AVX-512.
struct Avx512Fma : HardwareFma {
  static FD_HD float from_uint32(uint32_t w) { return static_cast<float>(w); }
};

// The same bits without that instruction: the product is exact in float64, and a sum that is rounded to odd in float64
// then rounds correctly to float32 (Boldo & Melquiond 2008).
struct PortableFma {
  static FD_HD float fma(float a, float b, float c) {
    const double product = static_cast<double>(a) * b, addend = c;
    const double sum = product + addend;
    const double back = sum - product;
    const double error = (product - (sum - back)) + (addend - back);
    const int64_t bits = bit_cast<int64_t>(sum);
    const int64_t even = ~bits & 1;  // rounding to odd moves an even last bit only, towards the exact sum
    const int64_t step = (error > 0) == (sum > 0) ? even : -even;
    const bool inexact = error < 0 || error > 0;  // false for NaN
    return static_cast<float>(bit_cast<double>(inexact ? bits + step : bits));
  }

  static FD_HD float from_uint32(uint32_t w) {
    return static_cast<float>(static_cast<int32_t>(w >> 16)) * 65536.0f +
           static_cast<float>(static_cast<int32_t>(w & 0xFFFF));
  }
};

}  // namespace fused_diffusion
