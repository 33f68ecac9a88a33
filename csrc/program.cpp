// Programs for Python: plain C functions, as in module.cpp.
#include "program.h"

#include <exception>
#include <memory>
#include <new>

namespace fused_diffusion {

Program*& program_being_written() {
  static thread_local Program* program = nullptr;
  return program;
}

}  // namespace fused_diffusion

using fused_diffusion::Program;

#define FD_EXPORT extern "C" __attribute__((visibility("default")))

// From now on this thread's calls of operators that know programs are written down instead of being run.
FD_EXPORT void* fused_diffusion_program_begin() {
  return fused_diffusion::program_being_written() = new (std::nothrow) Program;
}

FD_EXPORT void fused_diffusion_program_end() { fused_diffusion::program_being_written() = nullptr; }

FD_EXPORT int64_t fused_diffusion_program_size(const void* program) {
  return static_cast<int64_t>(static_cast<const Program*>(program)->size());
}

// 0, or 1 where memory is short, or 2 after any other exception.
FD_EXPORT int fused_diffusion_program_run(const void* program) {
  try {
    for (const auto& call : *static_cast<const Program*>(program)) call();
  } catch (const std::bad_alloc&) {
    return 1;
  } catch (const std::exception&) {
    return 2;
  }
  return 0;
}

FD_EXPORT void fused_diffusion_program_delete(void* program) { delete static_cast<Program*>(program); }
