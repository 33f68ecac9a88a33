// fused_diffusion::convolution_weight_gradient on a CPU with AMX: the gradient of a convolution of bfloat16 images with
// respect to its weight and bias,
//
//   d weight[k, r, s, c] = sum over n, i, j of grad[n, k, i, j] x[n, c, stride i + r - padding, stride j + s - padding]
//
// Tiles sum over 32 pairs (j, n) of one row i. Both factors are first packed row by row, each row column by column, and
// each column image by image. A tap (r, s) of the kernel then moves x by whole rows and columns. Rows outside of the
// image are left out of the sum, and so are columns where each holds 32 images; with fewer images, columns of zeros
// stand for them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "common/channels_last.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "simd/dispatch.h"

namespace fused_diffusion {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunk = 32;          // terms of the sum in one product of tiles
constexpr int64_t kBlock = 32;          // channels of grad, and of x, whose products are summed together
constexpr int64_t kMaxImages = kChunk;  // in a column

// Chunks that are summed for one tap before the next: both factors of a piece and the sums of three taps fit the
// first-level cache of 48 KiB.
constexpr int64_t kChunksOfPiece = 8;

constexpr int64_t kPackedBytes = 1 << 20;  // of both factors together, in half of the second-level cache
constexpr int64_t kMaxGroups = 16;         // of rows
constexpr int64_t kMinRowsOfGroup = 4;
constexpr int64_t kAddsPerThread = 1 << 15;
constexpr int64_t kMaxSide = 3;

struct WeightGradient {
  const uint16_t *grad, *x;       // channels_last
  int64_t grad_pixel, x_pixel;    // elements from one pixel to the next
  int64_t images, height, width;  // of x
  int64_t out_height, out_width;  // of grad
  int64_t outputs, inputs, side, stride, padding;
  float *weight, *bias;  // [outputs][side][side][inputs], [outputs]

  FD_HD int64_t taps() const { return side * side; }

  // A bunch is up to `kMaxImages` images. The rows of grad are numbered through all bunches.
  FD_HD int64_t bunches() const { return divide_up(images, kMaxImages); }
  FD_HD int64_t rows() const { return bunches() * out_height; }
};

// The work of one thread: a range of the rows, and of the blocks of outputs. A thread packs its own factors, so that
// none moves from core to core.
struct ThreadPart {
  int64_t first_row, last_row, first_block, last_block;
  float *weight, *bias;  // as in WeightGradient

  FD_HD int64_t outputs() const { return (last_block - first_block) * kBlock; }
};

// Positions from `first` on and before `last`, along one axis. The first constructor finds the outputs for which a tap
// meets an input inside of the image.
struct Range {
  int64_t first, last;

  FD_HD Range(int64_t tap, int64_t stride, int64_t padding, int64_t inputs, int64_t outputs) {
    first = padding > tap ? divide_up(padding - tap, stride) : 0;
    last = inputs + padding > tap ? std::min(outputs, divide_up(inputs + padding - tap, stride)) : 0;
    last = std::max(first, last);
  }

  FD_HD Range(int64_t first_, int64_t last_) : first(first_), last(std::max(first_, last_)) {}

  FD_HD Range within(int64_t from, int64_t to) const { return {std::max(first, from), std::min(last, to)}; }

  FD_HD int64_t size() const { return last - first; }
};

// The packed rows of a bunch, 16 channels at a time. A row of grad is [chunk][channel][32 terms]. A row of x is
// [column][pair of images][channel][2], with the columns of the padding; with a stride of 2, the even columns come
// before the odd columns, so that the columns of a tap are consecutive.
struct BunchLayout {
  int64_t first_image, images;
  int64_t unit;     // terms of a column: the number of images, rounded up to an even number
  int64_t chunks;   // of a row of grad; zeros fill the last
  int64_t columns;  // of x, for each remainder modulo the stride
  int64_t x_row;    // bytes of 16 channels of a row of x
  bool whole;       // whether a column is a chunk, so that columns of the padding are left out

  FD_HD BunchLayout(const WeightGradient& g, int64_t bunch) {
    first_image = bunch * kMaxImages;
    images = std::min(kMaxImages, g.images - first_image);
    unit = images + images % 2;
    whole = unit == kChunk;
    chunks = divide_up(g.out_width * unit, kChunk);
    columns = g.out_width + (g.side - 1) / g.stride;
    x_row = (phases(g) * columns * unit + (whole ? 0 : kChunk)) / 2 * 64;  // the last chunk may reach past the columns
  }

  FD_HD int64_t phases(const WeightGradient& g) const { return std::min(g.stride, g.side); }

  // Bytes from the start of a row of x to the column that a tap reads for the first output.
  FD_HD int64_t start(const WeightGradient& g, int64_t tap) const {
    return (tap % g.stride * columns + tap / g.stride) * unit / 2 * 64;
  }
};

// The packed rows of grad of a band, and the rows of x that the band needs. Row i of x is packed at i modulo `x_rows`,
// so that the next band finds the rows that both bands need.
struct PackedRows {
  int64_t band, x_rows;         // rows of grad and of x, at most
  int64_t grad_group, x_group;  // bytes from 16 channels to the next 16
  char *grad, *x;

