// The left factors of convolutions by AMX: copies of the pixels of x, in one of the formats of
// convolution/amx_formats.h.

// Writes `count` pixels of zeros.
template <class Format>
FD_HD void clear_pixels(char* to, int64_t piece_step, int64_t count, int32_t zero) {
  memset(to, -zero, count * kRowBytes);
  for (int piece = 1; piece < Format::kPieces; ++piece) memset(to + piece * piece_step, 0, count * kRowBytes);
}

// Returns where the pixels of a row of inputs are read, and sets `next` to where they are written. Returns null for a
// row of padding, after clearing it.
template <class T, class Format>
FD_HD const T* begin_row(const Convolution& g, const AmxBlock& block, int64_t item, char* to, char** next) {
  const int64_t piece_step = block.piece, image = block.image + item / block.in_rows;
  const int64_t row = block.row * g.stride - g.padding + item % block.in_rows;
  const int32_t zero = Format::zero(g, image);
  *next = to + block.input(item) * kRowBytes;
  if (item % block.in_rows == block.in_rows - 1) {  // the one pixel behind the image
    clear_pixels<Format>(*next + block.columns * kRowBytes, piece_step, 1, zero);
  }
  if (row < 0 || row >= g.in_height()) {
    clear_pixels<Format>(*next, piece_step, block.columns, zero);
    return nullptr;
  }
  return static_cast<const T*>(g.x) + (image * g.height + row / g.scale) * g.width * g.x_pixel;
}

// Items: rows of inputs of all images. to: [chunk][piece][pixel][64 bytes].
template <Transform kTransform, class T, class Format>
void copy_pixels(const Convolution& g, const AmxBlock& block, char* to, int64_t begin, int64_t end) {
  constexpr int kVectors = Format::kChunk / kLanes;
  const int64_t piece_step = block.piece;
  const int64_t before = g.padding < block.columns ? g.padding : block.columns;  // pixels of padding
  const int64_t inside = g.in_width() < block.columns - before ? g.in_width() : block.columns - before;
  for (int64_t channel = 0; channel < g.channels; channel += Format::kChunk, to += Format::kPieces * piece_step) {
    const bool whole = channel + Format::kChunk <= g.channels;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = block.image + item / block.in_rows;
      char* next;
      const T* from = begin_row<T, Format>(g, block, item, to, &next);
      if (from == nullptr) continue;
      const int32_t zero = Format::zero(g, image);
      InputReader readers[kVectors];
      for (int i = 0; i < kVectors; ++i) {
        if (channel + i * kLanes < g.channels) readers[i] = InputReader(g, image, channel + i * kLanes);
      }
      Vec factors[kVectors];
      for (int i = 0; i < kVectors; ++i) factors[i] = Format::factor(g, image, channel + i * kLanes);
      clear_pixels<Format>(next, piece_step, before, zero);
      next += before * kRowBytes;
      for (int64_t column = 0; column < inside; ++column, next += kRowBytes) {
        const T* pixel = from + (g.scale == 2 ? column / 2 : column) * g.x_pixel + channel;
        Vec numbers[kVectors];
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) {
          const bool some = whole || channel + i * kLanes < g.channels;
          numbers[i] = some ? readers[i].template read<kTransform>(pixel + i * kLanes) : Vec{};
        }
        Format::write(next, piece_step, numbers, factors, zero);
      }
      clear_pixels<Format>(next, piece_step, block.columns - before - inside, zero);
    }
  }
}

// The same for few channels: each row of 64 bytes holds a pixel and its next kMerged - 1 neighbours, zeros beyond the
// end of the image's row.
template <Transform kTransform, class T, class Format, int kMerged>
void merge_pixels(const Convolution& g, const AmxBlock& block, char* to, int64_t begin, int64_t end) {
  constexpr int kVectors = Format::kChunk / kLanes, kPixelVectors = kVectors / kMerged;
  const int64_t piece_step = block.piece;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = block.image + item / block.in_rows;
    char* next;
    const T* from = begin_row<T, Format>(g, block, item, to, &next);
    if (from == nullptr) continue;
    const int32_t zero = Format::zero(g, image);
    InputReader readers[kPixelVectors];
    for (int i = 0; i < kPixelVectors; ++i) {
      if (i * kLanes < g.channels) readers[i] = InputReader(g, image, i * kLanes);
    }
    Vec numbers[kVectors] = {}, factors[kVectors];
    for (int i = 0; i < kVectors; ++i) factors[i] = Format::factor(g, image, i % kPixelVectors * kLanes);
    for (int64_t column = 1 - kMerged; column < block.columns; ++column) {
#pragma GCC unroll 4
      for (int i = 0; i < kPixelVectors * (kMerged - 1); ++i) numbers[i] = numbers[i + kPixelVectors];
      const int64_t last = column + kMerged - 1, x = last - g.padding;
      const bool inside = last < block.columns && x >= 0 && x < g.in_width();
      const T* pixel = from + (g.scale == 2 ? x / 2 : x) * g.x_pixel;
#pragma GCC unroll 4
      for (int i = 0; i < kPixelVectors; ++i) {
        const bool some = inside && i * kLanes < g.channels;
        numbers[(kMerged - 1) * kPixelVectors + i] =
            some ? readers[i].template read<kTransform>(pixel + i * kLanes) : Vec{};
      }
      if (column < 0) continue;
      Format::write(next, piece_step, numbers, factors, zero);
      next += kRowBytes;
    }
  }
}

template <class T, class Format>
void amx_input(const Convolution& g, const AmxBlock& block, char* to, int64_t begin, int64_t end) {
  const auto run = [&](auto transform) FD_INLINE {
    constexpr Transform kTransform = decltype(transform)::value;
    if constexpr (Format::kMerges) {
      if (block.merged == 3) return merge_pixels<kTransform, T, Format, 3>(g, block, to, begin, end);
      if (block.merged == 2) return merge_pixels<kTransform, T, Format, 2>(g, block, to, begin, end);
    }
    return copy_pixels<kTransform, T, Format>(g, block, to, begin, end);
  };
  switch (transform_of(g)) {
    case Transform::plain: return run(std::integral_constant<Transform, Transform::plain>{});
    case Transform::normalised: return run(std::integral_constant<Transform, Transform::normalised>{});
    case Transform::activated: return run(std::integral_constant<Transform, Transform::activated>{});
  }
}
