// fused_diffusion::reverse_step on the CPU: one pass over memory, in chunks that stay in the first cache.
#include <torch/csrc/stable/library.h>

#include "common/chunks.h"
#include "philox/math.h"
#include "reverse_step/args.h"
#include "runtime/recorded_calls.h"
#include "simd/dispatch.h"

namespace fused_diffusion {
namespace {

// One step of a batch.
struct ReverseStep {
  StepArguments args;
  StepCoefficients row;
  uint64_t seed;
  uint32_t stream;
};

#define FD_PER_ISA "reverse_step/reverse_step_cpu.h"
#define FD_ISAS FD_ISAS_FLOAT32
#include "simd/foreach_isa.inc"

struct CpuReverseStep {
  void operator()(const StepArguments& args) const {
    const int64_t step = args.counter[0], elements = args.channels * args.positions;
    STD_TORCH_CHECK(step >= 0 && step < args.rows, "step ", step, " is outside of the table's ", args.rows);
    const StepCoefficients row = load_row(args.table, args.rows, step);
    STD_TORCH_CHECK(row.coef_x0_prev == 0.0f || args.has_x0_prev,
                    "row.coef_x0_prev is not 0, so the previous x0 is needed");
    const ReverseStep g{args, row, static_cast<uint64_t>(args.counter[1]),
                        static_cast<uint32_t>(args.counter[2] + step)};
    const auto run = FD_DISPATCH(simd_in_use(), step_chunks);
    parallel_for(0, args.batch * chunks_per_sample(elements), kChunksPerThread,
                 [&](int64_t begin, int64_t end) { run(g, begin, end); });
    if (args.in_place) args.counter[0] = step + 1;
  }
};

std::tuple<Tensor, Tensor> reverse_step(const Tensor& x, const Tensor& model_output,
                                        const std::optional<Tensor>& model_output_uncond,
                                        const std::optional<Tensor>& x0_prev, const std::optional<Tensor>& noise,
                                        const Tensor& table, const Tensor& counter, const Tensor& sample_ids) {
  return checked_step(x, model_output, model_output_uncond, x0_prev, noise, table, counter, sample_ids,
                      CpuReverseStep{});
}

void reverse_step_(const Tensor& x, const Tensor& model_output, const std::optional<Tensor>& model_output_uncond,
                   const std::optional<Tensor>& x0, const std::optional<Tensor>& noise, const Tensor& table,
                   const Tensor& counter, const Tensor& sample_ids, const std::optional<Tensor>& unet_input) {
  const auto launch = [&](const StepArguments& args) {
    run_or_record([args] { CpuReverseStep{}(args); }, x, model_output, model_output_uncond, x0, noise, table, counter,
                  sample_ids, unet_input);
  };
  checked_step_in_place(x, model_output, model_output_uncond, x0, noise, table, counter, sample_ids, unet_input, launch);
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CPU, m) {
  m.impl("reverse_step", TORCH_BOX(&fused_diffusion::reverse_step));
  m.impl("reverse_step_", TORCH_BOX(&fused_diffusion::reverse_step_));
}
