// fused_diffusion::group_norm_silu on CUDA devices.
//
// Where a tile can hold all positions, one kernel reads x once and writes y once. Otherwise, and where so few tiles
// would leave the device idle, positions are divided into chunks: a first kernel writes the moments of every chunk and
// group, a second merges them and writes y.
#include <torch/csrc/stable/library.h>

#include "group_norm_silu/norm_cuda.h"

namespace fused_diffusion {
namespace {

constexpr int kMaxThreads = 512;

// Blocks of kMaxThreads on a multiprocessor, or twice as many of half as many threads: two leave a thread 64 registers,
// with which kernels of float32 would spill.
template <class T>
constexpr int kMinBlocks = sizeof(T) == 2 ? 2 : 1;

// A block's shared memory: numbers for each warp, group and channel, and the tile.
template <class T>
struct NormShared {
  double *warps, *sums;  // sums of groups
  Moments* moments;      // of groups
  float *partial[2], *add, *centre, *gain, *offset;
  T* tile;
  size_t bytes;

  // packs: of the tile; width: channels, padded to whole packs; room: as in Threads.
  FD_HD NormShared(unsigned char* memory, int groups, int width, int room, int64_t packs) {
    SharedAllocator allocator{memory};
    warps = allocator.take<double>(kMaxThreads / kWarp);
    sums = allocator.take<double>(groups);
    moments = allocator.take<Moments>(groups);
    for (float*& array : partial) array = allocator.take<float>(static_cast<int64_t>(width) * room);
    for (float** array : {&add, &centre, &gain, &offset}) *array = allocator.take<float>(width);
    tile = allocator.take<T>(packs * kPack<T>);
    bytes = static_cast<size_t>(allocator.at - memory);
  }
};

template <class T>
size_t shared_bytes(const NormArguments& args, int64_t groups, int64_t positions, int threads) {
  return most_of_blocks(args, groups, [&](int64_t groups) {
    const TileShape<T> shape(args, groups, positions, threads);
    return NormShared<T>(nullptr, static_cast<int>(groups), shape.width, shape.room, shape.packs).bytes;
  });
}

template <class T, bool kChannelsLast>
__device__ __forceinline__ NormShared<T> shared_of(const NormTile<T, kChannelsLast>& tile) {
  return NormShared<T>(shared_memory, tile.groups, tile.padded_width(), tile.threads().room, 0);
}

// Begins to copy the tile to shared memory, all of it at once. Every thread copies the packs that it reads later.
template <class T, bool kChannelsLast>
__device__ __forceinline__ void begin_copies(const NormTile<T, kChannelsLast>& tile, const NormArguments& args,
                                             const NormShared<T>& shared, bool vector) {
  const T* x = static_cast<const T*>(args.x);
  tile.each_line([&](int, const Line& line) {
    for (int i = 0; i < line.count; ++i) {
      T* to = shared.tile + line.copy_of(i);
      if (vector) {
        copy_16_bytes(to, x + line.at_of(i), true);
      } else {
        store_aligned(to, load(x + line.at_of(i), line.items_of(i), false));
      }
    }
  });
  commit_copies();
}

// Computes the moments of x + add for each of the tile's groups, in two passes over its copy.
template <class T, bool kChannelsLast>
__device__ __forceinline__ void measure(const NormTile<T, kChannelsLast>& tile, const NormShared<T>& shared) {
  using Tiles = NormTile<T, kChannelsLast>;
  const int room = tile.threads().room, length = tile.group_size * room;
  const double positions = tile.positions(), count = tile.group_size * positions;
  // The sum of partial sums of group g, with `of_channel(c)` for each number of channel c.
  const auto partial_sum = [&](int g, int i, const auto& of_channel) {
    const double sum = shared.partial[0][g * length + i];
    return i % room == 0 ? sum + positions * of_channel(g * tile.group_size + i / room) : sum;
  };
  wait_for_copies<0>();
  tile.each_line([&](int channel, const Line& line) {
    float sums[Tiles::kChannels] = {};
    for (int i = 0; i < line.count; ++i) {
      const Pack<T> pack = load_aligned(shared.tile + line.copy_of(i));
      Tiles::each_item(line.items_of(i), [&](int j) { sums[j % Tiles::kChannels] += to_float(pack.items[j]); });
    }
    tile.store_partial_sums(shared.partial[0], channel, line, sums);
  });
  sum_runs(
      tile.groups, length, shared.warps,
      [&](int g, int i) { return partial_sum(g, i, [&](int c) -> double { return shared.add[c]; }); },
      [&](int g, double sum) { shared.moments[g].mean = sum / count; });
  for (int c = threadIdx.x; c < tile.width; c += blockDim.x) {
    shared.centre[c] = static_cast<float>(shared.moments[c / tile.group_size].mean - shared.add[c]);
  }
  __syncthreads();
  tile.each_line([&](int channel, const Line& line) {
    float centre[Tiles::kChannels], sums[Tiles::kChannels] = {}, squares[Tiles::kChannels] = {};
    Tiles::read(shared.centre, channel, centre);
    for (int i = 0; i < line.count; ++i) {
      const Pack<T> pack = load_aligned(shared.tile + line.copy_of(i));
      Tiles::each_item(line.items_of(i), [&](int j) {
        const float d = to_float(pack.items[j]) - centre[j % Tiles::kChannels];
        sums[j % Tiles::kChannels] += d;
        squares[j % Tiles::kChannels] = HardwareFma::fma(d, d, squares[j % Tiles::kChannels]);
      });
    }
    tile.store_partial_sums(shared.partial[0], channel, line, sums);
    tile.store_partial_sums(shared.partial[1], channel, line, squares);
  });
  // The centre of a channel is that of its group but for a rounding error, which is added to the sum.
  sum_runs(
      tile.groups, length, shared.warps,
      [&](int g, int i) {
        return partial_sum(g, i, [&](int c) {
          return static_cast<double>(shared.centre[c]) + shared.add[c] - shared.moments[g].mean;
        });
      },
      [&](int g, double sum) { shared.sums[g] = sum; });
  sum_runs(
      tile.groups, length, shared.warps, [&](int g, int i) { return shared.partial[1][g * length + i]; },
      [&](int g, double sum) { shared.moments[g] = shifted_moments(count, shared.moments[g].mean, shared.sums[g], sum); });
}

template <class T, bool kChannelsLast>
__device__ __forceinline__ void read_add(const NormTile<T, kChannelsLast>& tile, const NormArguments& args,
                                         const NormShared<T>& shared) {
  for (int c = threadIdx.x; c < tile.width; c += blockDim.x) {
    shared.add[c] = args.add.at(tile.sample, tile.first_channel + c);
  }
  __syncthreads();
}

// Whether z is x * gain + offset, without a centre: the rounding error of a product of float32 is a small part of that
// of x, where x has 16 bits.
template <class T>
constexpr bool kFolds = sizeof(T) == 2;

// Computes the affine maps of the tile's channels and, if `results`, writes the statistics of its groups.
template <class T, bool kChannelsLast>
__device__ __forceinline__ void map_channels(const NormTile<T, kChannelsLast>& tile, const NormArguments& args,
                                             const NormShared<T>& shared, bool results) {
  for (int c = threadIdx.x; c < tile.width; c += blockDim.x) {
    const int g = c / tile.group_size;
    const Moments moments = shared.moments[g];
    const float rstd = rsqrtf(static_cast<float>(moments.m2 / moments.count + args.eps));
    if (results && c % tile.group_size == 0) {
      const int64_t row = tile.sample * args.groups + tile.first_group + g;
      args.mean[row] = moments.mean;
      args.rstd[row] = rstd;
    }
    const Affine to_z = affine(args, tile.sample, tile.first_channel + c);
    const ChannelMap map =
        channel_map(moments.mean, args.add.at(tile.sample, tile.first_channel + c), rstd, to_z.slope, to_z.intercept);
    shared.centre[c] = map.centre;
    shared.gain[c] = map.gain;
    shared.offset[c] = kFolds<T> ? HardwareFma::fma(-map.centre, map.gain, map.offset) : map.offset;
  }
  __syncthreads();
}

// Writes y, from the tile's copy in shared memory if kCopy, else from x.
template <bool kCopy, bool kSilu, class T, bool kChannelsLast>
__device__ __forceinline__ void normalise(const NormTile<T, kChannelsLast>& tile, const NormArguments& args,
                                          const NormShared<T>& shared, T* y, bool vector) {
  using Tiles = NormTile<T, kChannelsLast>;
  const T* x = static_cast<const T*>(args.x);
  tile.each_line([&](int channel, const Line& line) {
    float centre[Tiles::kChannels], gain[Tiles::kChannels], offset[Tiles::kChannels];
    Tiles::read(shared.centre, channel, centre);
    Tiles::read(shared.gain, channel, gain);
    Tiles::read(shared.offset, channel, offset);
    constexpr int kBatch = kCopy ? 1 : 2;  // packs that a thread loads at a time
    for (int first = 0; first < line.count; first += kBatch) {
      Pack<T> packs[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int i = first + k;
        if (i >= line.count) break;
        packs[k] =
            kCopy ? load_aligned(shared.tile + line.copy_of(i)) : load(x + line.at_of(i), line.items_of(i), vector);
      }
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int i = first + k;
        if (i >= line.count) break;
        float values[kPack<T>];
#pragma unroll
        for (int j = 0; j < kPack<T>; ++j) {
          const int map = j % Tiles::kChannels;
          const float x = to_float(packs[k].items[j]);
          const float z = HardwareFma::fma(kFolds<T> ? x : x - centre[map], gain[map], offset[map]);
          values[j] = kSilu ? quotient<T>(z, one_plus_exp<T>(z)) : z;
        }
        store(y + line.at_of(i), rounded<T>(values), line.items_of(i), vector);
      }
    }
  });
}

template <bool kCopy, class T, bool kChannelsLast>
__device__ __forceinline__ void normalise(const NormTile<T, kChannelsLast>& tile, const NormArguments& args,
                                          const NormShared<T>& shared, T* y, bool vector) {
  if (args.silu) {
    normalise<kCopy, true>(tile, args, shared, y, vector);
  } else {
    normalise<kCopy, false>(tile, args, shared, y, vector);
  }
}

template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<T>)
    whole_kernel(const NormArguments args, const Division division, T* y) {
  const NormTile<T, kChannelsLast> tile(args, division);
  const NormShared<T> shared = shared_of(tile);
  begin_copies(tile, args, shared, division.vector);
  read_add(tile, args, shared);
  measure(tile, shared);
  map_channels(tile, args, shared, true);
  normalise<true>(tile, args, shared, y, division.vector);
}

