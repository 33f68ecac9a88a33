// Calls of operators on tensors that stay where they are, recorded once and run many times: checking a call's arguments
// takes longer than a small call.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

namespace fused_diffusion {

// Every method may be called from any thread, but `end` only from the thread that called `begin`.
class RecordedCalls : public std::enable_shared_from_this<RecordedCalls> {
 public:
  // From now on, operators that support recording add their calls here instead of running them, in this thread alone.
  // Recordings nest. std::runtime_error: this object has recorded before.
  void begin();

  // failed: whether the recording was cut short by an exception, so that its calls must not run.
  // std::runtime_error: another recording is this thread's innermost one.
  void end(bool failed);

  void add(std::function<void()> call);
  int64_t size() const;

  // Runs the calls in their order; two threads take turns. Within another recording of the thread, they become a call
  // of that. Throws what a call throws; no further call has run then. std::runtime_error: it is incomplete.
  void run();

 private:
  enum class State { empty, recording, complete, failed };

  std::mutex running_;
  mutable std::mutex mutex_;  // for state_, and for calls_ up to State::complete
  State state_ = State::empty;
  std::vector<std::function<void()>> calls_;
};

RecordedCalls* innermost_recording();  // this thread's, or null

// For an operator that has checked its arguments. `call` holds them by value and runs now, or whenever the recorded
// calls run. The recording keeps `tensors` alive, because `call` holds raw pointers to their memory.
template <class Call, class... Tensors>
void run_or_record(const Call& call, const Tensors&... tensors) {
  RecordedCalls* recording = innermost_recording();
  if (recording == nullptr) return call();
  recording->add([call, owned = std::make_tuple(tensors...)] { call(); });
}

}  // namespace fused_diffusion
