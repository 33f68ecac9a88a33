// PyTorch's threads, with exceptions that keep their type.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <mutex>

namespace fused_diffusion {

// torch::stable::parallel_for, which turns an exception of `f` into a std::runtime_error without its text. Here the
// first exception of any thread reaches the caller as it was thrown.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  std::exception_ptr first;
  std::mutex mutex;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) {
    try {
      f(from, to);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (first == nullptr) first = std::current_exception();
    }
  });
  if (first != nullptr) std::rethrow_exception(first);
}

// run(begin, end) over ranges of the items, on as many threads as leave each at least `work_per_thread`. `work` is that
// of one item, in the same unit.
template <class Run>
void divide_work(int64_t items, int64_t work, int64_t work_per_thread, const Run& run) {
  parallel_for(0, items, std::max<int64_t>(1, work_per_thread / std::max<int64_t>(1, work)), run);
}

}  // namespace fused_diffusion
