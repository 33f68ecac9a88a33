// GEGLU of a convolution's outputs on one instruction set. Included after simd/lanes.h and convolution/pixels_cpu.h.

// Takes vectors of the product, in which values and their gates take turns, and writes the results of two vectors at a
// time, so that GELU gets vectors full of gates. Not inlined: the products have many places that finish a pixel.
template <class T>
struct GatedOutputs {
  Vec waiting = {};
  int64_t at, channel, lanes = 0;  // where the results of `waiting` belong; no lanes: none is waiting

  // A vector of `lanes_` channels of the product, from `channel_` on, of the pixel with index `at_`.
  __attribute__((noinline)) void add(const Convolution& g, int64_t at_, int64_t channel_, int64_t lanes_, Vec product) {
    if (lanes == 0) {
      waiting = product, at = at_, channel = channel_ / 2, lanes = lanes_ / 2;
      return;
    }
    const Vec results = even_lanes(waiting, product) * gelu<T>(odd_lanes(waiting, product));
    if (at_ == at && channel_ == 2 * channel + kLanes && lanes_ == kLanes) {
      store_pixel<T>(g, at, channel, kLanes, results);
    } else {
      store_pixel<T>(g, at, channel, lanes, results);
      store_pixel<T>(g, at_, channel_ / 2, lanes_ / 2, upper_then_lower(results, results));
    }
    lanes = 0;
  }

  // Writes what is waiting for a second vector.
  __attribute__((noinline)) void finish(const Convolution& g) {
    if (lanes == 0) return;
    store_pixel<T>(g, at, channel, lanes, even_lanes(waiting, Vec{}) * gelu<T>(odd_lanes(waiting, Vec{})));
    lanes = 0;
  }
};
