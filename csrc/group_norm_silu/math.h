// The arithmetic of group_norm_silu that the CPU and CUDA share: moments, the affine map of each channel, and the
// coefficients of the gradient. kernels/ops/group_norm_silu/__init__.py has the equation.
#pragma once

#include "common/floats.h"

namespace fused_diffusion {

constexpr float kLowestSilu = 0.2784646f, kLowestSiluAt = -1.2784646f;  // the maximum of -silu, and where it is reached

// Mean and sum of squared deviations of `count` numbers.
struct Moments {
  double count, mean, m2;
};

// The moments from the sums of x - shift and of its square. The shift must be near the mean, or cancellation costs
// accuracy.
FD_HD Moments shifted_moments(double count, double shift, double sum, double squares) {
  const double mean = sum / count, m2 = squares - sum * mean;
  return {count, shift + mean, m2 < 0 ? 0 : m2};  // NaN stays NaN
}

// The moments of the union of two sets of numbers (Chan, Golub & LeVeque 1983).
FD_HD Moments merge(const Moments& a, const Moments& b) {
  const double count = a.count + b.count;
  if (!(count > 0)) return {0, 0, 0};
  const double delta = b.mean - a.mean, fraction = b.count / count;
  return {count, a.mean + delta * fraction, a.m2 + b.m2 + delta * delta * a.count * fraction};
}

// z = (x - centre) * gain + offset. Gain and offset may carry a constant factor of z.
struct ChannelMap {
  float centre, gain, offset;
};

// z = xhat * slope + intercept for the normalised xhat. The exact centre is the mean of x, mean - add; its
// rounding error to float32 goes into the offset.
FD_HD ChannelMap channel_map(double mean, double add, float rstd, float slope, float intercept) {
  const double exact = mean - add;
  const float centre = static_cast<float>(exact), residue = static_cast<float>(exact - centre);
  const float gain = rstd * slope;
  return {centre, gain, intercept - residue * gain};
}

// dx = dz * of_dz + (x - centre) * of_x + constant.
struct GradientMap {
  float of_dz, of_x, constant;
};

// dz_mean and dz_xhat_mean: means over the group of slope * dz and of slope * dz * xhat, where xhat is the normalised x
// (the derivative of equation 2 of Wu & He 2018).
FD_HD GradientMap gradient_map(double exact_centre, float rstd, float slope, double dz_mean, double dz_xhat_mean) {
  const double residue = exact_centre - static_cast<float>(exact_centre), of_x = dz_xhat_mean * rstd * rstd;
  return {rstd * slope, static_cast<float>(-of_x), static_cast<float>(residue * of_x - dz_mean * rstd)};
}

// The sum of dx over a channel's positions, from the sums of slope * dz and of x, each less its mean over the channels
// of the group. A sum of rounded dx would not cancel: for a channel that is alone in its group, the exact sum is 0.
FD_HD float sum_of_dx(float rstd, double dz_sum, double x_sum, double dz_xhat_mean) {
  return static_cast<float>(rstd * (dz_sum - dz_xhat_mean * rstd * x_sum));
}

}  // namespace fused_diffusion
