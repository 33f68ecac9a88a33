// group_norm_silu on one instruction set, for group_norm_silu/group_norm_silu.cpp.

#include "simd/exp.h"

#include "group_norm_silu/statistics_cpu.h"
// block_cpu.h uses the statistics.
#include "group_norm_silu/block_cpu.h"
// gradient_cpu.h uses block_cpu.h.
#include "group_norm_silu/gradient_cpu.h"

// ---- The forward pass.

// ahead: distance from x to the same row of the next block, which is prefetched.
template <bool kSilu, class T, class C>
void normalise(const Block<T>& block, C columns, int64_t c, const T* x, T* y, int64_t rows, int64_t stride,
               int64_t ahead) {
  constexpr int kCount = C::kVectorCount, kLine = 64 / static_cast<int>(sizeof(T));
  constexpr int kStep = kLine > kLanes ? kLine / kLanes : 1;  // vectors to a cache line
  Vec centre[kCount], gain[kCount], offset[kCount];
  block.spread_channels(columns, block.channel.centre, c, centre);
  block.spread_channels(columns, block.channel.gain, c, gain);
  block.spread_channels(columns, block.channel.offset, c, offset);
  for (int64_t r = 0; r < rows; ++r, x += stride, y += stride) {
    for (int i = 0; i < kCount; i += kStep) __builtin_prefetch(x + ahead + i * kLanes, 0, 2);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const Vec z = mul_add(columns.read(x, i) - centre[i], gain[i], offset[i]);
      columns.write(y, i, kSilu ? silu<T>(z) : z);
    }
  }
}

template <class T>
void forward(const NormArguments& args, void* y, int64_t groups, double* scratch, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(args.x);
  T* to = static_cast<T*>(y);
  for (int64_t i = begin; i < end; ++i) {
    const Block<T> block(args, groups, scratch, i);
    block.read_parameters();
    block.group_statistics();
    block.map_channels(args.silu ? -kLog2E : 1.0f);
    const int64_t ahead = i + 1 < end ? Block<T>(args, groups, scratch, i + 1).at - block.at : 0;
    block.each_part(kPartRows, [&](auto columns, int64_t c, int64_t at, int64_t rows, int64_t stride) FD_INLINE {
      if (args.silu) {
        normalise<true>(block, columns, c, x + at, to + at, rows, stride, ahead);
      } else {
        normalise<false>(block, columns, c, x + at, to + at, rows, stride, ahead);
      }
    });
  }
}

// The affine maps alone, [3, N, C], or with bounds [4, N, C]: centre, gain and offset of the activation's input. Gain
// and offset are times -log2(e) where the activation is SiLU.
template <class T>
void affine_maps(const NormArguments& args, float* to, int64_t groups, double* scratch, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Block<T> block(args, groups, scratch, i);
    block.read_parameters();
    block.group_statistics();
    block.map_channels(args.silu ? -kLog2E : 1.0f);
    const int64_t step = args.samples * args.channels, at = block.sample * args.channels + block.first_channel();
    for (int64_t c = 0; c < block.width; ++c) {
      to[at + c] = block.channel.centre[c];
      to[at + c + step] = block.channel.gain[c];
      to[at + c + 2 * step] = block.channel.offset[c];
    }
    if (args.bounded) block.bound_channels(to + at + 3 * step);
  }
}

template <class T>
NormKernels kernels_of() {
  return {forward<T>, backward<T>, affine_maps<T>};
}
