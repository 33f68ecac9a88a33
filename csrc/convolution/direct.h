// The direct convolution on one instruction set: products of pixels and weights, tap by tap. Included after
// convolution/pixels_cpu.h and simd/gemm.h.

template <Transform kTransform, class T, class Math>
void copy_rows(const Convolution& g, const DirectBlock& block, void* to, int64_t begin, int64_t end) {
  typedef typename Math::Element Element;
  const int64_t pixel = block.pixel / static_cast<int64_t>(sizeof(Element));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = block.image + item / block.in_rows;
    const int64_t row = block.row * g.stride - g.padding + item % block.in_rows;
    Element* next = static_cast<Element*>(to) + item * block.columns * pixel;
    if (row < 0 || row >= g.in_height()) {
      memset(next, 0, block.columns * block.pixel);
      continue;
    }
    const T* from = static_cast<const T*>(g.x) + (image * g.height + row / g.scale) * g.width * g.x_pixel;
    for (int64_t channel = 0; channel < g.channels; channel += kLanes) {
      const InputReader reader(g, image, channel);
      for (int64_t column = 0; column < block.columns; ++column) {
        const int64_t at = column - g.padding;
        const bool inside = at >= 0 && at < g.in_width();
        store(next + column * pixel + channel,
              inside ? reader.template read<kTransform>(from + at / g.scale * g.x_pixel + channel) : Vec{});
      }
    }
  }
}

// Items: rows of inputs of all images of the block.
template <class T, class Math>
void direct_input(const Convolution& g, const DirectBlock& block, void* to, int64_t begin, int64_t end) {
  switch (transform_of(g)) {
    case Transform::plain: return copy_rows<Transform::plain, T, Math>(g, block, to, begin, end);
    case Transform::normalised: return copy_rows<Transform::normalised, T, Math>(g, block, to, begin, end);
    case Transform::activated: return copy_rows<Transform::activated, T, Math>(g, block, to, begin, end);
  }
}

// Items: panels of weights and, for each panel, the block's pixels, kMaxRows at a time.
template <class T, class Math>
void direct_multiply(const Convolution& g, const DirectBlock& block, const void* from, int64_t begin, int64_t end) {
  const int64_t pixels = block.count(g), chunks = (pixels + kMaxRows - 1) / kMaxRows;
  const int64_t depth = (g.channels + Math::kPack - 1) / Math::kPack, taps = g.kernel * g.kernel;
  int64_t offsets[9], at[kMaxRows];
  const char* rows[kMaxRows];
  const bool gated = g.activation == Activation::geglu;
  GatedOutputs<T> gated_outputs;
  for (int64_t tap = 0; tap < taps; ++tap) {
    offsets[tap] = (tap / g.kernel * block.columns + tap % g.kernel) * block.pixel;
  }
  for (int64_t item = begin; item < end; ++item) {
    const int64_t panel = item / chunks, first = item % chunks * kMaxRows;
    const int64_t count = pixels - first < kMaxRows ? pixels - first : kMaxRows;
    int64_t column = first % g.out_width, row = first / g.out_width % block.rows;
    int64_t image = first / g.out_width / block.rows;
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = static_cast<const char*>(from) + image * block.image_step +
                (row * block.columns + column) * g.stride * block.pixel;
      at[i] = ((block.image + image) * g.out_height + block.row + row) * g.out_width + column;
      if (++column == g.out_width) {
        column = 0;
        if (++row == block.rows) row = 0, ++image;
      }
    }
    const int64_t end_channel = panel * kPanel + g.panel_width(panel);
    for (int64_t begin_channel = panel * kPanel; begin_channel < end_channel; begin_channel += g.panel) {
      const int64_t width = end_channel - begin_channel < g.panel ? end_channel - begin_channel : g.panel;
      multiply_panel<Math>(GatheredRows{rows, offsets, taps, depth}, 0, count, g.weight + begin_channel * taps * depth,
                           width, width, [&](int64_t row, int64_t column, Vec sum) FD_INLINE {
                             const int64_t channel = begin_channel + column, lanes = lanes_at(g, channel);
                             if (lanes <= 0) return;
                             const Vec product = sum + bias_at(g, channel, lanes);
                             if (__builtin_expect(gated, 0)) gated_outputs.add(g, at[row], channel, lanes, product);
                             else finish_pixel<T>(g, at[row], channel, lanes, product);
                           });
    }
  }
  gated_outputs.finish(g);
}