  FD_HD PackedRows(const WeightGradient& g, const ThreadPart& part, const BunchLayout& layout, int64_t room,
                   int64_t max_rows) {
    const int64_t groups = divide_up(g.inputs, kBlock) * 2;
    const int64_t grad_row = part.outputs() * layout.chunks * 64, x_row = groups * layout.x_row;
    const int64_t fit = (room - (g.side - g.stride) * x_row) / (grad_row + g.stride * x_row);
    const int64_t min_rows = divide_up(kChunksOfPiece, layout.chunks);
    band = std::min(max_rows, std::max(fit, min_rows));
    x_rows = (band - 1) * g.stride + g.side;
    grad_group = band * layout.chunks * 1024;
    x_group = x_rows * layout.x_row;
    grad = reinterpret_cast<char*>(buffer(part.outputs() / 16 * grad_group / 4, 0));
    x = reinterpret_cast<char*>(buffer(groups * x_group / 4, 1));
  }
};

#define FD_PER_ISA "convolution/weight_gradient_amx.h"
#define FD_ISAS FD_ISA_AMX
#include "simd/foreach_isa.inc"

#if FD_AMX
// Rows are divided into groups, whose gradients are added up afterwards, where those are small beside the images; by
// the shape alone, so that the number of threads does not change the result. Outputs are divided by that number.
void run(const WeightGradient& g, const Tensor& like) {
  const int64_t weight = g.outputs * g.taps() * g.inputs, size = weight + g.outputs, rows = g.rows();
  const int64_t numbers = g.images * g.out_height * g.out_width * (g.outputs + g.inputs);
  int64_t groups = 1;
  while (groups < kMaxGroups && 2 * groups * kMinRowsOfGroup <= rows && 16 * groups * size <= numbers) groups *= 2;
  const int64_t room = std::max(kPackedBytes, 4 * size);
  const int64_t blocks = divide_up(g.outputs, kBlock), threads = torch::stable::get_num_threads();
  const int64_t parts = std::min(blocks, divide_up(threads, groups));
  Tensor sums = torch::stable::new_empty(like, {groups == 1 ? 0 : groups * size}, ScalarType::Float);
  float* of_groups = groups == 1 ? nullptr : static_cast<float*>(sums.mutable_data_ptr());
  parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / parts, i = item % parts;
      float* to = groups == 1 ? g.weight : of_groups + group * size;
      amx::differentiate(g,
                         {rows * group / groups, rows * (group + 1) / groups, blocks * i / parts,
                          blocks * (i + 1) / parts, to, groups == 1 ? g.bias : to + weight},
                         room);
    }
  });
  if (groups == 1) return;
  parallel_for(0, size, kAddsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float sum = of_groups[i];
      for (int64_t group = 1; group < groups; ++group) sum += of_groups[group * size + i];
      (i < weight ? g.weight[i] : g.bias[i - weight]) = sum;
    }
  });
}
#endif

std::tuple<Tensor, Tensor> convolution_weight_gradient(const Tensor& grad, const Tensor& x, int64_t side,
                                                       int64_t stride, int64_t padding) {
  STD_TORCH_CHECK(includes(simd_in_use(), Simd::amx), "this processor has no AMX");
  STD_TORCH_CHECK(side == 1 || side == kMaxSide, "the kernel must be 1 x 1 or 3 x 3");
  STD_TORCH_CHECK((stride == 1 || stride == 2) && padding >= 0 && padding < side,
                  "the stride must be 1 or 2, and the padding less than the kernel's side");
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::BFloat16 && x.scalar_type() == ScalarType::BFloat16,
                  "grad and x must be bfloat16");
  STD_TORCH_CHECK(grad.dim() == 4 && x.dim() == 4 && grad.size(0) == x.size(0),
                  "grad must be [N, K, H', W'], and x [N, C, H, W]");
  for (int64_t d = 2; d < 4; ++d) {
    STD_TORCH_CHECK(x.numel() == 0 || (x.size(d) + 2 * padding >= side &&
                                       grad.size(d) == (x.size(d) + 2 * padding - side) / stride + 1),
                    "grad must have the size of the convolution's output");
  }
  const int64_t outputs = grad.size(1), inputs = x.size(1);
  STD_TORCH_CHECK(
      (grad.const_data_ptr() != nullptr || grad.numel() == 0) && (x.const_data_ptr() != nullptr || x.numel() == 0),
      "grad and x must have memory");
  Tensor weight = torch::stable::new_empty(x, {outputs, side, side, inputs}, ScalarType::Float);
  Tensor bias = torch::stable::new_empty(x, {outputs}, ScalarType::Float);
  if (grad.numel() == 0 || x.numel() == 0) {
    torch::stable::zero_(weight);
    torch::stable::zero_(bias);
  } else {
#if FD_AMX
    run({static_cast<const uint16_t*>(grad.const_data_ptr()), static_cast<const uint16_t*>(x.const_data_ptr()),
         pixel_distance(grad, "grad"), pixel_distance(x, "x"), x.size(0), x.size(2), x.size(3), grad.size(2),
         grad.size(3), outputs, inputs, side, stride, padding, static_cast<float*>(weight.mutable_data_ptr()),
         static_cast<float*>(bias.mutable_data_ptr())},
        x);
#endif
  }
  return {weight, bias};
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CPU, m) {
  m.impl("convolution_weight_gradient", TORCH_BOX(&fused_diffusion::convolution_weight_gradient));
}
