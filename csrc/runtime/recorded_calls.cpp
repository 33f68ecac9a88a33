// Recorded calls, and the recordings of each thread.
#include "runtime/recorded_calls.h"

#include <stdexcept>

namespace fused_diffusion {
namespace {

// This thread's recordings, the innermost one last. They are owned, because Python may drop one without ending it.
std::vector<std::shared_ptr<RecordedCalls>>& recordings() {
  static thread_local std::vector<std::shared_ptr<RecordedCalls>> stack;
  return stack;
}

// A pointer beside the stack: every call of an operator reads it, and it needs no check for first use.
thread_local RecordedCalls* innermost = nullptr;

}  // namespace

RecordedCalls* innermost_recording() { return innermost; }

void RecordedCalls::begin() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (state_ != State::empty) throw std::runtime_error("these calls were recorded before; begin another recording");
  recordings().push_back(shared_from_this());
  innermost = this;
  state_ = State::recording;
}

void RecordedCalls::end(bool failed) {
  if (innermost != this) {
    throw std::runtime_error("a recording must end in the thread that began it, before the recordings around it");
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    state_ = failed ? State::failed : State::complete;
  }
  auto& stack = recordings();
  innermost = stack.size() > 1 ? stack[stack.size() - 2].get() : nullptr;
  stack.pop_back();  // this object may end here
}

void RecordedCalls::add(std::function<void()> call) {
  const std::lock_guard<std::mutex> lock(mutex_);
  calls_.push_back(std::move(call));
}

int64_t RecordedCalls::size() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<int64_t>(calls_.size());
}

void RecordedCalls::run() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (state_ == State::failed) throw std::runtime_error("the recording of these calls ended in an exception");
    if (state_ != State::complete) throw std::runtime_error("the recording of these calls has not ended");
  }
  if (innermost != nullptr) return innermost->add([self = shared_from_this()] { self->run(); });
  const std::lock_guard<std::mutex> turn(running_);  // the calls share the tensors that they write
  for (const auto& call : calls_) call();
}

}  // namespace fused_diffusion