// moments: [N, chunks, G].
template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<T>)
    moments_kernel(const NormArguments args, const Division division, Moments* moments) {
  NormTile<T, kChannelsLast> tile(args, division);
  moments += (tile.sample * division.chunks + tile.chunk) * args.groups + tile.first_group;
  const int64_t begin = tile.chunk * division.chunk;
  const int64_t end = begin + division.chunk < args.positions ? begin + division.chunk : args.positions;
  for (int64_t first = begin; first < end; first += division.tile) {
    tile.take(args, first, end - first < division.tile ? end - first : division.tile);
    const NormShared<T> shared = shared_of(tile);
    __syncthreads();  // until no thread reads the tile before
    begin_copies(tile, args, shared, division.vector);
    read_add(tile, args, shared);
    measure(tile, shared);
    for (int g = threadIdx.x; g < tile.groups; g += blockDim.x) {
      moments[g] = first == begin ? shared.moments[g] : merge(moments[g], shared.moments[g]);
    }
  }
}

template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<T>)
    apply_kernel(const NormArguments args, const Division division, T* y, const Moments* moments) {
  const NormTile<T, kChannelsLast> tile(args, division);
  const NormShared<T> shared = shared_of(tile);
  moments += tile.sample * division.chunks * args.groups + tile.first_group;
  const auto part = [&](int g, int i) -> const Moments& { return moments[i * args.groups + g]; };
  const double count = static_cast<double>(tile.group_size) * static_cast<double>(args.positions);
  sum_runs(
      tile.groups, division.chunks, shared.warps,
      [&](int g, int i) { return part(g, i).mean * (part(g, i).count / count); },
      [&](int g, double mean) { shared.sums[g] = mean; });
  sum_runs(
      tile.groups, division.chunks, shared.warps,
      [&](int g, int i) {
        const double off = part(g, i).mean - shared.sums[g];
        return part(g, i).m2 + part(g, i).count * off * off;
      },
      [&](int g, double m2) { shared.moments[g] = {count, shared.sums[g], m2}; });
  map_channels(tile, args, shared, tile.chunk == 0);
  normalise<false>(tile, args, shared, y, division.vector);
}

