// Reading and writing pixels in the convolutions of one instruction set: x is normalised and activated as it is read,
// and outputs get their bias, residual and factor. Included after simd/exp.h.

enum class Transform { plain, normalised, activated };  // applied to each number as it is read

FD_HD Transform transform_of(const Convolution& g) {
  return g.centre == nullptr ? Transform::plain : g.silu ? Transform::activated : Transform::normalised;
}

// Reads kLanes channels of a pixel, from `channel` on; channels beyond the image's are 0.
struct InputReader {
  Vec centre = {}, gain = {}, offset = {};
  int64_t lanes;

  FD_HD InputReader() {}

  FD_HD InputReader(const Convolution& g, int64_t image, int64_t channel) {
    const int64_t remaining = g.channels - channel, at = image * g.channels + channel;
    lanes = remaining < kLanes ? remaining : kLanes;
    if (g.centre != nullptr) {
      centre = load(g.centre + at, lanes);
      gain = load(g.gain + at, lanes);
      offset = load(g.offset + at, lanes);
    }
  }

  template <Transform kTransform, class T>
  FD_HD Vec read(const T* from) const {
    const Vec x = lanes == kLanes ? load(from) : load(from, lanes);
    if constexpr (kTransform == Transform::plain) return x;
    const Vec z = mul_add(x - centre, gain, offset);
    if constexpr (kTransform == Transform::normalised) return z;
    else return silu<T>(z);
  }
};

// Not inlined: the products have many places that finish a pixel.
template <class T>
__attribute__((noinline)) Vec activated(Activation activation, Vec x) {
  if (activation == Activation::silu) return silu<T>(x * spread(-kLog2E));
  if (activation == Activation::gelu_tanh) return gelu_tanh<T>(x);
  return gelu<T>(x);
}

// Writes `lanes` channels of out, from `channel` on, of the pixel with index `at` over all images.
template <class T>
FD_HD void store_pixel(const Convolution& g, int64_t at, int64_t channel, int64_t lanes, Vec value) {
  T* to = static_cast<T*>(g.out) + at * g.out_pixel + channel;
  if (g.residual != nullptr) {
    const T* residual = static_cast<const T*>(g.residual) + at * g.residual_pixel + channel;
    value += lanes == kLanes ? load(residual) : load(residual, lanes);
  }
  value *= spread(g.factor);
  if (lanes == kLanes) store(to, value);
  else store(to, value, lanes);
}

// The same after the activation, for channels of the product, given their sums and bias; not for GEGLU.
template <class T>
FD_HD void finish_pixel(const Convolution& g, int64_t at, int64_t channel, int64_t lanes, Vec value) {
  if (__builtin_expect(g.activation != Activation::none, 0)) value = activated<T>(g.activation, value);
  store_pixel<T>(g, at, channel, lanes, value);
}

// How many of kLanes output channels, from `channel` on, exist.
FD_HD int64_t lanes_at(const Convolution& g, int64_t channel) {
  const int64_t remaining = g.out_channels - channel;
  return remaining < kLanes ? remaining : kLanes;
}

FD_HD Vec bias_at(const Convolution& g, int64_t channel, int64_t lanes) {
  return g.bias == nullptr ? Vec{} : load(g.bias + channel, lanes);
}
