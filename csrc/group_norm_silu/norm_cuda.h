// How CUDA's group_norm_silu divides its work. A block works on a tile: positions of some whole groups of one sample.
//
// A tile is rows of packs of 16 bytes; a row is a position in channels_last, else a channel. A thread owns fixed lines
// of packs: columns of the tile in channels_last, so that its channels stay the same, and segments of a row otherwise.
// So the same code serves both layouts, with the numbers of kChannels channels in registers.
#pragma once

#include "cuda/launch.h"
#include "cuda/tensor_core.h"
#include "group_norm_silu/args.h"

namespace fused_diffusion {

constexpr int kWarp = 32;

// How a launch divides the tensor: each block has `groups` groups and one of `chunks` chunks of `chunk` positions,
// which it loads into shared memory `tile` positions at a time. vector: whether all packs of 16 bytes are aligned and
// within a row.
struct Division {
  int64_t chunk, tile;
  int chunks, groups, group_blocks, threads;
  bool vector;

  int64_t blocks(const NormArguments& args) const { return args.samples * chunks * group_blocks; }
};

template <class T>
constexpr int kPack = 16 / sizeof(T);

template <class T>
struct Pack {
  T items[kPack<T>];
};

struct alignas(16) Bytes16 {
  uint32_t words[4];
};

template <class T>
__device__ __forceinline__ Pack<T> load_aligned(const T* from) {
  return bit_cast<Pack<T>>(*reinterpret_cast<const Bytes16*>(from));
}

template <class T>
__device__ __forceinline__ void store_aligned(T* to, const Pack<T>& pack) {
  *reinterpret_cast<Bytes16*>(to) = bit_cast<Bytes16>(pack);
}

// The first `count` of a pack's numbers exist, or all if there are more; the others are 0.
template <class T>
__device__ __forceinline__ Pack<T> load(const T* from, int count, bool vector) {
  if (vector) return load_aligned(from);
  Pack<T> pack;
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) pack.items[j] = j < count ? from[j] : T{};
  return pack;
}

template <class T>
__device__ __forceinline__ void store(T* to, const Pack<T>& pack, int count, bool vector) {
  if (vector) return store_aligned(to, pack);
#pragma unroll
  for (int j = 0; j < kPack<T>; ++j) {
    if (j < count) to[j] = pack.items[j];
  }
}

// The packs of a thread along one line, number 0 to count - 1: how many items pack i has before the row's end, its
// offset in the tile's copy in shared memory, and its offset in the tensor.
struct Line {
  int count, items, items_step, copy, copy_step;
  int64_t at, step;
  bool exists;

  __device__ int items_of(int i) const { return items - i * items_step; }
  __device__ int copy_of(int i) const { return copy + i * copy_step; }
  __device__ int64_t at_of(int i) const { return at + i * step; }
};

// How `threads` threads, a power of two, divide rows of packs: `across` threads along a row, `down` rows at a time.
// room: the number of partial sums of a channel, one for each thread or warp that has a part of it.
struct Threads {
  int across, down, room;

  FD_HD Threads(bool channels_last, int rows, int packs, int threads) : across(1) {
    if (channels_last) {
      across = packs < threads ? packs : threads;
      down = threads / across;
      room = down | 1;  // odd, to avoid conflicts of shared memory's banks
    } else {
      while (across < packs && across < threads && (across < kWarp || across * rows < threads)) across *= 2;
      down = threads / across;
      room = across > kWarp ? across / kWarp : 1;  // a warp first adds up the parts of its threads
    }
  }
};

template <class T, bool kChannelsLast>
struct NormTile {
  static constexpr int kChannels = kChannelsLast ? kPack<T> : 1;  // channels that a pack holds

  int64_t sample, at, row_stride;
  int chunk, first_group, groups, group_size, first_channel, width, rows, row, packs;

  // The positions of this block's chunk.
  __device__ NormTile(const NormArguments& args, const Division& division) {
    const int64_t block = blockIdx.x / division.group_blocks;
    first_group = static_cast<int>(blockIdx.x % division.group_blocks) * division.groups;
    sample = block / division.chunks;
    chunk = static_cast<int>(block % division.chunks);
    group_size = static_cast<int>(args.group_size());
    groups = static_cast<int>(args.groups) - first_group;
    if (groups > division.groups) groups = division.groups;
    first_channel = first_group * group_size;
    width = groups * group_size;
    row_stride = kChannelsLast ? args.channels : args.positions;
    take(args, chunk * division.chunk, division.chunk);
  }