template <class T, bool kChannelsLast>
void run(const Tensor& x, const NormArguments& args, T* y) {
  check_group_size(args);
  const auto bytes = [&](int64_t groups, int64_t positions, int threads) {
    return static_cast<int64_t>(shared_bytes<T>(args, groups, positions, threads));
  };
  const Division division =
      divide<T>(args, sizeof(T), kMaxThreads, device_limits(), aligned_16(args.x) && aligned_16(y), bytes);
  const unsigned grid = grid_of(division.blocks(args));
  const cudaStream_t stream = current_stream(x);
  const size_t shared = bytes(division.groups, division.tile, division.threads);
  if (division.chunks == 1 && division.tile >= args.positions) {
    return launch(whole_kernel<T, kChannelsLast>, grid, division.threads, shared, stream, args, division, y);
  }
  const int64_t words = args.samples * division.chunks * args.groups * static_cast<int64_t>(sizeof(Moments) / 8);
  Tensor buffer = torch::stable::new_empty(x, {words}, ScalarType::Double);
  Moments* moments = static_cast<Moments*>(buffer.mutable_data_ptr());
  launch(moments_kernel<T, kChannelsLast>, grid, division.threads, shared, stream, args, division, moments);
  launch(apply_kernel<T, kChannelsLast>, grid, division.threads, shared, stream, args, division, y,
         static_cast<const Moments*>(moments));
}

template <class T>
void run(const Tensor& x, const NormArguments& args, void* y) {
  if (args.channels_last) {
    run<T, true>(x, args, static_cast<T*>(y));
  } else {
    run<T, false>(x, args, static_cast<T*>(y));
  }
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(const Tensor& x, int64_t num_groups, std::optional<Tensor> weight,
                                                   std::optional<Tensor> bias, double eps, std::optional<Tensor> add,
                                                   std::optional<Tensor> scale, std::optional<Tensor> shift,
                                                   bool silu) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  return checked_norm(x, num_groups, weight, bias, eps, add, scale, shift, silu,
                      [&](const NormArguments& args, void* y) {
                        if (args.type == ScalarType::Float) {
                          run<float>(x, args, y);
                        } else if (args.type == ScalarType::BFloat16) {
                          run<BFloat16>(x, args, y);
                        } else {
                          run<Half>(x, args, y);
                        }
                      });
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CUDA, m) {
  m.impl("group_norm_silu", TORCH_BOX(&fused_diffusion::group_norm_silu));
}
