// Convolutions by AMX: the left factors are pixels, the right factors weights. Included after convolution/pixels_cpu.h
// and amx/tile_gemm.h.

#include "convolution/amx_formats.h"
// amx_inputs.h uses the formats.
#include "convolution/amx_inputs.h"

// Writes the sums of 32 pixels to the output, pixel by pixel, so that this can be done while AMX is busy with the next
// sums.
template <class T, class Format>
struct OutputWriter {
  const float* sums;      // [pixel][outputs]
  int64_t remaining = 0;  // pixels
  int64_t at, column, columns, out_width, channel, lanes, more;
  bool gated;        // whether the second vector of outputs has the gates of the first
  bool alternating;  // whether values and gates take turns
  Vec bias, bias_of_more, scales;

  FD_HD OutputWriter() {}

  FD_HD OutputWriter(const Convolution& g, const AmxBlock& block, int64_t run, int64_t first, int64_t count,
                     int64_t channel_, const char* header, const float* sums_)
      : sums(sums_), remaining(count), columns(block.columns), out_width(g.out_width), channel(channel_) {
    const int64_t image = block.image + (block.flat ? run : run / block.rows);
    const int64_t row = block.row + (block.flat ? first / columns : run % block.rows);
    column = block.flat ? first % columns : first;
    at = (image * g.out_height + row) * out_width + (column < out_width ? column : out_width);
    lanes = lanes_at(g, channel);
    more = Format::kOutputs > kLanes && channel + kLanes < g.out_channels ? lanes_at(g, channel + kLanes) : 0;
    gated = more > 0 && g.activation == Activation::geglu;
    alternating = !gated && g.activation == Activation::geglu;
    if (gated) lanes = g.results - channel / 2 < kLanes ? g.results - channel / 2 : kLanes;
    bias = bias_at(g, channel, gated ? kLanes : lanes);
    bias_of_more = more > 0 ? bias_at(g, channel + kLanes, more) : Vec{};
    scales = Format::scales(g, header, image);
  }

  FD_HD void advance(const Convolution& g, int64_t count, GatedOutputs<T>& gated_outputs) {
    for (; count > 0 && remaining > 0; --count, --remaining, sums += Format::kOutputs) {
      if (column < out_width && gated) {
        const Vec gate = activated<T>(Activation::gelu, Format::sum(sums, 1, scales) + bias_of_more);
        store_pixel<T>(g, at++, channel / 2, lanes, (Format::sum(sums, 0, scales) + bias) * gate);
      } else if (column < out_width && alternating) {
        gated_outputs.add(g, at++, channel, lanes, Format::sum(sums, 0, scales) + bias);
      } else if (column < out_width) {
        finish_pixel<T>(g, at, channel, lanes, Format::sum(sums, 0, scales) + bias);
        if (more > 0) finish_pixel<T>(g, at, channel + kLanes, more, Format::sum(sums, 1, scales) + bias_of_more);
        ++at;
      }
      if (++column == columns) column = 0;
    }
  }
};

// Items: pairs of a panel of outputs and 32 pixels of a run, ordered by block.panels_first.
template <class T, class Format>
void amx_multiply(const Convolution& g, const AmxBlock& block, const char* from, int64_t begin, int64_t end) {
  load_shapes();
  alignas(64) float sums[2][Format::kSums * 32 * Format::kOutputs];
  OutputWriter<T, Format> before;
  GatedOutputs<T> gated_outputs;
  const int64_t panels = (g.out_channels + Format::kOutputs - 1) / Format::kOutputs;
  const int64_t wide = (g.kernel + block.merged - 1) / block.merged, taps = g.kernel * wide;
  int64_t offsets[9];
  for (int64_t tap = 0; tap < taps; ++tap) {
    offsets[tap] = (tap / wide * block.columns + tap % wide * block.merged) * block.pixel;
  }
  const int64_t run_blocks = (block.length + 31) / 32, blocks = block.runs * run_blocks;
  Factors f{};
  f.piece_step = block.piece;
  f.chunks = (g.channels + Format::kChunk - 1) / Format::kChunk, f.taps = offsets, f.tap_count = taps;
  const int64_t group_bytes = Format::kOutputs / 16 * Format::kPieces * kTileBytes;  // of weights, for a tap and chunk
  const int64_t panel_bytes = Format::kHeaderBytes + f.chunks * taps * group_bytes;
  char* tail = nullptr;  // the last pixels, where they do not fill a tile
  for (int64_t item = begin; item < end; ++item) {
    const int64_t panel = block.panels_first ? item / blocks : item % panels;
    const int64_t pixels_32 = block.panels_first ? item % blocks : item / panels;
    const int64_t run = pixels_32 / run_blocks, first = pixels_32 % run_blocks * 32;
    const int64_t count = block.length - first < 32 ? block.length - first : 32;
    const char* header = reinterpret_cast<const char*>(g.weight) + panel * panel_bytes;
    f.left = from + (block.start(g, run) + first * g.stride) * block.pixel;
    f.row_step = g.stride * block.pixel, f.chunk_step = block.chunk;
    if (block.in_place && count % 16 != 0) {  // a tile would be read beyond the end of x
      const int64_t bytes = f.chunks * kRowBytes;
      if (tail == nullptr) {
        tail = reinterpret_cast<char*>(buffer(32 * bytes / 4, 2));
        for (int64_t i = 0; i < count; ++i) memcpy(tail + i * bytes, f.left + i * block.pixel, bytes);
        memset(tail + count * bytes, 0, (32 - count) * bytes);
      }
      f.left = tail, f.row_step = bytes, f.chunk_step = kRowBytes;
    }
    f.right = header + Format::kHeaderBytes;
    const bool fetching = block.panels_first && panel + 1 < panels;
    f.fetch = fetching ? (group_bytes / 64 + blocks - 1) / blocks : 0;
    f.next = header + panel_bytes + pixels_32 * f.fetch * f.chunks * taps * 64;
    const int64_t pixels = (before.remaining + f.chunks * taps - 1) / (f.chunks * taps);
    const auto overlapped = [&]() FD_INLINE { before.advance(g, pixels, gated_outputs); };
    float* here = sums[item % 2];
    const int64_t channel = panel * Format::kOutputs;
    const int32_t zero = Format::zero(g, block.image + (block.flat ? run : run / block.rows));
    Format::multiply(count, g.out_channels - channel, f, header, zero, here, overlapped);
    before = OutputWriter<T, Format>(g, block, run, first, count, channel, header, here);
  }
  before.advance(g, before.remaining, gated_outputs);
  gated_outputs.finish(g);
  _tile_release();
}

template <class T, class Format>
AmxConvolutionKernels kernels_of() {
  AmxConvolutionKernels set{amx_input<T, Format>,
                            amx_multiply<T, Format>,
                            nullptr,
                            nullptr,
                            nullptr,
                            nullptr,
                            Format::kPieces,
                            Format::kChunk,
                            Format::kOutputs,
                            Format::kHeaderBytes,
                            Format::kMerges};
  if (Format::kHeaderBytes > 0) {
    set.largest = amx_largest<T>;
    set.largest_bound = amx_largest_bound;
    set.scale = amx_scale;
    set.poison_non_finite = amx_poison_non_finite<T>;
  }
  return set;
}
