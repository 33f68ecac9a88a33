// Convolutions by AMX: the left factors are pixels, the right ones weights. convolution.cpp includes this file after
// matrix_amx.h and convolution_cpu.h in the same namespace.

template <int kParts>
FD_HD void clear_pixels(char* to, int64_t part_step, int64_t count) {
  for (int part = 0; part < kParts; ++part) memset(to + part * part_step, 0, count * kRowBytes);
}

// Items: rows of the input pixels of all images, as [chunk][part][pixel][32 channels].
template <Input kInput, class T, int kParts>
void copy_pixels(const Convolution& g, const Pixels& block, char* to, int64_t begin, int64_t end) {
  const int64_t part_step = block.count * kRowBytes;
  const int64_t left = g.padding < block.columns ? g.padding : block.columns;
  const int64_t inside = g.in_width() < block.columns - left ? g.in_width() : block.columns - left;
  const int64_t extra = end == block.images * block.in_rows ? 1 : 0;  // the pixel on the right of the last one
  for (int64_t channel = 0; channel < g.channels; channel += kChunk, to += kParts * part_step) {
    const bool wide = channel + kLanes < g.channels;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = block.image + item / block.in_rows;
      const int64_t row = block.row * g.stride - g.padding + item % block.in_rows;
      char* next = to + item * block.columns * kRowBytes;
      if (row < 0 || row >= g.in_height()) {
        clear_pixels<kParts>(next, part_step, block.columns);
        continue;
      }
      const T* from = static_cast<const T*>(g.x) + (image * g.height + row / g.scale) * g.width * g.x_pixel + channel;
      const InputMap first(g, image, channel), second(g, image, wide ? channel + kLanes : channel);
      clear_pixels<kParts>(next, part_step, left);
      next += left * kRowBytes;
      for (int64_t column = 0; column < inside; ++column, next += kRowBytes) {
        const T* pixel = from + (g.scale == 2 ? column / 2 : column) * g.x_pixel;
        const Vec a = first.template read<kInput>(pixel);
        const Vec b = wide ? second.template read<kInput>(pixel + kLanes) : Vec{};
        store_parts<kParts>(next, part_step, a, b);
      }
      clear_pixels<kParts>(next, part_step, block.columns - left - inside);
    }
    clear_pixels<kParts>(to + block.images * block.in_rows * block.columns * kRowBytes, part_step, extra);
  }
}

template <class T, int kParts>
void amx_input(const Convolution& g, const Pixels& block, char* to, int64_t begin, int64_t end) {
  switch (input_of(g)) {
    case Input::plain: return copy_pixels<Input::plain, T, kParts>(g, block, to, begin, end);
    case Input::normalised: return copy_pixels<Input::normalised, T, kParts>(g, block, to, begin, end);
    case Input::activated: return copy_pixels<Input::activated, T, kParts>(g, block, to, begin, end);
  }
}

// Sums of 32 pixels and 32 outputs on their way to the output, pixel by pixel, so that this can be done while AMX is
// busy with the next ones.
template <class T>
struct Finisher {
  const float* sums;  // [pixel][32]
  int64_t left = 0;   // pixels
  int64_t at, column, columns, out_width, channel, lanes, more;
  Vec bias, bias_of_more;

  FD_HD Finisher() {}

  FD_HD Finisher(const Convolution& g, const Pixels& block, int64_t line, int64_t first, int64_t count,
                 int64_t channel_, const float* sums_)
      : sums(sums_), left(count), columns(block.columns), out_width(g.out_width), channel(channel_) {
    const int64_t image = block.image + (block.flat ? line : line / block.rows);
    const int64_t row = block.row + (block.flat ? first / columns : line % block.rows);
    column = block.flat ? first % columns : first;
    at = (image * g.out_height + row) * out_width + (column < out_width ? column : out_width);
    lanes = lanes_at(g, channel);
    more = channel + kLanes < g.out_channels ? lanes_at(g, channel + kLanes) : 0;
    bias = bias_at(g, channel, lanes);
    bias_of_more = more > 0 ? bias_at(g, channel + kLanes, more) : Vec{};
  }

  FD_HD void advance(const Convolution& g, int64_t count) {
    for (; count > 0 && left > 0; --count, --left, sums += 32) {
      if (column < out_width) {
        finish_pixel<T>(g, at, channel, lanes, load(sums) + bias);
        if (more > 0) finish_pixel<T>(g, at, channel + kLanes, more, load(sums + kLanes) + bias_of_more);
        ++at;
      }
      if (++column == columns) column = 0;
    }
  }
};

// Items: panels of 32 outputs, and 32 pixels of a line; the ones or the others come first.
template <class T, int kParts>
void amx_multiply(const Convolution& g, const Pixels& block, const char* from, int64_t begin, int64_t end) {
  load_shapes();
  alignas(64) float sums[2][32 * 32];
  Finisher<T> before;
  const int64_t taps = g.kernel * g.kernel, panels = (g.out_channels + kChunk - 1) / kChunk;
  int64_t offsets[9];
  for (int64_t tap = 0; tap < taps; ++tap) {
    offsets[tap] = (tap / g.kernel * block.columns + tap % g.kernel) * kRowBytes;
  }
  const int64_t line_blocks = (block.length + 31) / 32, blocks = block.lines * line_blocks;
  Factors f{};
  f.row_step = g.stride * kRowBytes, f.part_step = block.count * kRowBytes, f.chunk_step = kParts * f.part_step;
  f.chunks = (g.channels + kChunk - 1) / kChunk, f.taps = offsets, f.tap_count = taps;
  const int64_t tile_column = f.chunks * taps * kParts * kTileBytes;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t panel = block.panels_first ? item / blocks : item % panels;
    const int64_t part = block.panels_first ? item % blocks : item / panels;
    const int64_t line = part / line_blocks, first = part % line_blocks * 32;
    const int64_t count = block.length - first < 32 ? block.length - first : 32;
    f.left = from + (block.start(g, line) + first * g.stride) * kRowBytes;
    f.right = reinterpret_cast<const char*>(g.weight) + 2 * panel * tile_column;
    const bool fetching = block.panels_first && panel + 1 < panels;
    const int64_t lines = 2 * kParts * kTileBytes / 64;  // of the weights for one tap and chunk
    f.fetch = fetching ? (lines + blocks - 1) / blocks : 0;
    f.next = f.right + 2 * tile_column + part * f.fetch * f.chunks * taps * 64;
    const int64_t share = (before.left + f.chunks * taps - 1) / (f.chunks * taps);
    const auto meanwhile = [&]() FD_INLINE { before.advance(g, share); };
    float* here = sums[item % 2];
    sum_products<kParts>(count, g.out_channels - panel * kChunk, f, here, 128, meanwhile);
    before = Finisher<T>(g, block, line, first, count, panel * kChunk, here);
  }
  before.advance(g, before.left);
  _tile_release();
}
