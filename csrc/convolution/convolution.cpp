// fused_diffusion::convolution_ on the CPU: blocks of the output, each made by the threads together, in passes over
// buffers that stay in the cache.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <type_traits>

#include "common/channels_last.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "convolution/args.h"
#include "group_norm_silu/math.h"
#include "runtime/recorded_calls.h"
#include "simd/dispatch.h"

namespace fused_diffusion {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlockFloats = 1 << 20;        // of a direct block's inputs, or of both buffers of a Winograd block
constexpr int64_t kMaxBlockFloats = 1 << 22;     // of the latter, where the weights are as many
constexpr int64_t kThreadFloats = 1 << 17;       // of the same, for a block of one thread, in its second cache
constexpr int64_t kThreadWeights = 1 << 19;      // of weights that each thread reads for itself
constexpr int64_t kAmxBytesPerThread = 1 << 20;  // of inputs: half of a core's second cache
constexpr int64_t kAmxWeightBytes = 5 << 18;     // of weights that stay in that cache beside the inputs
constexpr int64_t kPixelRow = 64;                // of a 1x1 convolution, at most
constexpr int64_t kWorkPerThread = 1 << 14;      // vector operations, some five microseconds

// The kernels of one instruction set for one element type of the images and one of the weights.
struct ConvolutionKernels {
  void (*winograd_input)(const Convolution&, const WinogradBlock&, float* v, float* plane, int64_t begin, int64_t end);
  void (*winograd_multiply)(const Convolution&, const WinogradBlock&, const float* v, float* m, int64_t begin,
                            int64_t end);
  void (*winograd_output)(const Convolution&, const WinogradBlock&, const float* m, int64_t begin, int64_t end);
  void (*direct_input)(const Convolution&, const DirectBlock&, void* to, int64_t begin, int64_t end);
  void (*direct_multiply)(const Convolution&, const DirectBlock&, const void* from, int64_t begin, int64_t end);
};

// The kernels for AMX, for one element type of the images and one format of what is multiplied.
struct AmxConvolutionKernels {
  void (*input)(const Convolution&, const AmxBlock&, char* to, int64_t begin, int64_t end);
  void (*multiply)(const Convolution&, const AmxBlock&, const char* from, int64_t begin, int64_t end);
  void (*largest)(const Convolution&, uint32_t* to, int64_t begin,
                  int64_t end);  // null for bfloat16, as are those below
  uint32_t (*largest_bound)(const Convolution&, int64_t image);
  ImageScale (*scale)(const Convolution&, const uint32_t* rows);
  void (*poison_non_finite)(const Convolution&, int64_t image, const uint32_t* rows);
  int64_t pieces, chunk, outputs, header_bytes;  // of the format
  bool merges;

  int64_t merged(const Convolution& g) const { return merges ? merged_pixels(g, chunk / 16) : 1; }
  int64_t taps(const Convolution& g) const { return g.kernel * divide_up(g.kernel, merged(g)); }

  int64_t scale_count(const Convolution& g) const { return largest == nullptr ? 0 : round_up(g.channels, chunk); }

