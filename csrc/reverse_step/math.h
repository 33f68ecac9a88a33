// The arithmetic of the reverse step in float32, for every processor, in the order of the reference and without
// contraction. kernels/ops/reverse_step/__init__.py has the equations.
#pragma once

#include "common/floats.h"

namespace fused_diffusion {

constexpr int64_t kRowLength = 12;  // numbers in a row of a step table, StepCoefficients of Python

// A row without its timestep, which the arithmetic does not need.
struct StepCoefficients {
  float guidance_scale, x0_from_x, x0_from_output, clip_x0;
  float coef_x, coef_x0, coef_x0_prev, coef_output, sigma, log_var_min, log_var_max;
};

// One row of the float64 table. A device cannot raise an error for a step outside of the table, so such a step gives
// NaN.
FD_HD StepCoefficients load_row(const double* table, int64_t rows, int64_t step) {
  const bool inside = step >= 0 && step < rows;
  const double* r = table + (inside ? step * kRowLength : 0);
  float v[kRowLength];
  for (int i = 0; i < kRowLength; ++i) v[i] = inside ? static_cast<float>(r[i]) : __builtin_nanf("");
  return {v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11]};
}

// exp(x) to 1 ulp; overflows to infinity and underflows to 0 like expf.
template <class M>
FD_HD float exp_scalar(float x) {
  x = x < -104.0f ? -104.0f : x > 89.0f ? 89.0f : x;
  const float shifted = x * 0x1.715476p+0f + 0x1.8p23f;  // adding 1.5 * 2^23 rounds to an integer, in the low bits
  const float n = shifted - 0x1.8p23f;
  const float r = M::fma(n, -0x1.7f7d1cp-20f, M::fma(n, -0x1.62e4p-1f, x));  // x - n ln2
  float p = 0x1.6a4f52p-10f;
  p = M::fma(p, r, 0x1.12397ep-7f);
  p = M::fma(p, r, 0x1.5558aep-5f);
  p = M::fma(p, r, 0x1.555492p-3f);
  p = M::fma(p, r, 0x1.fffffcp-2f);
  const float y = M::fma(r * r, p, r) + 1.0f;
  const int32_t exponent = bit_cast<int32_t>(shifted) - 0x4B400000;
  const int32_t half = exponent >> 1;
  return y * bit_cast<float>((half + 127) << 23) * bit_cast<float>((exponent - half + 127) << 23);
}

FD_HD float guide(float cond, float uncond, const StepCoefficients& row) {
  return uncond + row.guidance_scale * (cond - uncond);
}

FD_HD float predict_x0(float x, float out, const StepCoefficients& row) {
  const float x0 = row.x0_from_x * x + row.x0_from_output * out;
  return x0 < -row.clip_x0 ? -row.clip_x0 : x0 > row.clip_x0 ? row.clip_x0 : x0;  // NaN stays NaN
}

FD_HD float drift(float x, float x0, float out, const StepCoefficients& row) {
  return row.coef_x * x + row.coef_x0 * x0 + row.coef_output * out;
}

// sigma where the model predicts v, which interpolates between two log-variances.
template <class M>
FD_HD float learned_sigma(float v, const StepCoefficients& row) {
  const float fraction = (v + 1.0f) * 0.5f;
  const float log_variance = fraction * row.log_var_max + (1.0f - fraction) * row.log_var_min;
  return row.sigma * exp_scalar<M>(0.5f * log_variance);
}

}  // namespace fused_diffusion
