// What is no tensor op: which instruction sets this processor has and which one runs.
#include <atomic>
#include <cstring>

#include "simd/dispatch.h"
#include "runtime/export.h"
#include "common/targets.h"

#if FD_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fused_diffusion {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};

// Whether there is AMX for bfloat16 and bytes, and the system lets this process have its registers.
bool has_amx() {
#if FD_AMX
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool tiles = (d >> 24 & 1) != 0, products = (d >> 22 & 1) != 0 && (d >> 25 & 1) != 0;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return tiles && products && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Simd find_best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Simd::baseline;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (!__builtin_cpu_supports("avx512bf16")) return Simd::avx512;
    return has_amx() ? Simd::amx : Simd::avx512_bf16;
  }
  return Simd::avx2;
#else
  return Simd::baseline;
#endif
}

Simd best() {
  static const Simd found = find_best();
  return found;
}

std::atomic<Simd> in_use{best()};

}  // namespace

Simd simd_in_use() { return in_use.load(std::memory_order_relaxed); }

}  // namespace fused_diffusion

// The widest instruction set that both this library and the processor have.
FD_EXPORT const char* fused_diffusion_simd_best() {
  return fused_diffusion::kNames[static_cast<int>(fused_diffusion::best())];
}

FD_EXPORT const char* fused_diffusion_simd_in_use() {
  return fused_diffusion::kNames[static_cast<int>(fused_diffusion::simd_in_use())];
}

// Runs everything from now on with the named set; 0 if the processor does not have it.
FD_EXPORT int fused_diffusion_simd_use(const char* name) {
  using namespace fused_diffusion;
  for (int i = 0; i <= static_cast<int>(best()); ++i) {
    if (std::strcmp(name, kNames[i]) == 0) {
      in_use.store(static_cast<Simd>(i), std::memory_order_relaxed);
      return 1;
    }
  }
  return 0;
}

FD_EXPORT const char* fused_diffusion_compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}
