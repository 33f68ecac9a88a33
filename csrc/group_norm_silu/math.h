// The numbers of group_norm_silu (kernels/group_norm_silu/__init__.py has the equation) that every processor
// computes in the same way: moments, the affine map of each channel, and the coefficients of the gradient.
#pragma once

#include "common/floats.h"

namespace fused_diffusion {

constexpr float kLowestSilu = 0.2784646f, kLowestSiluAt = -1.2784646f;  // -silu is nowhere above, and reaches it there

// Mean and sum of squared deviations of `count` numbers.
struct Moments {
  double count, mean, m2;
};

// From the sums of x - shift and of its square. The shift has to be near the mean, or digits are lost.
FD_HD Moments shifted_moments(double count, double shift, double sum, double squares) {
  const double mean = sum / count, m2 = squares - sum * mean;
  return {count, shift + mean, m2 < 0 ? 0 : m2};  // NaN stays NaN
}

// The moments of both together (Chan, Golub & LeVeque 1983).
FD_HD Moments merge(const Moments& a, const Moments& b) {
  const double count = a.count + b.count;
  if (!(count > 0)) return {0, 0, 0};
  const double delta = b.mean - a.mean, share = b.count / count;
  return {count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
}

// z = (x - centre) * gain + offset, where gain and offset may be multiples of what z needs.
struct ChannelMap {
  float centre, gain, offset;
};

// `slope` and `intercept` take the normalised x to z. What the float cannot hold of the centre, which is x's
// mean less `add`, goes to the offset.
FD_HD ChannelMap channel_map(double mean, double add, float rstd, float slope, float intercept) {
  const double exact = mean - add;
  const float centre = static_cast<float>(exact), left = static_cast<float>(exact - centre);
  const float gain = rstd * slope;
  return {centre, gain, intercept - left * gain};
}

// dx = dz * of_dz + (x - centre) * of_x + constant.
struct GradientMap {
  float of_dz, of_x, constant;
};

// dz_mean and dz_xhat_mean: means over the group of slope * dz and of slope * dz * xhat, where xhat is the
// normalised x (Wu & He 2018, equation 2, differentiated).
FD_HD GradientMap gradient_map(double exact_centre, float rstd, float slope, double dz_mean, double dz_xhat_mean) {
  const double left = exact_centre - static_cast<float>(exact_centre), of_x = dz_xhat_mean * rstd * rstd;
  return {rstd * slope, static_cast<float>(-of_x), static_cast<float>(left * of_x - dz_mean * rstd)};
}

// The sum of dx over a channel's positions, from those of slope * dz and of x, each less its mean over the channels of
// the group. Sums of what was rounded would not cancel as they must: of a channel alone in its group this is 0.
FD_HD float sum_of_dx(float rstd, double dz_sum, double x_sum, double dz_xhat_mean) {
  return static_cast<float>(rstd * (dz_sum - dz_xhat_mean * rstd * x_sum));
}

}  // namespace fused_diffusion
