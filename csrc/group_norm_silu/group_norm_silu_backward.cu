// fused_diffusion::group_norm_silu_backward on CUDA devices, in the tiles of the forward pass.
//
// Where tiles of x and of the gradient can hold all positions, one kernel reads both once and writes dx once. Otherwise
// a first kernel writes three sums for every chunk and channel, and a second adds them up and writes dx.
#include <torch/csrc/stable/library.h>

#include "group_norm_silu/norm_cuda.h"

namespace fused_diffusion {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kSums = 3;  // of dz, of dz * (x - centre) and of x - centre

// A block's shared memory: numbers for each warp, group and channel, and the tiles.
template <class T>
struct NormGradientShared {
  double *warps, *of_groups, *sums;  // of_groups: see map_gradients; sums and partial: kSums for each channel
  float *partial, *rstd, *slope, *centre, *gain, *offset, *of_x, *constant;
  T *x, *grad;
  size_t bytes;

  // packs: of each tile; width: channels, padded to whole packs; room: as in Threads.
  FD_HD NormGradientShared(unsigned char* memory, int groups, int width, int room, int64_t packs) {
    SharedAllocator allocator{memory};
    warps = allocator.take<double>(kMaxThreads / kWarp);
    of_groups = allocator.take<double>(3 * static_cast<int64_t>(groups));
    sums = allocator.take<double>(kSums * static_cast<int64_t>(width));
    partial = allocator.take<float>(kSums * static_cast<int64_t>(width) * room);
    for (float** array : {&rstd, &slope, &centre, &gain, &offset, &of_x, &constant})
      *array = allocator.take<float>(width);
    x = allocator.take<T>(packs * kPack<T>);
    grad = allocator.take<T>(packs * kPack<T>);
    bytes = static_cast<size_t>(allocator.at - memory);
  }
};

// The bytes of a block's shared memory with tiles of so many positions; without the tiles if not `copies`.
template <class T>
size_t shared_bytes(const NormArguments& args, int64_t groups, int64_t positions, int threads, bool copies) {
  return most_of_blocks(args, groups, [&](int64_t groups) {
    const TileShape<T> shape(args, groups, positions, threads);
    return NormGradientShared<T>(nullptr, static_cast<int>(groups), shape.width, shape.room, copies ? shape.packs : 0)
        .bytes;
  });
}

template <class T, bool kChannelsLast>
__device__ __forceinline__ NormGradientShared<T> shared_of(const NormTile<T, kChannelsLast>& tile, bool copies) {
  return NormGradientShared<T>(shared_memory, tile.groups, tile.padded_width(), tile.threads().room,
                               copies ? static_cast<int64_t>(tile.rows) * tile.packs : 0);
}

// x's mean. The statistics are of x + add, so `add` is subtracted.
__device__ __forceinline__ double exact_centre(const NormArguments& args, int64_t sample, int64_t c) {
  return args.mean[sample * args.groups + c / args.group_size()] - args.add.at(sample, c);
}

template <class T, bool kChannelsLast>
__device__ __forceinline__ void map_channels(const NormTile<T, kChannelsLast>& tile, const NormArguments& args,
                                             const NormGradientShared<T>& shared) {
  for (int i = threadIdx.x; i < tile.width; i += blockDim.x) {
    const int64_t c = tile.first_channel + i, row = tile.sample * args.groups + c / tile.group_size;
    const Affine to_z = affine(args, tile.sample, c);
    const ChannelMap map =
        channel_map(args.mean[row], args.add.at(tile.sample, c), args.rstd[row], to_z.slope, to_z.intercept);
    shared.rstd[i] = args.rstd[row];
    shared.slope[i] = to_z.slope;
    shared.centre[i] = map.centre;
    shared.gain[i] = map.gain;
    shared.offset[i] = map.offset;
  }
  __syncthreads();
}

// dz, the gradient before the activation, from the gradient after it.
template <class T>
__device__ __forceinline__ float gradient_before(float grad, float z, bool silu) {
  if (!silu) return grad;
  const float sigmoid = quotient<T>(1.0f, one_plus_exp<T>(z));
  return grad * HardwareFma::fma(sigmoid * z, 1.0f - sigmoid, sigmoid);
}

// Calls each(channel of the pack, j, d, dz) for the numbers of each pack of a line, and then end(pack). Reads the tiles
// if kCopy, else memory, which it also copies to the tiles if `keep`.
template <bool kCopy, class T, bool kChannelsLast, class Each, class End>
__device__ __forceinline__ void each_gradient(const Line& line, int channel, const NormArguments& args, const T* grad,
                                              const NormGradientShared<T>& shared, bool vector, bool keep,
                                              const Each& each, const End& end) {
  using Tiles = NormTile<T, kChannelsLast>;
  const T* x = static_cast<const T*>(args.x);
  float centre[Tiles::kChannels], gain[Tiles::kChannels], offset[Tiles::kChannels];
  Tiles::read(shared.centre, channel, centre);
  Tiles::read(shared.gain, channel, gain);
  Tiles::read(shared.offset, channel, offset);
  for (int i = 0; i < line.count; ++i) {
    Pack<T> values, gradients;
    if (kCopy) {
      values = load_aligned(shared.x + line.copy_of(i));
      gradients = load_aligned(shared.grad + line.copy_of(i));
    } else {
      values = load(x + line.at_of(i), line.items_of(i), vector);
      gradients = load(grad + line.at_of(i), line.items_of(i), vector);
    }
    if (keep) {
      store_aligned(shared.x + line.copy_of(i), values);
      store_aligned(shared.grad + line.copy_of(i), gradients);
    }
    Tiles::each_item(line.items_of(i), [&](int j) {
      const int map = j % Tiles::kChannels;
      const float d = to_float(values.items[j]) - centre[map];
      const float z = HardwareFma::fma(d, gain[map], offset[map]);
      each(map, j, d, gradient_before<T>(to_float(gradients.items[j]), z, args.silu));
    });
    end(i);
  }
}

// Sums over the tile for each channel. keep: whether x and grad are copied to the tiles.
template <class T, bool kChannelsLast>
__device__ __forceinline__ void measure(const NormTile<T, kChannelsLast>& tile, const NormArguments& args,
                                        const T* grad, const NormGradientShared<T>& shared, bool vector, bool keep) {
  using Tiles = NormTile<T, kChannelsLast>;
  tile.each_line([&](int channel, const Line& line) {
    float sums[kSums][Tiles::kChannels] = {};
    each_gradient<false, T, kChannelsLast>(
        line, channel, args, grad, shared, vector, keep,
        [&](int map, int, float d, float dz) {
          sums[0][map] += dz;
          sums[1][map] = HardwareFma::fma(dz, d, sums[1][map]);
          sums[2][map] += d;
        },
        [](int) {});
    for (int k = 0; k < kSums; ++k)
      tile.store_partial_sums(shared.partial + k * tile.width * tile.threads().room, channel, line, sums[k]);
  });
  const int room = tile.threads().room;
  for (int k = 0; k < kSums; ++k) {
    sum_runs(
        tile.width, room, shared.warps, [&](int c, int i) { return shared.partial[(k * tile.width + c) * room + i]; },
        [&](int c, double sum) { shared.sums[k * tile.width + c] = sum; });
  }
}

// Computes the maps to dx from the sums over all positions and, if `results`, writes the results for each channel.
template <class T, bool kChannelsLast>
__device__ __forceinline__ void map_gradients(const NormTile<T, kChannelsLast>& tile, const NormArguments& args,
                                              const NormGradient& gradient, const NormGradientShared<T>& shared,
                                              bool results) {
  const int size = tile.group_size;
  const double positions = static_cast<double>(args.positions), inverse = 1.0 / size;
  // For each group: the means over its channels of the sums of dz and of x, and the mean of dz * xhat.
  double *mean_dz_sum = shared.of_groups, *mean_x_sum = mean_dz_sum + tile.groups;
  double* dz_xhat_mean = mean_x_sum + tile.groups;
  // The difference of the mean from the centre, which is the mean rounded to float32.
  const auto residue = [&](int c) {
    return exact_centre(args, tile.sample, tile.first_channel + c) - shared.centre[c];
  };
  const auto dz_sum = [&](int c) { return shared.slope[c] * shared.sums[c]; };
  const auto dz_xhat_sum = [&](int c) {
    return (shared.sums[tile.width + c] - residue(c) * shared.sums[c]) * shared.rstd[c];
  };
  const auto x_sum = [&](int c) { return shared.sums[2 * tile.width + c] - residue(c) * positions; };  // less its mean
  sum_runs(
      tile.groups, size, shared.warps, [&](int g, int i) { return dz_sum(g * size + i); },
      [&](int g, double sum) { mean_dz_sum[g] = sum * inverse; });
  sum_runs(
      tile.groups, size, shared.warps,
      [&](int g, int i) { return shared.slope[g * size + i] * dz_xhat_sum(g * size + i); },
      [&](int g, double sum) { dz_xhat_mean[g] = sum * inverse / positions; });
  if (results) {
    sum_runs(
        tile.groups, size, shared.warps, [&](int g, int i) { return x_sum(g * size + i); },
        [&](int g, double sum) { mean_x_sum[g] = sum * inverse; });
  }
  for (int c = threadIdx.x; c < tile.width; c += blockDim.x) {
    const int g = c / size;
    const GradientMap map = gradient_map(exact_centre(args, tile.sample, tile.first_channel + c), shared.rstd[c],
                                         shared.slope[c], mean_dz_sum[g] / positions, dz_xhat_mean[g]);
    shared.of_x[c] = map.of_x;
    shared.constant[c] = map.constant;
    if (!results) continue;
    const int64_t at = tile.sample * args.channels + tile.first_channel + c;
    gradient.sum_dz[at] = static_cast<float>(shared.sums[c]);
    gradient.sum_dz_xhat[at] = static_cast<float>(dz_xhat_sum(c));
    gradient.sum_dx[at] =
        sum_of_dx(shared.rstd[c], dz_sum(c) - mean_dz_sum[g], x_sum(c) - mean_x_sum[g], dz_xhat_mean[g]);
  }
  __syncthreads();
}

template <bool kCopy, class T, bool kChannelsLast>
__device__ __forceinline__ void write_dx(const NormTile<T, kChannelsLast>& tile, const NormArguments& args,
                                         const T* grad, T* dx, const NormGradientShared<T>& shared, bool vector) {
  using Tiles = NormTile<T, kChannelsLast>;
  tile.each_line([&](int channel, const Line& line) {
    float gain[Tiles::kChannels], of_x[Tiles::kChannels],
        constant[Tiles::kChannels];  // gain is what GradientMap calls of_dz
    Tiles::read(shared.gain, channel, gain);
    Tiles::read(shared.of_x, channel, of_x);
    Tiles::read(shared.constant, channel, constant);
    Pack<T> result;
    each_gradient<kCopy, T, kChannelsLast>(
        line, channel, args, grad, shared, vector, false,
        [&](int map, int j, float d, float dz) {
          from_float(HardwareFma::fma(dz, gain[map], HardwareFma::fma(d, of_x[map], constant[map])), result.items[j]);
        },
        [&](int i) { store(dx + line.at_of(i), result, line.items_of(i), vector); });
  });
}

template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kMaxThreads, 1)
    whole_kernel(const NormArguments args, const NormGradient gradient, const Division division) {
  const NormTile<T, kChannelsLast> tile(args, division);
  const NormGradientShared<T> shared = shared_of(tile, true);
  const T* grad = static_cast<const T*>(gradient.grad);
  map_channels(tile, args, shared);
  measure(tile, args, grad, shared, division.vector, true);
  map_gradients(tile, args, gradient, shared, true);
  write_dx<true>(tile, args, grad, static_cast<T*>(gradient.dx), shared, division.vector);
}