  int64_t weight_bytes(const Convolution& g) const {
    const int64_t panels = divide_up(g.out_channels, 16), chunks = divide_up(g.channels, chunk);
    return 4 * scale_count(g) + panels * (header_bytes + chunks * taps(g) * pieces * 1024);
  }
};

#define FD_PER_ISA "convolution/convolution_cpu.h"
#define FD_ISAS (FD_ISAS_FLOAT32 | FD_ISA_AVX512_BF16 | FD_ISA_AMX)
#include "simd/foreach_isa.inc"

// pairs: whether the weights are packed as pairs of bfloat16.
template <class T>
ConvolutionKernels kernels(bool pairs) {
  const Simd isa = simd_in_use();
  STD_TORCH_CHECK(!pairs || includes(isa, Simd::avx512_bf16),
                  "the weights are packed for a processor with AVX512_BF16");
#if defined(__x86_64__)
  if (pairs) return avx512_bf16::kernels_of<T, avx512_bf16::Bfloat16Pairs>();
#endif
  return FD_DISPATCH(isa, kernels_of<T>());
}

ConvolutionKernels kernels(ScalarType type, bool pairs) {
  if (type == ScalarType::Float) return kernels<float>(pairs);
  return type == ScalarType::BFloat16 ? kernels<BFloat16>(pairs) : kernels<Half>(pairs);
}

// limbs: 1 for bfloat16, 3 for int8.
template <class T>
AmxConvolutionKernels amx_kernels(int64_t limbs) {
#if FD_AMX
  return limbs == 1 ? amx::kernels_of<T, amx::Bfloat16Format>() : amx::kernels_of<T, amx::Int8Format>();
#else
  return {};
#endif
}

AmxConvolutionKernels amx_kernels(ScalarType type, int64_t limbs) {
  STD_TORCH_CHECK(includes(simd_in_use(), Simd::amx), "the weights are packed for a processor with AMX");
  if (type == ScalarType::Float) return amx_kernels<float>(limbs);
  return type == ScalarType::BFloat16 ? amx_kernels<BFloat16>(limbs) : amx_kernels<Half>(limbs);
}

// The passes over a block: each is made by all threads together or, with `alone`, whole by the calling one.
void winograd_block(const Convolution& g, const ConvolutionKernels& set, const WinogradBlock& block, int64_t pack,
                    bool alone) {
  const auto pass = [&](int64_t items, int64_t work, const auto& run) {
    if (alone) run(0, items);
    else divide_work(items, work, kWorkPerThread, run);
  };
  float* v = buffer(block.frequencies() * block.input_step, 0);
  float* m = buffer(block.frequencies() * block.output_step, 1);
  const int64_t images = (block.first + block.strips - 1) / block.high - block.first / block.high + 1;
  const int64_t lines = round_up(g.channels, kPackedLanes) / kPackedLanes;
  const int64_t plane = block.plane_rows() * (block.wide * block.size + 2) * kPackedLanes;
  pass(images * lines, block.count() / images * 200,
       [&](int64_t begin, int64_t end) { set.winograd_input(g, block, v, buffer(plane, 2), begin, end); });
  pass(block.frequencies() * g.panels(), block.count() * g.channels * kPanel / (16 * pack),
       [&](int64_t begin, int64_t end) { set.winograd_multiply(g, block, v, m, begin, end); });
  pass(block.count(), g.out_channels / 16 * 250,
       [&](int64_t begin, int64_t end) { set.winograd_output(g, block, m, begin, end); });
}

void winograd(const Convolution& g, const ConvolutionKernels& set, int64_t size, int64_t pack) {
  const WinogradBlock strip(g, size, pack, 1);
  const int64_t strips = g.images * strip.high;
  const int64_t strip_floats = strip.frequencies() * strip.wide * (strip.inputs + strip.outputs);
  const int64_t weights = strip.frequencies() * divide_up(g.channels, pack) * strip.outputs;
  const auto blocks_of = [&](int64_t floats) { return divide_up(strips, std::max<int64_t>(1, floats / strip_floats)); };
  const auto run_block = [&](int64_t first, int64_t count, bool alone) {
    WinogradBlock block(g, size, pack, std::min(count, strips - first));
    block.first = first;
    winograd_block(g, set, block, pack, alone);
  };
  // With small weights each thread makes blocks of its own, which stay in its second cache, and waits for the others
  // once.
  const int64_t strip_work = strip.wide * weights / 16, busy = strips * strip_work / kWorkPerThread;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), std::max<int64_t>(1, busy));
  const int64_t own_blocks = round_up(blocks_of(kThreadFloats), threads);
  if (weights <= kThreadWeights && strips >= own_blocks) {
    const int64_t count = divide_up(strips, own_blocks);
    divide_work(divide_up(strips, count), count * strip_work, kWorkPerThread, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) run_block(i * count, count, true);
    });
    return;
  }
  // The weights are read once for each block. Where they fill more than the cache beside it, that takes as long as the
  // products, so the blocks are as large as the weights.
  const int64_t count = divide_up(strips, blocks_of(std::min(std::max(kBlockFloats, weights), kMaxBlockFloats)));
  for (int64_t first = 0; first < strips; first += count) run_block(first, count, false);
}

