// The Python module diffusion.kernels._cpp: everything but tensor ops, which are registered with PyTorch's dispatcher
// when this library is loaded. No other source includes Python, so that the others build without it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <iterator>
#include <memory>
#include <string>

#include "attention/args.h"
#include "convolution/args.h"
#include "group_norm_silu/args.h"
#include "reverse_step/math.h"
#include "runtime/memory_digest.h"
#include "runtime/recorded_calls.h"
#include "simd/instruction_sets.h"

namespace py = pybind11;

namespace fused_diffusion {
namespace {

std::string name_of(Simd simd) {
  for (const NamedSimd& named : kNamedSimd) {
    if (named.set == simd) return named.name;
  }
  return "";
}

void use_simd_by_name(const std::string& name) {
  for (const NamedSimd& named : kNamedSimd) {
    if (name == named.name && includes(best_simd(), named.set)) return use_simd(named.set);
  }
  throw py::value_error("this processor has no " + name);
}

// The constants of packed weights, and the sizes up to which kernels serve. kernels/_native.py refuses a library whose
// constants differ from kernels/_limits.py.
py::dict limits() {
  py::dict limits;
  limits["PANEL"] = kPanel;
  limits["LANES"] = kPackedLanes;
  limits["CHUNK"] = kPairChunk;
  limits["BYTE_CHUNK"] = kByteChunk;
  limits["LARGEST_LIMB"] = static_cast<int>(kLargestLimb);
  limits["ZERO"] = kZero;
  limits["MAX_PRODUCTS"] = kMaxProducts;
  limits["MAX_AMX_POSITIONS"] = kMaxAmxPositions;
  limits["MAX_CUDA_WIDTH"] = kMaxCudaWidth;
  limits["WIDE_HEAD"] = kWideHead;
  limits["WIDE_SHARED_MEMORY"] = kWideSharedMemory;
  limits["MAX_CUDA_GROUP_SIZE"] = kMaxCudaGroupSize;
  limits["ROW_LENGTH"] = kRowLength;
  return limits;
}

// Whether this thread is the one whose Python code handles signals. Needs the GIL.
bool is_main_thread() {
  const py::module_ threading = py::module_::import("threading");
  return threading.attr("get_ident")().equal(threading.attr("main_thread")().attr("ident"));
}

// Handles the signals that have arrived, and throws if a handler raises, as that of Ctrl-C does. It asks at most every
// kSignalInterval, since taking the GIL may have to wait for other threads of Python.
class SignalCheck {
 public:
  void operator()() {
    const auto now = Clock::now();
    if (now - last_ < kSignalInterval) return;
    last_ = now;
    const py::gil_scoped_acquire held;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kSignalInterval{20};
  Clock::time_point last_ = Clock::now();
};

void run_calls(RecordedCalls& calls, int64_t times) {
  if (times < 0) throw py::value_error("times must be at least 0");
  const bool handles_signals = times > 1 && is_main_thread();
  const py::gil_scoped_release released;  // so that nothing waits for another thread's run while it holds the GIL
  SignalCheck check;
  for (int64_t time = 0; time < times; ++time) {
    if (time > 0 && handles_signals) check();
    calls.run();
  }
}

py::dict build() {
  py::dict build;
#if defined(__clang__)
  build["compiler"] = "clang " __clang_version__;
#else
  build["compiler"] = "gcc " __VERSION__;
#endif
  build["python"] = PY_VERSION;
  build["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(
      PYBIND11_VERSION_MINOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_PATCH);
  build["version"] = FD_VERSION;
  build["sources"] = FD_SOURCES;
  return build;
}

}  // namespace
}  // namespace fused_diffusion

// Subinterpreters and free threading are not declared: PyTorch does not work in the former, and the latter is untested.
// A free-threaded Python turns its GIL on when it imports this module.
PYBIND11_MODULE(_cpp, m) {
  using namespace fused_diffusion;
  m.doc() = "Recorded calls, digests of memory, instruction sets, limits and build information of the C++ ops.";
  py::tuple names(std::size(kNamedSimd));
  for (size_t i = 0; i < names.size(); ++i) names[i] = kNamedSimd[i].name;
  m.attr("SIMD_VARIANTS") = names;
  m.attr("LIMITS") = limits();
  m.attr("BUILD") = build();
  m.def("best_simd", [] { return name_of(best_simd()); });
  m.def("simd_in_use", [] { return name_of(simd_in_use()); });
  m.def("use_simd", use_simd_by_name, py::arg("name"));

  using Released = py::call_guard<py::gil_scoped_release>;
  py::class_<RecordedCalls, std::shared_ptr<RecordedCalls>>(m, "RecordedCalls", py::module_local())
      .def(py::init<>())
      .def("__enter__",
           [](std::shared_ptr<RecordedCalls> self) {
             self->begin();
             return self;
           })
      .def("__exit__", [](RecordedCalls& self, const py::object& type, const py::object&,
                          const py::object&) { self.end(!type.is_none()); })
      .def("__len__", &RecordedCalls::size, Released())
      .def("run", run_calls, py::arg("times") = 1);

  py::class_<MemoryDigest>(m, "MemoryDigest", py::module_local())
      .def(py::init<std::vector<std::pair<uintptr_t, int64_t>>>(), py::arg("regions"), Released())
      .def(
          "holds",
          [](const MemoryDigest& self, int64_t part, int64_t parts) {
            if (part < 0 || part >= parts) throw py::value_error("part must be in 0..parts-1");
            const py::gil_scoped_release released;
            return self.holds(part, parts);
          },
          py::arg("part") = 0, py::arg("parts") = 1);
}
