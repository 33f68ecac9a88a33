// CUDA on the host, for tests: found before NVIDIA's cuda_runtime.h, this lets a C++ compiler build a .cu file
// as it is, for CPU tensors. Its operators are then fused_diffusion::on_host_<name>.
//
// Blocks run one after another, the threads of a block as fibers: a warp runs until all of it waits for the
// block, then the next one does. Warps and lanes take turns in ascending and in descending order, so that a
// missing barrier shows as a wrong number. Shared memory is NaN when a block begins. Threads that wait for each
// other, copies that nobody waits for, writes beyond the shared memory that was asked for, and launches that a
// device refuses throw. Warps are whole, masks are full, and what is approximate on a device is accurate here.
#pragma once

#include <cuda.h>
#include <link.h>
#include <setjmp.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ thread_local  // in a function, that is static

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct alignas(8) uint2 {
  unsigned x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fused_diffusion {
inline thread_local unsigned char shared_memory[240 << 10] __align__(1024);  // more than any device has
}

// ---- Fibers.
namespace on_host {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;

enum class Waits { nowhere, warp, block, barrier, ended };

// A barrier in shared memory, after the text of "mbarrier" in the PTX ISA.
struct BarrierState {
  int arrivals, missing;
  int64_t bytes;  // that are still to be copied
  unsigned phase;
};

struct Fiber {
  ucontext_t start;
  jmp_buf rest;
  bool started = false;
  Waits waits = Waits::nowhere;
  const uint64_t* barrier = nullptr;  // of Waits::barrier, for the end of a phase of this parity
  unsigned parity = 0;
  int exchanges = 0;
  std::unique_ptr<char[]> stack{new char[kStack]};
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline jmp_buf scheduler;
inline std::function<void()> kernel;
inline int thread = 0, threads = 0, turn = 0;
inline std::map<const uint64_t*, BarrierState> barriers;  // of a block
inline std::deque<std::function<void()>> box_copies;      // of a block, which have begun
inline int processors, most_shared;  // of the device: on_host_device sets them
inline int capability = 90;
inline std::vector<dim3> launched;   // grids of all launches since
inline std::map<const void*, int> shared_asked_for;
alignas(16) inline unsigned char exchanged[1024 / kWarp][2][kWarp][64];

__attribute__((noinline)) inline void wait(Waits where) {
  fibers[thread]->waits = where;
  if (!_setjmp(fibers[thread]->rest)) _longjmp(scheduler, 1);
}

inline void run_blocks() {
  for (;;) {
    kernel();
    wait(Waits::ended);
  }
}

__attribute__((noinline)) inline void resume(int which) {
  thread = which;
  const unsigned t = which, x = blockDim.x, y = blockDim.y;
  threadIdx = dim3(t % x, t / x % y, t / x / y);
  Fiber& fiber = *fibers[which];
  fiber.waits = Waits::nowhere;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.rest, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  makecontext(&fiber.start, run_blocks, 0);
  setcontext(&fiber.start);
}

inline int waiting(Waits where, int first, int count) {
  int number = 0;
  for (int i = first; i < first + count; ++i) number += fibers[i]->waits == where;
  return number;
}

// Threads that have all come to wait at one place go on; those that have ended are not waited for by the block.
inline bool release(Waits where, int first, int count) {
  const int number = waiting(where, first, count), ended = waiting(Waits::ended, first, count);
  if (number == 0 || number + (where == Waits::block ? ended : 0) != count) return false;
  for (int i = first; i < first + count; ++i) {
    if (fibers[i]->waits == where) fibers[i]->waits = Waits::nowhere;
  }
  return true;
}

// 0 to count - 1, or in the other direction, by turns without a period.
inline int in_turn(int i, int count) { return static_cast<uint32_t>(turn) * 0x9E3779B9u >> 31 ? i : count - 1 - i; }

// Lets a thread go on if the phase that it waits for has ended.
inline void look_at_barrier(Fiber& fiber) {
  if (fiber.waits == Waits::barrier && barriers.at(fiber.barrier).phase % 2 != fiber.parity) {
    fiber.waits = Waits::nowhere;
  }
}

// Until every lane waits for other warps or has ended. Returns whether any went on.
inline bool run_warp(int first) {
  bool went_on = false, again = true;
  while (again) {
    again = false;
    ++turn;
    for (int i = 0; i < kWarp; ++i) {
      const int next = first + in_turn(i, kWarp);
      look_at_barrier(*fibers[next]);
      if (fibers[next]->waits == Waits::nowhere) resume(next), went_on = again = true;
    }
    again = release(Waits::warp, first, kWarp) || again;
  }
  return went_on;
}

[[noreturn]] inline void fail(const std::string& what) {
  fibers.clear();  // in the middle of a kernel
  box_copies.clear();
  throw std::runtime_error(what);
}

// All thread-local memory of this library, which is its shared memory: 0xFF bytes are NaN in every float type.
inline void poison_shared_memory() {
  fused_diffusion::shared_memory[0] = 0;  // allocates it
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* ours) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          auto* begin = static_cast<unsigned char*>(info->dlpi_tls_data);
          const size_t bytes = info->dlpi_phdr[i].p_memsz;
          const bool is_ours = begin != nullptr && ours >= begin && ours < begin + bytes;
          if (info->dlpi_phdr[i].p_type == PT_TLS && is_ours) memset(begin, 0xFF, bytes);
        }
        return 0;
      },
      fused_diffusion::shared_memory);
}