  // Moves the tile to other positions: from `first` on, at most `count` of them.
  __device__ void take(const NormArguments& args, int64_t first, int64_t count) {
    const int64_t remaining = args.positions - first;
    const int positions = static_cast<int>(remaining < count ? remaining : count);
    at = sample * args.channels * args.positions +
         (kChannelsLast ? first * args.channels + first_channel : first_channel * args.positions + first);
    rows = kChannelsLast ? positions : width;
    row = kChannelsLast ? width : positions;
    packs = (row + kPack<T> - 1) / kPack<T>;
  }

  __device__ int positions() const { return kChannelsLast ? rows : row; }

  __device__ int padded_width() const { return (width + kPack<T> - 1) / kPack<T> * kPack<T>; }

  __device__ Threads threads() const { return Threads(kChannelsLast, rows, packs, blockDim.x); }

  // Calls pass(first channel, line) for each of the thread's lines. All threads of a warp have equally many.
  template <class Pass>
  __device__ __forceinline__ void each_line(const Pass& pass) const {
    const int across = threads().across, down = threads().down;
    const int first_row = threadIdx.x / across, pack = threadIdx.x % across, item = pack * kPack<T>;
    if constexpr (kChannelsLast) {
      if (first_row >= down) return;
      for (int c = item; c < row; c += across * kPack<T>) {
        pass(c, Line{(rows - first_row + down - 1) / down, row - c, 0, first_row * packs * kPack<T> + c,
                     down * packs * kPack<T>, at + first_row * row_stride + c, down * row_stride, true});
      }
    } else {
      for (int first = 0; first < rows; first += down) {
        const bool exists = first + first_row < rows;
        const int r = exists ? first + first_row : rows - 1;
        pass(r, Line{exists ? (packs - pack + across - 1) / across : 0, row - item, across * kPack<T>,
                     r * packs * kPack<T> + item, across * kPack<T>, at + r * row_stride + item, across * kPack<T>,
                     exists});
      }
    }
  }

  // Calls each(j) for every number of a pack that exists. In channels_last also for those beyond the row's end: they
  // count as channels whose sums are not read.
  template <class Each>
  static __device__ __forceinline__ void each_item(int count, const Each& each) {
    if (kChannelsLast || count >= kPack<T>) {
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) each(j);
    } else {
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) {
        if (j < count) each(j);
      }
    }
  }

  // A line's channels' values, from an array that is padded to whole packs.
  static __device__ __forceinline__ void read(const float* from, int channel, float (&to)[kChannels]) {
#pragma unroll
    for (int j = 0; j < kChannels; ++j) to[j] = from[channel + j];
  }

  // Stores a line's sums for each of its channels: partial is [width][room].
  __device__ __forceinline__ void store_partial_sums(float* partial, int channel, const Line& line,
                                                     float (&sums)[kChannels]) const {
    const Threads t = threads();
    if constexpr (kChannelsLast) {
      const int lane = threadIdx.x / t.across;
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        if (channel + j < width) {
          partial[(channel + j) * t.room + lane] = sums[j];
          if (lane == 0 && t.room > t.down) partial[(channel + j) * t.room + t.down] = 0.0f;
        }
      }
    } else {
      const int team = t.across < kWarp ? t.across : kWarp;
      for (int offset = team / 2; offset > 0; offset /= 2) sums[0] += __shfl_xor_sync(~0u, sums[0], offset);
      if (line.exists && threadIdx.x % team == 0) partial[channel * t.room + threadIdx.x % t.across / kWarp] = sums[0];
    }
  }
};

// The sum over each team of `team` consecutive threads, a power of two. All threads of the block must call it.
__device__ __forceinline__ double team_sum(double value, int team, double* warps) {
  for (int offset = (team < kWarp ? team : kWarp) / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(~0u, value, offset);
  }
  if (team <= kWarp) return value;
  __syncthreads();
  if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  const int first = threadIdx.x / team * (team / kWarp);
  double sum = 0;
  for (int i = 0; i < team / kWarp; ++i) sum += warps[first + i];
  return sum;
}

