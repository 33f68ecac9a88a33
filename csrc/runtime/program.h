// Calls of operators on tensors that stay where they are, written down once and run many times: to check a call's
// arguments takes longer than a small call.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace fused_diffusion {

struct Program {
  std::vector<std::function<void()>> calls;
  Program* outer;  // which was being written when this one began
};

Program*& program_being_written();  // this thread's, or null; runtime/program.cpp

// For an operator that has checked its arguments: `call` holds them by value.
template <class Call>
void run_or_write(const Call& call) {
  Program* program = program_being_written();
  if (program == nullptr) call();
  else program->calls.push_back(call);
}

}  // namespace fused_diffusion
