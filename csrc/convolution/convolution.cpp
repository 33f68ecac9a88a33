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

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "convolution/args.h"
#include "common/parallel.h"
#include "simd/dispatch.h"
#include "group_norm_silu/math.h"
#include "common/channels_last.h"
#include "runtime/recorded_calls.h"
#include "common/scratch.h"
#include "common/targets.h"

namespace fused_diffusion {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlockWords = 1 << 20;  // of both buffers of a Winograd block, or the inputs of a direct one
constexpr int64_t kAmxBytesPerThread = 1 << 20;  // of inputs, in half of its cache
constexpr int64_t kAmxWeightBytes = 5 << 18;     // that stay in a thread's cache besides
constexpr int64_t kWorkPerThread = 1 << 14;  // vector operations, some five microseconds

namespace baseline {
#define FD_LANES 4
#define FD_BFLOAT16 0
#define FD_PAIRS 0
#include "simd/vec.h"
#include "simd/gemm.h"
#include "convolution/convolution_cpu.h"
}  // namespace baseline

#if defined(__x86_64__)
FD_TARGET("avx2,fma")
namespace avx2 {
#define FD_LANES 8
#define FD_BFLOAT16 0
#define FD_PAIRS 0
#include "simd/vec.h"
#include "simd/gemm.h"
#include "convolution/convolution_cpu.h"
}  // namespace avx2
FD_END_TARGET

FD_TARGET("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
#define FD_LANES 16
#define FD_BFLOAT16 0
#define FD_PAIRS 0
#include "simd/vec.h"
#include "simd/gemm.h"
#include "convolution/convolution_cpu.h"
}  // namespace avx512
FD_END_TARGET

FD_TARGET("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
namespace avx512_bf16 {
#define FD_LANES 16
#define FD_BFLOAT16 1
#define FD_PAIRS 1
#include "simd/vec.h"
#include "simd/gemm.h"
#include "convolution/convolution_cpu.h"
}  // namespace avx512_bf16
FD_END_TARGET
#endif

#if FD_AMX
FD_TARGET("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,amx-int8")
namespace amx {
#define FD_LANES 16
#define FD_BFLOAT16 1
#define FD_PAIRS 1
#define FD_RECIPROCALS 1
#include "simd/vec.h"
#include "simd/gemm.h"
#include "convolution/convolution_cpu.h"
#include "amx/tile_gemm.h"
#include "convolution/convolution_amx.h"
#undef FD_RECIPROCALS
}  // namespace amx
FD_END_TARGET
#endif

// The kernels of one instruction set for one element type of the images and one of the weights.
struct Kernels {
  void (*winograd_input)(const Convolution&, const Tiles&, float* v, float* plane, int64_t begin, int64_t end);
  void (*winograd_multiply)(const Convolution&, const Tiles&, const float* v, float* m, int64_t begin, int64_t end);
  void (*winograd_output)(const Convolution&, const Tiles&, const float* m, int64_t begin, int64_t end);
  void (*direct_input)(const Convolution&, const Rows&, void* to, int64_t begin, int64_t end);
  void (*direct_multiply)(const Convolution&, const Rows&, const void* from, int64_t begin, int64_t end);
  int64_t lanes;
};

#define FD_KERNELS(set, T, math)                                                                                     \
  Kernels {                                                                                                          \
    set::winograd_input<T, set::math>, set::winograd_multiply<set::math>, set::winograd_output<T, set::math>,        \
        set::direct_input<T, set::math>, set::direct_multiply<T, set::math>, set::kLanes                             \
  }

template <class T>
Kernels kernels_of(bool pairs) {
#if defined(__x86_64__)
  const Simd simd = simd_in_use();
  STD_TORCH_CHECK(!pairs || simd >= Simd::avx512_bf16, "the weights are packed for a processor with AVX512_BF16");
  if (pairs) return FD_KERNELS(avx512_bf16, T, Pairs);
  if (simd >= Simd::avx512) return FD_KERNELS(avx512, T, Singles);
  if (simd == Simd::avx2) return FD_KERNELS(avx2, T, Singles);
#else
  STD_TORCH_CHECK(!pairs, "the weights are packed for a processor with AVX512_BF16");
#endif
  return FD_KERNELS(baseline, T, Singles);
}

Kernels kernels(ScalarType type, bool pairs) {
  if (type == ScalarType::Float) return kernels_of<float>(pairs);
  return type == ScalarType::BFloat16 ? kernels_of<BFloat16>(pairs) : kernels_of<Half>(pairs);
}

// The kernels for AMX, for one element type of the images and one kind of numbers.
struct AmxKernels {
  void (*input)(const Convolution&, const Pixels&, char* to, int64_t begin, int64_t end);
  void (*multiply)(const Convolution&, const Pixels&, const char* from, int64_t begin, int64_t end);
  void (*largest)(const Convolution&, uint32_t* to, int64_t begin, int64_t end);  // null where there are no scales
  uint32_t (*largest_bound)(const Convolution&, int64_t image);
  ImageScale (*scale)(const Convolution&, const uint32_t* rows);
  void (*spoil)(const Convolution&, int64_t image, const uint32_t* rows);
  int64_t copies, chunk, outputs, head_bytes;  // of the kind of numbers
  bool merges;

  int64_t merged(const Convolution& g) const { return merges ? merged_pixels(g, chunk / 16) : 1; }
  int64_t taps(const Convolution& g) const { return g.kernel * divide_up(g.kernel, merged(g)); }

  int64_t share_count(const Convolution& g) const { return largest == nullptr ? 0 : round_up(g.channels, chunk); }

  int64_t weight_bytes(const Convolution& g) const {
    const int64_t panels = divide_up(g.out_channels, 16), chunks = divide_up(g.channels, chunk);
    return 4 * share_count(g) + panels * (head_bytes + chunks * taps(g) * copies * 1024);
  }
};

#if FD_AMX
template <class T, class Numbers>
AmxKernels amx_kernels_of() {
  AmxKernels set{amx::amx_input<T, Numbers>, amx::amx_multiply<T, Numbers>, nullptr, nullptr, nullptr, nullptr,
                 Numbers::kCopies, Numbers::kChunk, Numbers::kOutputs, Numbers::kHeadBytes, Numbers::kMerges};
  if (Numbers::kHeadBytes > 0) {
    set.largest = amx::amx_largest<T>;
    set.largest_bound = amx::amx_largest_bound;
    set.scale = amx::amx_scale;
    set.spoil = amx::amx_spoil<T>;
  }
  return set;
}
#endif

template <class T>
AmxKernels amx_kernels_of(int64_t parts) {
#if FD_AMX
  return parts == 1 ? amx_kernels_of<T, amx::Halved>() : amx_kernels_of<T, amx::Digits>();
#else
  return {};
#endif
}

AmxKernels amx_kernels(ScalarType type, int64_t parts) {
  STD_TORCH_CHECK(simd_in_use() == Simd::amx, "the weights are packed for a processor with AMX");
  if (type == ScalarType::Float) return amx_kernels_of<float>(parts);
  return type == ScalarType::BFloat16 ? amx_kernels_of<BFloat16>(parts) : amx_kernels_of<Half>(parts);
}

template <class Run>
void share(int64_t items, int64_t work_per_item, const Run& run) {
  parallel_for(0, items, std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(1, work_per_item)),
                              run);
}

void winograd(const Convolution& g, const Kernels& set, int64_t size, int64_t pack) {
  Tiles tiles(g, size, pack, 1);
  const int64_t strips = g.images * tiles.high, strip_words = tiles.frequencies() * tiles.wide * (tiles.inputs + tiles.outputs);
  const int64_t blocks = divide_up(strips, std::max<int64_t>(1, kBlockWords / strip_words));
  const int64_t strips_per_block = divide_up(strips, blocks);
  for (int64_t first = 0; first < strips; first += strips_per_block) {
    tiles = Tiles(g, size, pack, std::min(strips_per_block, strips - first));
    tiles.first = first;
    float* v = buffer(tiles.frequencies() * tiles.input_step, 0);
    float* m = buffer(tiles.frequencies() * tiles.output_step, 1);
    const int64_t images = (first + tiles.strips - 1) / tiles.high - first / tiles.high + 1;
    const int64_t vectors = round_up(g.channels, 16) / set.lanes;
    const int64_t plane = (std::min(tiles.strips, tiles.high) * size + 2) * (tiles.wide * size + 2) * set.lanes;
    share(images * vectors, tiles.count() / images * 200, [&](int64_t begin, int64_t end) {
      set.winograd_input(g, tiles, v, buffer(plane, 2), begin, end);
    });
    const int64_t items = tiles.frequencies() * g.panels();
    share(items, tiles.count() * g.channels * kPanel / (16 * pack),
          [&](int64_t begin, int64_t end) { set.winograd_multiply(g, tiles, v, m, begin, end); });
    share(tiles.count(), g.out_channels / 16 * 250,
          [&](int64_t begin, int64_t end) { set.winograd_output(g, tiles, m, begin, end); });
  }
}

void direct(const Convolution& g, const Kernels& set, int64_t pack, ScalarType type) {
  Rows block{};
  const int64_t element = type == ScalarType::Float ? 4 : 2, weight_element = pack == 2 ? 2 : 4;
  const bool same_type = type == (pack == 2 ? ScalarType::BFloat16 : ScalarType::Float);
  const bool in_place = g.kernel == 1 && g.stride == 1 && g.scale == 1 && g.padding == 0 && g.centre == nullptr &&
                        g.out_height == g.height && g.out_width == g.width && same_type && g.channels % pack == 0;
  block.columns = (g.out_width - 1) * g.stride + g.kernel;
  block.pixel = in_place ? g.x_pixel * element : round_up(g.channels, 16) * weight_element;
  const int64_t row_words = block.columns * block.pixel / 4;
  const int64_t image_rows = (g.out_height - 1) * g.stride + g.kernel;
  const int64_t whole = in_place ? g.images : kBlockWords / (image_rows * row_words);
  const int64_t rows = std::max<int64_t>(1, (kBlockWords / row_words - g.kernel) / g.stride);
  block.images = std::max<int64_t>(1, whole);
  const int64_t step = whole > 0 ? g.out_height : std::min(g.out_height, rows);
  const int64_t taps = g.kernel * g.kernel;
  for (block.image = 0; block.image < g.images; block.image += block.images) {
    block.images = std::min(block.images, g.images - block.image);
    for (block.row = 0; block.row < g.out_height; block.row += step) {
      block.rows = std::min(step, g.out_height - block.row);
      block.in_rows = (block.rows - 1) * g.stride + g.kernel;
      block.image_step = block.in_rows * block.columns * block.pixel;
      const void* from = g.x;
      if (!in_place) {
        float* to = buffer(block.images * block.image_step / 4, 0);
        share(block.images * block.in_rows, block.columns * g.channels,
              [&](int64_t begin, int64_t end) { set.direct_input(g, block, to, begin, end); });
        from = to;
      }
      const int64_t items = g.panels() * divide_up(block.count(g), kMostRows);
      share(items, kMostRows * taps * g.channels * kPanel / (16 * pack),
            [&](int64_t begin, int64_t end) { set.direct_multiply(g, block, from, begin, end); });
    }
  }
}

// Finds the scales of the block's images: by their maps, or while they are on their way into the cache.
void find_scales(const Convolution& g, const Pixels& block, const AmxKernels& set, ImageScale* scales, uint32_t* rows) {
  const int64_t first = block.image * g.height, end = first + block.images * g.height;
  if (g.bounds != nullptr) {
    for (int64_t i = block.image; i < block.image + block.images; ++i) {
      std::fill_n(rows + i * g.height, g.height, set.largest_bound(g, i));
    }
  } else {
    share(end - first, g.width * g.channels / 4,
          [&](int64_t begin, int64_t stop) { set.largest(g, rows, first + begin, first + stop); });
  }
  for (int64_t i = block.image; i < block.image + block.images; ++i) {
    scales[i] = set.scale(g, rows + i * g.height);
  }
}

void by_amx(Convolution g, const AmxKernels& set) {
  const bool scaled = set.largest != nullptr;
  uint32_t* largest = scaled ? reinterpret_cast<uint32_t*>(buffer(g.images * (g.height + 3), 1)) : nullptr;
  ImageScale* scales = reinterpret_cast<ImageScale*>(scaled ? largest + g.images * g.height : nullptr);
  g.scales = scales;
  Pixels block{};
  const bool shared = g.kernel == 3 && g.stride == 1 && g.padding == 1 && g.out_width == g.in_width();
  block.columns = (g.out_width - 1) * g.stride + g.kernel - shared;  // a row's right padding is the next one's left
  block.flat = g.stride == 1;
  block.merged = set.merged(g);
  const int64_t chunks = divide_up(g.channels, set.chunk), taps = set.taps(g);
  const int64_t pixel_bytes = chunks * set.copies * 64;
  const int64_t budget = kAmxBytesPerThread * torch::stable::get_num_threads();
  const int64_t image_rows = (g.out_height - 1) * g.stride + g.kernel;
  const int64_t whole = budget / (image_rows * block.columns * pixel_bytes);
  const int64_t rows = std::max<int64_t>(1, (budget / (block.columns * pixel_bytes) - g.kernel) / g.stride + 1);
  const int64_t most_images = std::min(g.images, std::max<int64_t>(1, whole));
  const int64_t most_rows = whole > 0 ? g.out_height : std::min(g.out_height, rows);
  const int64_t panels = divide_up(g.out_channels, set.outputs);
  for (block.image = 0; block.image < g.images; block.image += most_images) {
    block.images = std::min(most_images, g.images - block.image);
    if (scaled) find_scales(g, block, set, scales, largest);
    for (block.row = 0; block.row < g.out_height; block.row += most_rows) {
      block.rows = std::min(most_rows, g.out_height - block.row);
      block.in_rows = (block.rows - 1) * g.stride + g.kernel;
      const int64_t inputs = block.input(block.images * block.in_rows);
      block.count = inputs + 32 * g.stride;
      block.lines = block.flat ? block.images : block.images * block.rows;
      block.length = block.flat ? (block.rows - 1) * block.columns + g.out_width : g.out_width;
      // Either each thread reads all weights or each reads all inputs, half of which another one wrote.
      const int64_t weight_bytes = set.weight_bytes(g);
      block.panels_first = weight_bytes > kAmxWeightBytes || weight_bytes > 2 * inputs * pixel_bytes;
      char* pixels = reinterpret_cast<char*>(buffer(block.count * pixel_bytes / 4, 0));
      share(block.images * block.in_rows, block.columns * chunks * 4,
            [&](int64_t begin, int64_t end) { set.input(g, block, pixels, begin, end); });
      share(block.lines * divide_up(block.length, 32) * panels, chunks * taps * set.copies * set.outputs,
            [&](int64_t begin, int64_t end) { set.multiply(g, block, pixels, begin, end); });
    }
    for (int64_t i = block.image; scaled && i < block.image + block.images; ++i) {
      set.spoil(g, i, largest + i * g.height);
    }
  }
}

void convolution_(const Tensor& x, const Tensor& weight, int64_t kernel, int64_t stride, int64_t padding,
                  int64_t scale, int64_t tile, int64_t parts, const std::optional<Tensor>& bias, const std::optional<Tensor>& map,
                  bool silu, const std::optional<Tensor>& residual, Tensor out) {
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
  g.out_channels = out.size(1), g.out_height = out.size(2), g.out_width = out.size(3);
  g.kernel = kernel, g.stride = stride, g.padding = padding, g.scale = scale, g.silu = silu;
  STD_TORCH_CHECK((kernel == 1 || kernel == 3) && stride >= 1 && (scale == 1 || scale == 2) && padding >= 0,
                  "the kernel must be 1 or 3 wide, the scale 1 or 2");
  STD_TORCH_CHECK(tile == 0 || ((tile == 2 || tile == 4) && kernel == 3 && stride == 1 && padding == 1 &&
                                g.out_height == g.in_height() && g.out_width == g.in_width()),
                  "Winograd's convolution is 3 x 3, and its output as large as its input");
  STD_TORCH_CHECK(parts == 0 || ((parts == 1 || parts == 3) && tile == 0), "there are no, 1 or 3 parts, and no tiles");
  const ScalarType weight_type = weight.scalar_type();
  const bool halves = weight_type == ScalarType::BFloat16;
  const int64_t factors = tile == 0 ? kernel * kernel : (tile + 2) * (tile + 2);
  AmxKernels by_parts{};
  bool packed = weight.is_contiguous();
  if (parts > 0) {
    by_parts = amx_kernels(type, parts);
    packed &= weight_type == (parts == 1 ? ScalarType::BFloat16 : ScalarType::Char) &&
              weight.numel() * weight.element_size() == by_parts.weight_bytes(g);
    STD_TORCH_CHECK(parts == 1 || factors * g.channels <= kMaxProducts, "the sums of bytes would be too large");
  } else {
    packed &= (halves || weight_type == ScalarType::Float) &&
              weight.numel() == factors * round_up(g.channels, halves ? 2 : 1) * g.padded_out();
  }
  STD_TORCH_CHECK(packed, "weight is not packed for this convolution");
  g.weight = static_cast<const float*>(weight.const_data_ptr());
  if (parts == 3) {
    g.shares = g.weight;
    g.weight += by_parts.share_count(g);
  }
  g.x_pixel = pixel_distance(x, "x");
  g.out_pixel = pixel_distance(out, "out");
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float && bias->is_contiguous() && bias->numel() == g.out_channels,
                    "bias must be contiguous float32 [K]");
    g.bias = static_cast<const float*>(bias->const_data_ptr());
  }
  if (map.has_value()) {
    STD_TORCH_CHECK(map->scalar_type() == ScalarType::Float && map->is_contiguous() &&
                        map->dim() == 3 && (map->size(0) == 3 || map->size(0) == 4) && map->size(1) == g.images &&
                        map->size(2) == g.channels,
                    "map must be contiguous float32 [3, N, C] or [4, N, C]");
    g.centre = static_cast<const float*>(map->const_data_ptr());
    g.gain = g.centre + g.images * g.channels;
    g.offset = g.gain + g.images * g.channels;
    if (map->size(0) == 4) g.bounds = g.offset + g.images * g.channels;
  }
  STD_TORCH_CHECK(parts != 3 || !map.has_value() || map->size(0) == 4, "with three parts the map must have bounds");
  STD_TORCH_CHECK(!silu || map.has_value(), "without a map there is no activation");
  if (residual.has_value()) {
    STD_TORCH_CHECK(residual->dim() == 4 && residual->scalar_type() == type, "residual must be like out");
    for (int64_t d = 0; d < 4; ++d) STD_TORCH_CHECK(residual->size(d) == out.size(d), "residual must be like out");
    g.residual = residual->const_data_ptr();
    g.residual_pixel = pixel_distance(*residual, "residual");
  }
  if (out.numel() == 0) return;
  const auto run = [&](const auto& call) { run_or_record(call, x, weight, bias, map, residual, out); };
  if (parts > 0) return run([=] { by_amx(g, by_parts); });
  const Kernels set = kernels(type, halves);
  if (tile == 0) run([=] { direct(g, set, halves ? 2 : 1, type); });
  else run([=] { winograd(g, set, tile, halves ? 2 : 1); });
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CPU, m) {
  m.impl("convolution_", TORCH_BOX(&fused_diffusion::convolution_));
}