void direct(const Convolution& g, const ConvolutionKernels& set, int64_t pack, ScalarType type) {
  DirectBlock block{};
  const int64_t element = type == ScalarType::Float ? 4 : 2, weight_element = pack == 2 ? 2 : 4;
  const bool same_type = type == (pack == 2 ? ScalarType::BFloat16 : ScalarType::Float);
  const bool in_place = g.kernel == 1 && g.stride == 1 && g.scale == 1 && g.padding == 0 && g.centre == nullptr &&
                        g.out_height == g.height && g.out_width == g.width && same_type && g.channels % pack == 0;
  block.columns = (g.out_width - 1) * g.stride + g.kernel;
  const int64_t copied = round_up(g.channels, 16) * weight_element;  // bytes of a pixel
  block.pixel = in_place ? g.x_pixel * element : copied;
  const int64_t row_floats = block.columns * copied / 4;
  const int64_t image_rows = (g.out_height - 1) * g.stride + g.kernel;
  const int64_t whole = kBlockFloats / (image_rows * row_floats);
  const int64_t rows = std::max<int64_t>(1, (kBlockFloats / row_floats - g.kernel) / g.stride);
  block.images = std::max<int64_t>(1, whole);
  const int64_t step = whole > 0 ? g.out_height : std::min(g.out_height, rows);
  const int64_t taps = g.kernel * g.kernel;
  for (block.image = 0; block.image < g.images; block.image += block.images) {
    block.images = std::min(block.images, g.images - block.image);
    for (block.row = 0; block.row < g.out_height; block.row += step) {
      block.rows = std::min(step, g.out_height - block.row);
      block.in_rows = (block.rows - 1) * g.stride + g.kernel;
      block.image_step = block.in_rows * block.columns * block.pixel;
      const void* from;
      if (in_place) {  // x is then one image, by reshape_pixels
        from = static_cast<const char*>(g.x) + block.row * g.width * block.pixel;
      } else {
        float* to = buffer(block.images * block.image_step / 4, 0);
        divide_work(block.images * block.in_rows, block.columns * g.channels, kWorkPerThread,
                    [&](int64_t begin, int64_t end) { set.direct_input(g, block, to, begin, end); });
        from = to;
      }
      const int64_t items = g.panels() * divide_up(block.count(g), kMaxRows);
      divide_work(items, kMaxRows * taps * g.channels * kPanel / (16 * pack), kWorkPerThread,
                  [&](int64_t begin, int64_t end) { set.direct_multiply(g, block, from, begin, end); });
    }
  }
}

// A 1x1 convolution of stride 1 does not see where pixels lie, so they are laid out anew, in rows of a convenient
// length. Images become one image where nothing distinguishes them.
void reshape_pixels(Convolution& g, bool per_image) {
  if (g.kernel != 1 || g.stride != 1 || g.scale != 1 || g.padding != 0 || g.out_height != g.height ||
      g.out_width != g.width) {
    return;
  }
  int64_t pixels = g.height * g.width;
  if (!per_image) pixels *= g.images, g.images = 1;
  int64_t width = std::min(pixels, kPixelRow);
  while (pixels % width != 0) --width;
  g.height = g.out_height = pixels / width;
  g.width = g.out_width = width;
}

// Finds the scales of the block's images, from bounds of their channels or by reading them. `rows` is scratch, a number
// for each row of the images.
void find_scales(const Convolution& g, const AmxBlock& block, const AmxConvolutionKernels& set, ImageScale* scales,
                 uint32_t* rows) {
  const int64_t first = block.image * g.height, end = first + block.images * g.height;
  if (g.bounds != nullptr) {
    for (int64_t i = block.image; i < block.image + block.images; ++i) {
      std::fill_n(rows + i * g.height, g.height, set.largest_bound(g, i));
    }
  } else {
    divide_work(end - first, g.width * g.channels / 4, kWorkPerThread,
                [&](int64_t begin, int64_t stop) { set.largest(g, rows, first + begin, first + stop); });
  }
  for (int64_t i = block.image; i < block.image + block.images; ++i) {
    scales[i] = set.scale(g, rows + i * g.height);
  }
}

