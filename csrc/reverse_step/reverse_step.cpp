// fused_diffusion::reverse_step on the CPU: one pass over memory, in tiles that stay in the first cache.
#include <torch/csrc/stable/library.h>

#include "simd/dispatch.h"
#include "reverse_step/args.h"

namespace fused_diffusion {
namespace {

// Calls run(first, offset, size) for each stretch of a tile whose elements lie `layout.position` apart; first
// counts from the tile's start, offset is in memory.
template <class Run>
FD_HD void each_stretch(const Tile& tile, int64_t positions, const Layout& layout, const Run& run) {
  if (layout.position == 1 && layout.channel == positions) {
    return run(int64_t{0}, tile.sample * layout.sample + tile.first, tile.size);
  }
  int64_t channel = tile.first / positions, position = tile.first % positions;
  for (int64_t done = 0; done < tile.size;) {
    const int64_t left = tile.size - done, room = positions - position, size = left < room ? left : room;
    run(done, tile.sample * layout.sample + channel * layout.channel + position * layout.position, size);
    done += size;
    position = 0;
    ++channel;
  }
}

struct ReverseStep {
  StepArguments args;
  StepCoefficients row;
  uint64_t seed;
  uint32_t stream;

  template <class M>
  FD_HD void run(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) step_tile<M>(tile_at(i, args.channels * args.positions));
  }

  template <class M>
  FD_HD void step_tile(const Tile& tile) const {
    const int64_t size = tile.size, at = tile.sample * args.channels * args.positions + tile.first;
    alignas(64) float x[kTile], out[kTile], x0[kTile];
    memcpy(x, args.x + at, size * sizeof(float));
    load(out, args.cond, tile, 0);
    if (args.uncond != nullptr) {
      alignas(64) float uncond[kTile];
      load(uncond, args.uncond, tile, 0);
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
    if (row.sigma != 0.0f) add_noise<M>(tile, x, at);
    memcpy(args.x_next + at, x, size * sizeof(float));
    if (args.x0 != nullptr) memcpy(args.x0 + at, x0, size * sizeof(float));
    if (args.unet_input != nullptr) store_input(x, tile);
  }

  template <class M>
  FD_HD void add_noise(const Tile& tile, float* __restrict x, int64_t at) const {
    alignas(64) float z[kTile];
    if (args.noise != nullptr) {
      memcpy(z, args.noise + at, tile.size * sizeof(float));
    } else {
      normal_tile<M>(z, tile, stream, static_cast<uint64_t>(args.sample_ids[tile.sample]), seed);
    }
    if (args.learned_variance) {
      alignas(64) float v[kTile];
      load(v, args.cond, tile, args.channels * args.output.channel);
      for (int64_t i = 0; i < tile.size; ++i) x[i] += learned_sigma<M>(v[i], row) * z[i];
    } else {
      for (int64_t i = 0; i < tile.size; ++i) x[i] += row.sigma * z[i];
    }
  }

  // A tile of the model's output, `offset` elements further on.
  FD_HD void load(float* to, const void* from, const Tile& tile, int64_t offset) const {
    if (args.output_type == Type::float32) return load_as(to, static_cast<const float*>(from) + offset, tile);
    if (args.output_type == Type::float16) return load_as(to, static_cast<const Half*>(from) + offset, tile);
    load_as(to, static_cast<const BFloat16*>(from) + offset, tile);
  }

  template <class T>
  FD_HD void load_as(float* __restrict to, const T* __restrict from, const Tile& tile) const {
    const int64_t step = args.output.position;
    each_stretch(tile, args.positions, args.output, [&](int64_t first, int64_t offset, int64_t size) FD_INLINE {
      if (step == 1) {
        for (int64_t i = 0; i < size; ++i) to[first + i] = to_float(from[offset + i]);
      } else {
        for (int64_t i = 0; i < size; ++i) to[first + i] = to_float(from[offset + i * step]);
      }
    });
  }

  FD_HD void store_input(const float* from, const Tile& tile) const {
    if (args.input_type == Type::float32) return store_as(static_cast<float*>(args.unet_input), from, tile);
    if (args.input_type == Type::float16) return store_as(static_cast<Half*>(args.unet_input), from, tile);
    store_as(static_cast<BFloat16*>(args.unet_input), from, tile);
  }

  template <class T>
  FD_HD void store_as(T* __restrict to, const float* __restrict from, const Tile& tile) const {
    const int64_t step = args.input.position;
    for (int64_t copy = 0; copy < args.copies; ++copy, to += args.batch * args.input.sample) {
      each_stretch(tile, args.positions, args.input, [&](int64_t first, int64_t offset, int64_t size) FD_INLINE {
        if (step == 1) {
          for (int64_t i = 0; i < size; ++i) from_float(from[first + i], to[offset + i]);
        } else {
          for (int64_t i = 0; i < size; ++i) from_float(from[first + i], to[offset + i * step]);
        }
      });
    }
  }
};

struct Launch {
  void operator()(const StepArguments& args) const {
    const int64_t step = args.counter[0], elements = args.channels * args.positions;
    STD_TORCH_CHECK(step >= 0 && step < args.rows, "step ", step, " is outside of the table's ", args.rows);
    const StepCoefficients row = load_row(args.table, args.rows, step);
    STD_TORCH_CHECK(row.coef_x0_prev == 0.0f || args.has_x0_prev,
                    "row.coef_x0_prev is not 0, so the previous x0 is needed");
    const ReverseStep kernel{args, row, static_cast<uint64_t>(args.counter[1]),
                             static_cast<uint32_t>(args.counter[2] + step)};
    run_tiles(kernel, args.batch * tiles_per_sample(elements));
    if (args.in_place) args.counter[0] = step + 1;
  }
};

std::tuple<Tensor, Tensor> reverse_step(const Tensor& x, const Tensor& model_output,
                                        const std::optional<Tensor>& model_output_uncond,
                                        const std::optional<Tensor>& x0_prev,
                                        const std::optional<Tensor>& noise, const Tensor& table,
                                        const Tensor& counter, const Tensor& sample_ids) {
  return checked_step(x, model_output, model_output_uncond, x0_prev, noise, table, counter, sample_ids,
                      Launch{});
}

void reverse_step_(const Tensor& x, const Tensor& model_output, const std::optional<Tensor>& model_output_uncond,
                   const std::optional<Tensor>& x0, const std::optional<Tensor>& noise, const Tensor& table,
                   const Tensor& counter, const Tensor& sample_ids, const std::optional<Tensor>& unet_input) {
  checked_step_in_place(x, model_output, model_output_uncond, x0, noise, table, counter, sample_ids, unet_input,
                        Launch{});
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CPU, m) {
  m.impl("reverse_step", TORCH_BOX(&fused_diffusion::reverse_step));
  m.impl("reverse_step_", TORCH_BOX(&fused_diffusion::reverse_step_));
}