// sums: [N, chunks, kSums, C].
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kMaxThreads, 1)
    sums_kernel(const NormArguments args, const NormGradient gradient, const Division division, double* sums) {
  const NormTile<T, kChannelsLast> tile(args, division);
  const NormGradientShared<T> shared = shared_of(tile, false);
  map_channels(tile, args, shared);
  measure(tile, args, static_cast<const T*>(gradient.grad), shared, division.vector, false);
  sums += (tile.sample * division.chunks + tile.chunk) * kSums * args.channels + tile.first_channel;
  for (int c = threadIdx.x; c < tile.width; c += blockDim.x) {
    for (int k = 0; k < kSums; ++k) sums[k * args.channels + c] = shared.sums[k * tile.width + c];
  }
}

template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kMaxThreads, 1)
    apply_kernel(const NormArguments args, const NormGradient gradient, const Division division, const double* sums) {
  const NormTile<T, kChannelsLast> tile(args, division);
  const NormGradientShared<T> shared = shared_of(tile, false);
  map_channels(tile, args, shared);
  sums += tile.sample * division.chunks * kSums * args.channels + tile.first_channel;
  for (int k = 0; k < kSums; ++k) {
    sum_runs(
        tile.width, division.chunks, shared.warps,
        [&](int c, int i) { return sums[(i * int64_t{kSums} + k) * args.channels + c]; },
        [&](int c, double sum) { shared.sums[k * tile.width + c] = sum; });
  }
  map_gradients(tile, args, gradient, shared, tile.chunk == 0);
  write_dx<false>(tile, args, static_cast<const T*>(gradient.grad), static_cast<T*>(gradient.dx), shared,
                  division.vector);
}

