// reverse_step on one instruction set, for reverse_step/reverse_step.cpp.

#include "philox/noise_cpu.h"

// Calls run(first, offset, size) for each stretch of a chunk whose elements are `layout.position` apart in memory:
// `size` elements from element `first` of the chunk on, at `offset` of the tensor.
template <class Run>
FD_HD void each_stretch(const Chunk& chunk, int64_t positions, const ImageLayout& layout, const Run& run) {
  if (layout.position == 1 && layout.channel == positions) {
    return run(int64_t{0}, chunk.sample * layout.sample + chunk.first, chunk.size);
  }
  int64_t channel = chunk.first / positions, position = chunk.first % positions;
  for (int64_t done = 0; done < chunk.size;) {
    const int64_t remaining = chunk.size - done, room = positions - position;
    const int64_t size = remaining < room ? remaining : room;
    run(done, chunk.sample * layout.sample + channel * layout.channel + position * layout.position, size);
    done += size;
    position = 0;
    ++channel;
  }
}

// The step of one chunk at a time, in buffers that stay in the first cache.
struct ReverseStepKernel : ReverseStep {
  FD_HD void run(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) step_chunk(chunk_at(i, args.channels * args.positions));
  }

  FD_HD void step_chunk(const Chunk& chunk) const {
    const int64_t size = chunk.size, at = chunk.sample * args.channels * args.positions + chunk.first;
    alignas(64) float x[kChunkElements], out[kChunkElements], x0[kChunkElements];
    memcpy(x, args.x + at, size * sizeof(float));
    load_output(out, args.cond, chunk, 0);
    if (args.uncond != nullptr) {
      alignas(64) float uncond[kChunkElements];
      load_output(uncond, args.uncond, chunk, 0);
      for (int64_t i = 0; i < size; ++i) out[i] = guide(out[i], uncond[i], row);
    }
    for (int64_t i = 0; i < size; ++i) {
      x0[i] = predict_x0(x[i], out[i], row);
      x[i] = drift(x[i], x0[i], out[i], row);
    }
    if (row.coef_x0_prev != 0.0f) {
      const float* __restrict x0_prev = args.x0_prev + at;
      for (int64_t i = 0; i < size; ++i) x[i] += row.coef_x0_prev * x0_prev[i];
    }
    if (row.sigma != 0.0f) add_noise(chunk, x, at);
    memcpy(args.x_next + at, x, size * sizeof(float));
    if (args.x0 != nullptr) memcpy(args.x0 + at, x0, size * sizeof(float));
    if (args.unet_input != nullptr) store_input(x, chunk);
  }

  FD_HD void add_noise(const Chunk& chunk, float* __restrict x, int64_t at) const {
    alignas(64) float z[kChunkElements];
    if (args.noise != nullptr) {
      memcpy(z, args.noise + at, chunk.size * sizeof(float));
    } else {
      normal_chunk(z, chunk, stream, static_cast<uint64_t>(args.sample_ids[chunk.sample]), seed);
    }
    if (args.learned_variance) {
      alignas(64) float v[kChunkElements];
      load_output(v, args.cond, chunk, args.channels * args.output.channel);
      for (int64_t i = 0; i < chunk.size; ++i) x[i] += learned_sigma<Scalar>(v[i], row) * z[i];
    } else {
      for (int64_t i = 0; i < chunk.size; ++i) x[i] += row.sigma * z[i];
    }
  }

  // A chunk of the model's output, `offset` elements further on.
  FD_HD void load_output(float* to, const void* from, const Chunk& chunk, int64_t offset) const {
    if (args.output_type == Type::float32) return load_as(to, static_cast<const float*>(from) + offset, chunk);
    if (args.output_type == Type::float16) return load_as(to, static_cast<const Half*>(from) + offset, chunk);
    load_as(to, static_cast<const BFloat16*>(from) + offset, chunk);
  }

  template <class T>
  FD_HD void load_as(float* __restrict to, const T* __restrict from, const Chunk& chunk) const {
    const int64_t step = args.output.position;
    each_stretch(chunk, args.positions, args.output, [&](int64_t first, int64_t offset, int64_t size) FD_INLINE {
      if (step == 1) {
        for (int64_t i = 0; i < size; ++i) to[first + i] = to_float(from[offset + i]);
      } else {
        for (int64_t i = 0; i < size; ++i) to[first + i] = to_float(from[offset + i * step]);
      }
    });
  }

  FD_HD void store_input(const float* from, const Chunk& chunk) const {
    if (args.input_type == Type::float32) return store_as(static_cast<float*>(args.unet_input), from, chunk);
    if (args.input_type == Type::float16) return store_as(static_cast<Half*>(args.unet_input), from, chunk);
    store_as(static_cast<BFloat16*>(args.unet_input), from, chunk);
  }

  template <class T>
  FD_HD void store_as(T* __restrict to, const float* __restrict from, const Chunk& chunk) const {
    const int64_t step = args.input.position;
    for (int64_t replica = 0; replica < args.replicas; ++replica, to += args.batch * args.input.sample) {
      each_stretch(chunk, args.positions, args.input, [&](int64_t first, int64_t offset, int64_t size) FD_INLINE {
        if (step == 1) {
          for (int64_t i = 0; i < size; ++i) from_float(from[first + i], to[offset + i]);
        } else {
          for (int64_t i = 0; i < size; ++i) from_float(from[first + i], to[offset + i * step]);
        }
      });
    }
  }
};

// Items: chunks.
inline void step_chunks(const ReverseStep& step, int64_t begin, int64_t end) {
  const ReverseStepKernel kernel{step};
  kernel.run(begin, end);
}