void convolve_by_amx(Convolution g, const AmxConvolutionKernels& set, ScalarType type) {
  const bool scaled = set.largest != nullptr;
  uint32_t* largest = scaled ? reinterpret_cast<uint32_t*>(buffer(g.images * (g.height + 3), 1)) : nullptr;
  ImageScale* scales = reinterpret_cast<ImageScale*>(scaled ? largest + g.images * g.height : nullptr);
  g.scales = scales;
  AmxBlock block{};
  // A row's padding on the right is then the next row's on the left.
  const bool shared_padding = g.kernel == 3 && g.stride == 1 && g.padding == 1 && g.out_width == g.in_width();
  block.columns = (g.out_width - 1) * g.stride + g.kernel - shared_padding;
  block.flat = g.stride == 1;
  block.merged = set.merged(g);
  const int64_t chunks = divide_up(g.channels, set.chunk), taps = set.taps(g);
  const int64_t pixel_bytes = chunks * set.pieces * 64;
  // x is then one image, by reshape_pixels.
  block.in_place = g.kernel == 1 && g.stride == 1 && g.scale == 1 && g.padding == 0 && g.images == 1 &&
                   g.out_height == g.height && g.out_width == g.width && g.centre == nullptr && !scaled &&
                   type == ScalarType::BFloat16 && g.channels % set.chunk == 0;
  const int64_t budget = kAmxBytesPerThread * torch::stable::get_num_threads();
  const int64_t image_rows = (g.out_height - 1) * g.stride + g.kernel;
  const int64_t whole = budget / (image_rows * block.columns * pixel_bytes);
  const int64_t rows = std::max<int64_t>(1, (budget / (block.columns * pixel_bytes) - g.kernel) / g.stride + 1);
  const int64_t max_images = std::min(g.images, std::max<int64_t>(1, whole));
  const int64_t max_rows = whole > 0 ? g.out_height : std::min(g.out_height, rows);
  const int64_t panels = divide_up(g.out_channels, set.outputs);
  for (block.image = 0; block.image < g.images; block.image += max_images) {
    block.images = std::min(max_images, g.images - block.image);
    if (scaled) find_scales(g, block, set, scales, largest);
    for (block.row = 0; block.row < g.out_height; block.row += max_rows) {
      block.rows = std::min(max_rows, g.out_height - block.row);
      block.in_rows = (block.rows - 1) * g.stride + g.kernel;
      const int64_t inputs = block.input(block.images * block.in_rows);
      block.count = inputs + 32 * g.stride;
      block.runs = block.flat ? block.images : block.images * block.rows;
      block.length = block.flat ? (block.rows - 1) * block.columns + g.out_width : g.out_width;
      // Each thread reads either all weights, or all inputs, half of which another thread wrote.
      const int64_t weight_bytes = set.weight_bytes(g);
      block.panels_first = weight_bytes > kAmxWeightBytes || weight_bytes > 2 * inputs * pixel_bytes;
      block.pixel = block.in_place ? 2 * g.x_pixel : 64;
      block.piece = block.count * 64;
      block.chunk = block.in_place ? 64 : set.pieces * block.piece;
      const char* pixels = static_cast<const char*>(g.x) + block.row * g.width * block.pixel;
      if (!block.in_place) {
        char* to = reinterpret_cast<char*>(buffer(block.count * pixel_bytes / 4, 0));
        divide_work(block.images * block.in_rows, block.columns * chunks * 4, kWorkPerThread,
                    [&](int64_t begin, int64_t end) { set.input(g, block, to, begin, end); });
        pixels = to;
      }
      divide_work(block.runs * divide_up(block.length, 32) * panels, chunks * taps * set.pieces * set.outputs,
                  kWorkPerThread, [&](int64_t begin, int64_t end) { set.multiply(g, block, pixels, begin, end); });
    }
    for (int64_t i = block.image; scaled && i < block.image + block.images; ++i) {
      set.poison_non_finite(g, i, largest + i * g.height);
    }
  }
}