// Calls put(run, sum of value(run, i) over i < length) for each of `runs` runs, in one thread each. Synchronises the
// block before and after, so that `value` may read what any thread wrote, and any thread what `put` wrote.
template <class Value, class Put>
__device__ __forceinline__ void sum_runs(int runs, int length, double* warps, const Value& value, const Put& put) {
  const int threads = blockDim.x, me = threadIdx.x;
  int team = threads;  // as many teams as there are runs
  while (team > 1 && team / 2 * runs >= threads) team /= 2;
  while (team > 1 && threads / team < runs) team /= 2;
  __syncthreads();
  for (int first = 0; first < runs; first += threads / team) {
    const int run = first + me / team;
    double sum = 0;
    if (run < runs) {
      for (int i = me % team; i < length; i += team) sum += value(run, i);
    }
    sum = team_sum(sum, team, warps);
    if (run < runs && me % team == 0) put(run, sum);
  }
  __syncthreads();
}

// z = xhat * slope + intercept, for the normalised xhat.
struct Affine {
  float slope, intercept;
};

__device__ __forceinline__ Affine affine(const NormArguments& args, int64_t n, int64_t c) {
  const float scale = 1.0f + args.scale.at(n, c);
  return {args.weight.at(n, c) * scale, args.bias.at(n, c) * scale + args.shift.at(n, c)};
}

// a / b; the sigmoid 1 / (1 + e^-z) is quotient(1, one_plus_exp(z)). Both are approximate where T has 16 bits.
template <class T>
__device__ __forceinline__ float quotient(float a, float b) {
  return sizeof(T) == 4 ? a / b : a * approximate_reciprocal(b);
}

template <class T>
__device__ __forceinline__ float one_plus_exp(float z) {
  return 1.0f + (sizeof(T) == 4 ? expf(-z) : approximate_exp2(z * -1.44269504f));
}

// The numbers of a pack, rounded to T.
template <class T>
__device__ __forceinline__ Pack<T> rounded(const float (&values)[kPack<T>]) {
  Bytes16 bytes;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if constexpr (sizeof(T) == 2) {
      bytes.words[k] = round_pair(values[2 * k], values[2 * k + 1], T{});
    } else {
      bytes.words[k] = bit_cast<uint32_t>(values[k]);
    }
  }
  return bit_cast<Pack<T>>(bytes);
}

// Hands out memory from its front, in multiples of 16 bytes. Begun at a null pointer, it only counts bytes. A pointer, so
// that accesses are known to be of shared memory.
struct SharedAllocator {
  unsigned char* at;

  template <class T>
  FD_HD T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(at);
    at += (count * sizeof(T) + 15) / 16 * 16;
    return taken;
  }
};

// ---- The host's side.

constexpr int64_t kTileBytes = 32 << 10;   // so that several blocks fit on a multiprocessor
constexpr int64_t kChunkBytes = 16 << 10;  // below this a block does not pay
constexpr int64_t kSectorBytes = 32;       // the smallest transfer of memory
constexpr int64_t kMinWidth = 16;          // channels of a block in channels_last
constexpr int64_t kMaxChunks = 256;

// The numbers that a tile's shared memory depends on. packs: of the whole tile.
template <class T>
struct TileShape {
  int64_t packs;
  int width, room;

  TileShape(const NormArguments& args, int64_t groups, int64_t positions, int threads) {
    const int64_t channels = groups * args.group_size(), pack = kPack<T>;
    const int64_t rows = args.channels_last ? positions : channels;
    const int64_t row = divide_up(args.channels_last ? channels : positions, pack);
    width = static_cast<int>(divide_up(channels, pack) * pack);
    room = Threads(args.channels_last, static_cast<int>(rows), static_cast<int>(row), threads).room;
    packs = rows * row;
  }
};

struct Device {
  int64_t processors, shared;  // multiprocessors, and bytes of shared memory that a block may have
};

inline Device device_limits() { return {multiprocessors(), most_shared_memory()}; }

// The most of of_groups(number of groups) over all blocks. The last block may have fewer groups than the others, and
// more threads, and so partial sums, for each of their channels.
template <class OfGroups>
size_t most_of_blocks(const NormArguments& args, int64_t groups, const OfGroups& of_groups) {
  const int64_t rest = args.groups % groups;
  return rest == 0 ? of_groups(groups) : std::max(of_groups(groups), of_groups(rest));
}

