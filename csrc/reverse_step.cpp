// fused_diffusion::reverse_step on the CPU: one pass over memory, in tiles that stay in the first cache.
#include <torch/csrc/stable/library.h>

#include "cpu.h"
#include "step_arguments.h"

namespace fused_diffusion {
namespace {

struct ReverseStep {
  StepArguments args;
  Row row;
  uint64_t seed;
  uint32_t stream;

  template <class M>
  FD_HD void run(int64_t begin, int64_t end) const {
    for (int64_t index = begin; index < end; ++index) step_tile<M>(tile_at(index, args.elements));
  }

  template <class M>
  FD_HD void step_tile(const Tile& tile) const {
    const int64_t size = tile.size, at = tile.sample * args.elements + tile.first;
    const int64_t out_at = args.learned_variance ? at + tile.sample * args.elements : at;
    const float* __restrict x = args.x + at;
    float* __restrict x_next = args.x_next + at;
    float* __restrict x0 = args.x0 + at;
    alignas(64) float out[kTile];

    load(out, args.cond, out_at, size);
    if (args.uncond != nullptr) {
      alignas(64) float uncond[kTile];
      load(uncond, args.uncond, out_at, size);
      for (int64_t i = 0; i < size; ++i) out[i] = guide(out[i], uncond[i], row);
    }
    for (int64_t i = 0; i < size; ++i) {
      x0[i] = predict_x0(x[i], out[i], row);
      x_next[i] = drift(x[i], x0[i], out[i], row);
    }
    if (row.d != 0.0f) {
      const float* __restrict x0_prev = args.x0_prev + at;
      for (int64_t i = 0; i < size; ++i) x_next[i] += row.d * x0_prev[i];
    }
    if (row.s != 0.0f) add_noise<M>(tile, x_next, at, out_at);
  }

  template <class M>
  FD_HD void add_noise(const Tile& tile, float* __restrict x_next, int64_t at, int64_t out_at) const {
    alignas(64) float z[kTile];
    if (args.noise != nullptr) {
      memcpy(z, args.noise + at, tile.size * sizeof(float));
    } else {
      normal_tile<M>(z, tile, stream, static_cast<uint64_t>(args.sample_ids[tile.sample]), seed);
    }
    if (args.learned_variance) {
      alignas(64) float v[kTile];
      load(v, args.cond, out_at + args.elements, tile.size);
      for (int64_t i = 0; i < tile.size; ++i) x_next[i] += learned_sigma<M>(v[i], row) * z[i];
    } else {
      for (int64_t i = 0; i < tile.size; ++i) x_next[i] += row.s * z[i];
    }
  }

  FD_HD void load(float* to, const void* from, int64_t at, int64_t size) const {
    if (args.output_type == OutputType::float32) {
      convert(to, static_cast<const float*>(from) + at, size);
    } else if (args.output_type == OutputType::bfloat16) {
      convert(to, static_cast<const BFloat16*>(from) + at, size);
    } else {
      convert(to, static_cast<const Half*>(from) + at, size);
    }
  }

  template <class T>
  static FD_HD void convert(float* __restrict to, const T* __restrict from, int64_t size) {
    for (int64_t i = 0; i < size; ++i) to[i] = to_float(from[i]);
  }
};

struct Launch {
  void operator()(const StepArguments& args) const {
    const int64_t step = args.counter[0];
    STD_TORCH_CHECK(step >= 0 && step < args.rows, "step ", step, " is outside of the table's ", args.rows);
    const Row row = load_row(args.table, args.rows, step);
    STD_TORCH_CHECK(row.d == 0.0f || args.x0_prev != nullptr, "row.d is not 0, so x0_prev is needed");
    const ReverseStep kernel{args, row, static_cast<uint64_t>(args.counter[1]),
                                static_cast<uint32_t>(args.counter[2] + step)};
    run_tiles(kernel, args.batch * tiles_per_sample(args.elements));
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

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CPU, m) {
  m.impl("reverse_step", TORCH_BOX(&fused_diffusion::reverse_step));
}