// Copies end in any order.
inline void end_box_copy() {
  const bool first = in_turn(0, 2) == 0;
  ++turn;
  const std::function<void()> copy = first ? box_copies.front() : box_copies.back();
  first ? box_copies.pop_front() : box_copies.pop_back();
  copy();
}

inline void run_block(size_t shared) {
  poison_shared_memory();
  barriers.clear();
  for (int i = 0; i < threads; ++i) fibers[i]->waits = Waits::nowhere, fibers[i]->exchanges = 0;
  while (waiting(Waits::ended, 0, threads) != threads) {
    std::vector<int> warps(threads / kWarp);
    ++turn;
    for (int i = 0; i < threads / kWarp; ++i) warps[i] = in_turn(i, threads / kWarp);
    bool went_on = false;
    for (const int warp : warps) went_on = run_warp(warp * kWarp) || went_on;
    if (release(Waits::block, 0, threads) || went_on) continue;
    if (box_copies.empty()) fail("threads wait for each other");
    end_box_copy();
  }
  if (!box_copies.empty()) fail("a copy was not waited for");
  for (size_t i = shared; i < sizeof(fused_diffusion::shared_memory); ++i) {
    if (fused_diffusion::shared_memory[i] != 0xFF) fail("a block wrote beyond its shared memory");
  }
}

// The value that every lane of the warp gave to this rendezvous, until the next but one.
template <class T>
struct Lanes {
  const unsigned char (*values)[64];

  T operator[](int lane) const {
    T value;
    memcpy(&value, values[lane], sizeof(T));
    return value;
  }
};

// All lanes of the warp call it, each with a value of the same type.
template <class T>
Lanes<T> exchange(const T& value) {
  static_assert(sizeof(T) <= 64, "no room for the value");
  auto& values = exchanged[thread / kWarp][fibers[thread]->exchanges++ % 2];
  memcpy(values[thread % kWarp], &value, sizeof(T));
  wait(Waits::warp);
  return {values};
}

inline void check_mask(unsigned mask) {
  if (mask != ~0u) abort();
}

struct Library {
  torch::stable::detail::StableLibrary library{torch::stable::detail::StableLibrary::Kind::IMPL, "fused_diffusion",
                                               "CPU", __FILE__, __LINE__};