void convolution_(const Tensor& x, const Tensor& weight, int64_t kernel, int64_t stride, int64_t padding, int64_t scale,
                  int64_t winograd_m, int64_t amx_limbs, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& affine, bool silu, const std::optional<Tensor>& residual, Tensor out,
                  int64_t activation, double factor, int64_t panel) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(x.dim() == 4 && out.dim() == 4 && out.scalar_type() == type && x.size(0) == out.size(0),
                  "x and out must be [N, C, H, W] of one dtype");
  STD_TORCH_CHECK(x.size(1) >= 1, "x must have a channel");
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "x must be float32, bfloat16 or float16");
  Convolution g{};
  g.x = x.const_data_ptr();
  g.out = out.mutable_data_ptr();
  g.images = x.size(0), g.channels = x.size(1), g.height = x.size(2), g.width = x.size(3);
  STD_TORCH_CHECK(activation >= 0 && activation < kActivations, "there is no activation ", activation);
  g.activation = static_cast<Activation>(activation);
  g.factor = static_cast<float>(factor);
  g.results = out.size(1);
  const bool gated = g.activation == Activation::geglu;
  STD_TORCH_CHECK(!gated || winograd_m == 0, "with GEGLU, winograd_m must be 0");
  // AMX's bfloat16 has 16 values beside their 16 gates; elsewhere values and gates take turns.
  g.out_channels = !gated ? g.results : 2 * (amx_limbs == 1 ? round_up(g.results, kPackedLanes) : g.results);
  g.out_height = out.size(2), g.out_width = out.size(3);
  STD_TORCH_CHECK(panel == kPackedLanes || panel == kPanel, "a panel must be 16 or 64 channels wide");
  g.panel = panel;
  g.kernel = kernel, g.stride = stride, g.padding = padding, g.scale = scale, g.silu = silu;
  STD_TORCH_CHECK((kernel == 1 || kernel == 3) && stride >= 1 && (scale == 1 || scale == 2) && padding >= 0,
                  "the kernel must be 1 or 3 wide, the scale 1 or 2");
  STD_TORCH_CHECK(
      winograd_m == 0 || ((winograd_m == 2 || winograd_m == 4) && kernel == 3 && stride == 1 && padding == 1 &&
                          g.out_height == g.in_height() && g.out_width == g.in_width()),
      "Winograd's convolution needs a 3 x 3 kernel, stride 1, padding 1 and an output as large as its input");
  STD_TORCH_CHECK(amx_limbs == 0 || ((amx_limbs == 1 || amx_limbs == 3) && winograd_m == 0),
                  "amx_limbs must be 0, 1 or 3, and winograd_m must be 0 if amx_limbs is not");
  const ScalarType weight_type = weight.scalar_type();
  const bool pairs = weight_type == ScalarType::BFloat16;
  const int64_t matrices = winograd_m == 0 ? kernel * kernel : (winograd_m + 2) * (winograd_m + 2);
  AmxConvolutionKernels amx_set{};
  bool packed = weight.is_contiguous();
  if (amx_limbs > 0) {
    amx_set = amx_kernels(type, amx_limbs);
    packed &= weight_type == (amx_limbs == 1 ? ScalarType::BFloat16 : ScalarType::Char) &&
              weight.numel() * weight.element_size() == amx_set.weight_bytes(g);
    STD_TORCH_CHECK(amx_limbs == 1 || matrices * g.channels <= kMaxProducts, "the sums of products would be too large");
  } else {
    packed &= (pairs || weight_type == ScalarType::Float) &&
              weight.numel() == matrices * round_up(g.channels, pairs ? 2 : 1) * g.padded_out();
  }
  STD_TORCH_CHECK(packed, "weight is not packed for this convolution");
  g.weight = static_cast<const float*>(weight.const_data_ptr());
  if (amx_limbs == 3) {
    g.channel_scales = g.weight;
    g.weight += amx_set.scale_count(g);
  }
  g.x_pixel = pixel_distance(x, "x");
  g.out_pixel = pixel_distance(out, "out");
  if (bias.has_value()) {
    STD_TORCH_CHECK(
        bias->scalar_type() == ScalarType::Float && bias->is_contiguous() && bias->numel() == g.out_channels,
        "bias must be contiguous float32 with a number for each row of the weight");
    g.bias = static_cast<const float*>(bias->const_data_ptr());
  }
  if (affine.has_value()) {
    STD_TORCH_CHECK(affine->scalar_type() == ScalarType::Float && affine->is_contiguous() && affine->dim() == 3 &&
                        (affine->size(0) == 3 || affine->size(0) == 4) && affine->size(1) == g.images &&
                        affine->size(2) == g.channels,
                    "affine must be contiguous float32 [3, N, C] or [4, N, C]");
    g.centre = static_cast<const float*>(affine->const_data_ptr());
    g.gain = g.centre + g.images * g.channels;
    g.offset = g.gain + g.images * g.channels;
    if (affine->size(0) == 4) g.bounds = g.offset + g.images * g.channels;
  }
  STD_TORCH_CHECK(amx_limbs != 3 || !affine.has_value() || affine->size(0) == 4,
                  "with three limbs affine must be [4, N, C], with bounds");
  STD_TORCH_CHECK(!silu || affine.has_value(), "without affine there is no activation");
  if (residual.has_value()) {
    STD_TORCH_CHECK(residual->dim() == 4 && residual->scalar_type() == type, "residual must be like out");
    for (int64_t d = 0; d < 4; ++d) STD_TORCH_CHECK(residual->size(d) == out.size(d), "residual must be like out");
    g.residual = residual->const_data_ptr();
    g.residual_pixel = pixel_distance(*residual, "residual");
  }
  if (out.numel() == 0) return;
  reshape_pixels(g, affine.has_value() || amx_limbs == 3);
  const auto run = [&](const auto& call) { run_or_record(call, x, weight, bias, affine, residual, out); };
  if (amx_limbs > 0) return run([=] { convolve_by_amx(g, amx_set, type); });
  const ConvolutionKernels set = kernels(type, pairs);
  if (winograd_m == 0) run([=] { direct(g, set, pairs ? 2 : 1, type); });
  else run([=] { winograd(g, set, winograd_m, pairs ? 2 : 1); });
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CPU, m) {
  m.impl("convolution_", TORCH_BOX(&fused_diffusion::convolution_));
}
