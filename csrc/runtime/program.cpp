// Programs for Python.
#include "runtime/program.h"

#include <exception>
#include <new>
#include <string>

#include "runtime/export.h"

namespace fused_diffusion {

Program*& program_being_written() {
  static thread_local Program* program = nullptr;
  return program;
}

}  // namespace fused_diffusion

using fused_diffusion::Program;

// From now on this thread's calls of operators that know programs are written down instead of being run, up to the end
// of this program. Null where memory is short.
FD_EXPORT void* fused_diffusion_program_begin() {
  Program*& written = fused_diffusion::program_being_written();
  Program* program = new (std::nothrow) Program{{}, written};
  if (program != nullptr) written = program;
  return program;
}

FD_EXPORT void fused_diffusion_program_end(const void* program) {
  fused_diffusion::program_being_written() = static_cast<const Program*>(program)->outer;
}

FD_EXPORT int64_t fused_diffusion_program_size(const void* program) {
  return static_cast<int64_t>(static_cast<const Program*>(program)->calls.size());
}

// Null, or what an exception said, up to this thread's next run.
FD_EXPORT const char* fused_diffusion_program_run(const void* program) {
  static thread_local std::string error;
  try {
    for (const auto& call : static_cast<const Program*>(program)->calls) call();
    return nullptr;
  } catch (const std::exception& exception) {
    error = exception.what();
  }
  return error.c_str();
}

FD_EXPORT void fused_diffusion_program_delete(void* program) { delete static_cast<Program*>(program); }