  template <class Function>
  void impl(const std::string& name, Function function) {
    library.impl(("on_host_" + name).c_str(), function);
  }
};

}  // namespace on_host

// ---- What kernels call.

inline void __syncthreads() { on_host::wait(on_host::Waits::block); }
inline void __syncwarp() { on_host::wait(on_host::Waits::warp); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  on_host::check_mask(mask);
  return on_host::exchange(value)[on_host::thread % on_host::kWarp ^ lanes];
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  on_host::check_mask(mask);
  return on_host::exchange(value)[lane];
}

template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to = before + value;
  return before;
}

inline float __expf(float x) { return expf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

// ---- The runtime.

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
constexpr unsigned long long cudaEnableDefault = 0;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

#define CUDART_VERSION 13000

inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid value"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  switch (which) {
    case cudaDevAttrMultiProcessorCount: *value = on_host::processors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = on_host::most_shared; break;
    case cudaDevAttrComputeCapabilityMajor: *value = on_host::capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = on_host::capability % 10; break;
  }
  return cudaSuccess;
}

inline cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
  const bool known = std::string(symbol) == "cuTensorMapEncodeTiled";
  *function = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// Refuses less than before: another thread may be about to launch the kernel with what it had asked for.
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  int& asked = on_host::shared_asked_for[reinterpret_cast<const void*>(kernel)];
  if (bytes < asked || bytes > on_host::most_shared) return cudaErrorInvalidValue;
  return asked = bytes, cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const int threads = block.x * block.y * block.z;
  const int shared = static_cast<int>(config->dynamicSmemBytes);
  const int asked = on_host::shared_asked_for[reinterpret_cast<void*>(kernel)];
  if (threads == 0 || threads > 1024 || threads % on_host::kWarp != 0 || shared > std::max(asked, 48 << 10) ||
      grid.x == 0 || grid.x > INT32_MAX || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    return cudaErrorInvalidValue;
  }
  on_host::launched.push_back(grid);
  on_host::threads = threads;
  on_host::kernel = [&] { kernel(static_cast<Parameters>(arguments)...); };
  while (on_host::fibers.size() < static_cast<size_t>(threads)) {
    on_host::fibers.push_back(std::make_unique<on_host::Fiber>());
  }
  gridDim = grid, blockDim = block;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) on_host::run_block(shared);
    }
  }
  return cudaSuccess;
}

// The device as the kernels are told of it: multiprocessors, and bytes of shared memory to a block.
extern "C" __attribute__((visibility("default"), used)) inline void on_host_device(int processors, int shared) {
  on_host::processors = processors;
  on_host::most_shared = shared;
  on_host::shared_asked_for.clear();
  on_host::launched.clear();
}

// Major and minor version of the device's capability, such as 90.
extern "C" __attribute__((visibility("default"), used)) inline void on_host_capability(int capability) {
  on_host::capability = capability;
}

// The number of launches since on_host_device; their grids, three numbers each, as far as there is room for them.
extern "C" __attribute__((visibility("default"), used)) inline int on_host_launches(unsigned (*grids)[3], int room) {
  const int count = static_cast<int>(on_host::launched.size());
  for (int i = 0; i < std::min(count, room); ++i) {
    const dim3 grid = on_host::launched[i];
    grids[i][0] = grid.x, grids[i][1] = grid.y, grids[i][2] = grid.z;
  }
  return count;
}

// ---- Torch: no stream, no device to choose, and operators of CPU tensors.

inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  return *stream = nullptr, AOTI_TORCH_SUCCESS;
}

namespace torch::stable::accelerator {
struct HostGuard {
  explicit HostGuard(DeviceIndex) {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard HostGuard

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(space, key, m)                                    \
  static void register_on_host(on_host::Library& m);                                \
  static on_host::Library library_on_host;                                          \
  static const bool registered_on_host = (register_on_host(library_on_host), true); \
  static void register_on_host(on_host::Library& m)

#include "tensor_core.h"

#include "hopper.h"
