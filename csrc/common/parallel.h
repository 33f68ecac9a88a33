// PyTorch's threads, with exceptions that keep their type.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <vector>

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

// A thread's share of the items, of which it and threads without work take a few at a time.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};
constexpr int64_t kTurnsPerShare = 8;

// run(begin, end) over ranges of the items, on as many threads as leave each at least `work_per_thread`. `work` is that
// of one item, in the same unit. A thread begins with a share of its own, and helps with the others' when that is done:
// processors that share a core's units with strangers differ in speed by a factor of up to four.
template <class Run>
void divide_work(int64_t items, int64_t work, int64_t work_per_thread, const Run& run) {
  const int64_t grain = std::max<int64_t>(1, work_per_thread / std::max<int64_t>(1, work));
  const int64_t count = std::min<int64_t>(torch::stable::get_num_threads(), (items + grain - 1) / grain);
  if (count <= 1) {
    if (items > 0) run(0, items);
    return;
  }
  std::vector<Share> shares(count);
  for (int64_t i = 0; i < count; ++i) {
    shares[i].next.store(items * i / count, std::memory_order_relaxed);
    shares[i].end = items * (i + 1) / count;
  }
  const int64_t turn = std::max<int64_t>((items / count + kTurnsPerShare - 1) / kTurnsPerShare, (grain + 1) / 2);
  parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last + count - 1; ++i) {
      Share& share = shares[i % count];
      for (;;) {
        const int64_t begin = share.next.fetch_add(turn, std::memory_order_relaxed);
        if (begin >= share.end) break;
        run(begin, std::min(begin + turn, share.end));
      }
    }
  });
}

}  // namespace fused_diffusion
