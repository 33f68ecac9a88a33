// Averages of squares of pixels on one instruction set, for convolution/average_pool.cpp.

#include "simd/exp.h"
// gelu.h uses exp.h.
#include "simd/gelu.h"

#include "convolution/pixels_cpu.h"

template <Transform kTransform, class T>
FD_HD void average_row(const Convolution& g, int64_t window, int64_t row) {
  const int64_t image = row / g.out_height;
  const T* x = static_cast<const T*>(g.x) + (image * g.height + row % g.out_height * window) * g.width * g.x_pixel;
  T* out = static_cast<T*>(g.out) + row * g.out_width * g.out_pixel;
  for (int64_t channel = 0; channel < g.channels; channel += kLanes) {
    const InputReader reader(g, image, channel);
    const auto pixel = [&](int64_t y, int64_t column) FD_INLINE {
      return reader.template read<kTransform>(x + (y * g.width + column) * g.x_pixel + channel);
    };
    for (int64_t column = 0; column < g.out_width; ++column) {
      const int64_t left = column * window;
      Vec value = pixel(0, left);
      if (window == 2) {
        value = ((value + pixel(0, left + 1)) + (pixel(1, left) + pixel(1, left + 1))) * spread(0.25f);
      }
      T* to = out + column * g.out_pixel + channel;
      if (reader.lanes == kLanes) store(to, value);
      else store(to, value, reader.lanes);
    }
  }
}

// Rows of outputs, counted over all images.
template <class T>
void average_rows(const Convolution& g, int64_t window, int64_t begin, int64_t end) {
  const Transform transform = transform_of(g);
  for (int64_t row = begin; row < end; ++row) {
    if (transform == Transform::plain) average_row<Transform::plain, T>(g, window, row);
    else if (transform == Transform::normalised) average_row<Transform::normalised, T>(g, window, row);
    else average_row<Transform::activated, T>(g, window, row);
  }
}
