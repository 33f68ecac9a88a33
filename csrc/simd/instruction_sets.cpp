// The instruction sets that this processor has, and the one in use.
#include "simd/instruction_sets.h"

#include <atomic>

#include "simd/targets.h"

#if FD_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fused_diffusion {
namespace {

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
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (!__builtin_cpu_supports("avx512bf16")) return Simd::avx512;
    return has_amx() ? Simd::amx : Simd::avx512_bf16;
  }
  return Simd::avx2;
#else
  return Simd::baseline;
#endif
}

std::atomic<Simd> in_use{best_simd()};

}  // namespace

Simd best_simd() {
  static const Simd found = find_best();
  return found;
}

Simd simd_in_use() { return in_use.load(std::memory_order_relaxed); }

void use_simd(Simd simd) { in_use.store(simd, std::memory_order_relaxed); }

}  // namespace fused_diffusion