template <class T, bool kChannelsLast>
void run(const Tensor& x, const NormArguments& args, const NormGradient& gradient) {
  check_group_size(args);
  const auto bytes = [&](int64_t groups, int64_t positions, int threads) {
    return static_cast<int64_t>(shared_bytes<T>(args, groups, positions, threads, true));
  };
  const bool aligned = aligned_16(args.x) && aligned_16(gradient.grad) && aligned_16(gradient.dx);
  const Division division = divide<T>(args, 2 * sizeof(T), kMaxThreads, device_limits(), aligned, bytes);
  const unsigned grid = grid_of(division.blocks(args));
  const cudaStream_t stream = current_stream(x);
  if (division.chunks == 1 && division.tile >= args.positions) {
    const size_t shared = bytes(division.groups, division.tile, division.threads);
    return launch(whole_kernel<T, kChannelsLast>, grid, division.threads, shared, stream, args, gradient, division);
  }
  const size_t shared = shared_bytes<T>(args, division.groups, division.chunk, division.threads, false);
  Tensor buffer =
      torch::stable::new_empty(x, {args.samples * division.chunks * kSums * args.channels}, ScalarType::Double);
  double* sums = static_cast<double*>(buffer.mutable_data_ptr());
  launch(sums_kernel<T, kChannelsLast>, grid, division.threads, shared, stream, args, gradient, division, sums);
  launch(apply_kernel<T, kChannelsLast>, grid, division.threads, shared, stream, args, gradient, division,
         static_cast<const double*>(sums));
}

template <class T>
void run_layout(const Tensor& x, const NormArguments& args, const NormGradient& gradient) {
  if (args.channels_last) {
    run<T, true>(x, args, gradient);
  } else {
    run<T, false>(x, args, gradient);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward(
    const Tensor& grad, const Tensor& x, int64_t num_groups, std::optional<Tensor> weight, std::optional<Tensor> bias,
    std::optional<Tensor> add, std::optional<Tensor> scale, std::optional<Tensor> shift, bool silu, const Tensor& mean,
    const Tensor& rstd) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  return checked_norm_gradient(grad, x, num_groups, weight, bias, add, scale, shift, silu, mean, rstd,
                               [&](const NormArguments& args, const NormGradient& gradient) {
                                 if (args.type == ScalarType::Float) {
                                   run_layout<float>(x, args, gradient);
                                 } else if (args.type == ScalarType::BFloat16) {
                                   run_layout<BFloat16>(x, args, gradient);
                                 } else {
                                   run_layout<Half>(x, args, gradient);
                                 }
                               });
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CUDA, m) {
  m.impl("group_norm_silu_backward", TORCH_BOX(&fused_diffusion::group_norm_silu_backward));
}
