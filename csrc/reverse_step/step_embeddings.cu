// fused_diffusion::step_embeddings_ on CUDA: one thread for 16 or 4 bytes of an image's row.
#include "reverse_step/step_embeddings.h"

#include <torch/csrc/stable/library.h>

#include "cuda/launch.h"

namespace fused_diffusion {
namespace {

using torch::stable::Tensor;

struct alignas(16) Words16 {
  uint32_t words[4];
};

template <class Word>
__device__ __forceinline__ Word of_ones() {
  Word word;
  for (size_t i = 0; i < sizeof(Word) / 4; ++i) reinterpret_cast<uint32_t*>(&word)[i] = ~0u;
  return word;
}

// The step is read on the device, so that one captured graph serves every step. A row of a label that does not exist is
// NaN, since a kernel cannot refuse it.
template <class Word>
__global__ void __launch_bounds__(kThreads) step_embeddings_kernel(const EmbeddingArguments args) {
  const int64_t words = args.row / static_cast<int64_t>(sizeof(Word));
  const int64_t step = (*args.step % args.steps + args.steps) % args.steps;
  for (int64_t image = blockIdx.y; image < args.images; image += gridDim.y) {
    const int64_t label = args.label_index[image];
    const bool exists = label >= 0 && label < args.labels;
    const Word* from = reinterpret_cast<const Word*>(args.embeddings) + (step * args.labels + label) * words;
    Word* to = reinterpret_cast<Word*>(args.out) + image * words;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < words; i += stride) {
      to[i] = exists ? from[i] : of_ones<Word>();
    }
  }
}

template <class Word>
void run(const EmbeddingArguments& args, cudaStream_t stream) {
  const int64_t words = args.row / static_cast<int64_t>(sizeof(Word));
  launch(step_embeddings_kernel<Word>, grid_for(args.images, words), kThreads, 0, stream, args);
}

void step_embeddings_(const Tensor& embeddings, const Tensor& counter, const Tensor& label_index, Tensor out) {
  const EmbeddingArguments args = embedding_arguments(embeddings, counter, label_index, out);
  STD_TORCH_CHECK(embeddings.element_size() % 4 == 0, "embeddings must be float32 or float64");
  if (args.images == 0 || args.row == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(embeddings.get_device_index());
  const cudaStream_t stream = current_stream(embeddings);
  const auto in_16 = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  if (args.row % 16 == 0 && in_16(args.embeddings) && in_16(args.out)) return run<Words16>(args, stream);
  run<uint32_t>(args, stream);
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CUDA, m) {
  m.impl("step_embeddings_", TORCH_BOX(&fused_diffusion::step_embeddings_));
}