// More threads to a block where there are few blocks, or few fit on a multiprocessor.
inline int threads_for(int64_t tile_bytes, int64_t blocks, int max_threads, const Device& device) {
  int threads = 256;
  const bool few = blocks < 2 * device.processors;
  while (threads < max_threads && (few || tile_bytes > threads * 192) && tile_bytes / 16 >= 4 * threads) threads *= 2;
  return threads;
}

// The smallest number of groups with at least kMinWidth channels, or all groups, whose rows are multiples of `unit`.
inline int64_t min_groups(const NormArguments& args, int64_t unit) {
  const int64_t size = args.group_size();
  int64_t step = 1;
  while (step < unit && step * size % unit != 0) ++step;
  return std::min(args.groups, divide_up(divide_up(kMinWidth, size), step) * step);
}

// A tile holds all positions if bytes(groups, positions, threads) fit in a block's shared memory. Otherwise, or if so
// few tiles would leave the device idle, positions are divided into chunks. element: bytes of a tile for each number.
template <class T, class Bytes>
Division divide(const NormArguments& args, int64_t element, int max_threads, const Device& device, bool aligned,
                const Bytes& bytes) {
  const int64_t size = args.group_size(), positions = args.positions, pack = kPack<T>;
  const bool last = args.channels_last;
  const auto blocks = [&](int64_t groups) { return args.samples * divide_up(args.groups, groups); };
  const auto tile_bytes = [&](int64_t groups) { return groups * size * positions * element; };
  const auto threads = [&](int64_t groups) {
    return threads_for(tile_bytes(groups), blocks(groups), max_threads, device);
  };
  const auto fits = [&](int64_t groups) { return bytes(groups, positions, threads(groups)) <= device.shared; };

  const int64_t sector = kSectorBytes / static_cast<int64_t>(sizeof(T));
  int64_t groups = 1;
  if (last) {
    groups = min_groups(args, args.channels % sector == 0 ? sector : 1);
    const int64_t fewer = min_groups(args, args.channels % pack == 0 ? pack : 1);
    if (!fits(groups) && fits(fewer)) groups = fewer;
  }
  const bool whole = fits(groups);
  while (2 * groups <= args.groups && tile_bytes(2 * groups) <= kTileBytes && fits(2 * groups) &&
         blocks(2 * groups) >= 2 * device.processors) {
    groups *= 2;
  }
  const bool idle = 2 * blocks(groups) <= device.processors && tile_bytes(groups) >= 4 * kChunkBytes;
  Division division{
      positions,       positions, 1, static_cast<int>(groups), static_cast<int>(divide_up(args.groups, groups)),
      threads(groups), false};
  if (!whole || idle) {
    const int64_t wanted = divide_up(whole ? device.processors : 4 * device.processors, blocks(groups));
    const int64_t chunks = std::min(std::min(wanted, kMaxChunks), tile_bytes(groups) / kChunkBytes);
    // A multiple of a pack, which matters where positions are consecutive in memory.
    division.chunk = std::min(positions, divide_up(divide_up(positions, std::max<int64_t>(chunks, 1)), pack) * pack);
    division.chunks = static_cast<int>(divide_up(positions, division.chunk));
    division.threads = 256;
    const int64_t step = last ? 1 : pack, fitting = std::max<int64_t>(kTileBytes / (groups * size * element), 1);
    division.tile = divide_up(std::min(division.chunk, fitting), step) * step;
    while (division.tile > step && bytes(groups, division.tile, division.threads) > device.shared)
      division.tile -= step;
  }
  const int64_t row = last ? groups * size : division.chunk, whole_row = last ? args.channels : positions;
  division.vector = aligned && whole_row % pack == 0 && (row == whole_row || row % pack == 0);
  return division;
}

inline void check_group_size(const NormArguments& args) {
  STD_TORCH_CHECK(args.group_size() <= kMaxCudaGroupSize, "a group has ", args.group_size(), " channels, more than ",
                  kMaxCudaGroupSize);
}

inline unsigned grid_of(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= INT32_MAX, "x is too large: it takes ", blocks, " blocks");
  return static_cast<unsigned>(blocks);
}

inline bool aligned_16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace fused_diffusion
