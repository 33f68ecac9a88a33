// Instructions of sm_90a that C++ has no functions for: barriers in shared memory, the copies of boxes of a tensor
// that the copy engine makes ("TMA"), and the products of four warps at a time ("wgmma"). The tests, which run the
// kernels on the host, have the same functions in plain C++.
//
// PTX ISA: "mbarrier", "cp.async.bulk.tensor", "Asynchronous Warpgroup Level Matrix Instructions".
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "common/floats.h"
#include "cuda/tensor_core.h"

namespace fused_diffusion {

using Barrier = uint64_t;

constexpr int kSwizzledRow = 128;       // bytes of a row of a tile that the copy engine writes
constexpr int kSwizzledRows = 8;        // rows after which the swizzle repeats
constexpr int kMatrixDepth = 16;        // 16-bit numbers that one instruction sums over
constexpr uint64_t kSwizzleOf128 = 1;   // of a descriptor

// The descriptor of a matrix of 16-bit numbers in shared memory, in rows of 128 bytes whose 16-byte units are swizzled
// within 8 rows; tiles begin at multiples of 1024 bytes. Rows along the depth of the product: `next_eight` is the
// distance of rows 8 and 0, and `next_columns` has no meaning. Rows across it: `next_eight` is the same, of the depth,
// and `next_columns` the distance of columns 64 and 0. In bytes.
__device__ __forceinline__ uint64_t describe_matrix(const void* first, int next_eight, int next_columns) {
  const auto units = [](int bytes) { return static_cast<uint64_t>((bytes & 0x3FFFF) >> 4); };
  return units(static_cast<int>(shared_address(first))) | units(next_columns) << 16 | units(next_eight) << 32 |
         kSwizzleOf128 << 62;
}

// The descriptor of the same matrix further on in shared memory.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, int bytes) {
  return descriptor + static_cast<uint64_t>(bytes >> 4);
}

}  // namespace fused_diffusion

#if defined(__CUDACC__)
namespace fused_diffusion {

// The dynamic shared memory of a block whose tiles are swizzled.
extern __shared__ __align__(1024) unsigned char swizzled_memory[];

// A phase of the barrier ends when `arrivals` threads have arrived and the bytes that they expect have been copied.
__device__ __forceinline__ void init_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Shows the thread's new barriers to the copy engine; __syncthreads() shows them to the block.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void arrive_and_expect(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Waits until the phase of this parity has ended: 0 for the first, 1 for the second, ... Before the first, parity 1
// has ended.
__device__ __forceinline__ void wait_for_phase(Barrier* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared.b64 ended, [%0], %1;\n"
      "@ended bra done;\n"
      "bra again;\n"
      "done:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// One thread begins to copy a box of a tensor, whose first number is at `column`, `row`, `head`, `image`; zeros where
// the box exceeds the tensor. The bytes of the whole box count for the barrier.
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap& tensor, Barrier* barrier, int column, int row,
                                         int head, int image) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(&tensor), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(head), "r"(image)
      : "memory");
}

// Registers of each thread from here on; all warps of a group of four call it, the group's part being one branch.
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Before the first of a group of products, and after registers that they use were written.
__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// The products since the last call are one group.
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until all groups but the latest kPending are complete. `sums`, of all of them, are read after that only.
template <int kPending, int kBlocks>
__device__ __forceinline__ void wait_for_products(float (&sums)[kBlocks][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#pragma unroll
  for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(sums[n][i])::"memory");
  }
}

#define FD_SUMS_4(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define FD_SUMS_16(c, n) FD_SUMS_4(c, n), FD_SUMS_4(c, n + 1), FD_SUMS_4(c, n + 2), FD_SUMS_4(c, n + 3)
#define FD_SUMS_32(c, n) FD_SUMS_16(c, n), FD_SUMS_16(c, n + 4)
#define FD_SUMS_64(c, n) FD_SUMS_32(c, n), FD_SUMS_32(c, n + 8)
#define FD_SUMS_128(c, n) FD_SUMS_64(c, n), FD_SUMS_64(c, n + 16)
#define FD_NAMES_32                                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FD_NAMES_64                                                                                              \
  FD_NAMES_32                                                                                                    \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FD_NAMES_128                                                                                             \
  FD_NAMES_64                                                                                                    \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, " \
  "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, "   \
  "%105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, " \
  "%123, %124, %125, %126, %127"

// c = a b^T, or with `add` c += a b^T: 64 rows of `a` and as many of `b` as c has columns, 16 numbers of each, in
// shared memory. Warp w of the four has rows [16 w, 16 w + 16) of c, laid out as by multiply_add.
#define FD_MULTIPLY_ROWS(columns, numbers, a_operand, b_operand, add_operand, name, type)                          \
  __device__ __forceinline__ void multiply_rows(float (&c)[columns / 8][4], uint64_t a, uint64_t b, bool add, type) { \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " add_operand                                               \
                 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." name "." name                       \
                 " {" FD_NAMES_##numbers "}, " a_operand ", " b_operand ", adds, 1, 1, 0, 0;\n}\n"                  \
                 : FD_SUMS_##numbers(c, 0)                                                                         \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                                    \
  }
FD_MULTIPLY_ROWS(64, 32, "%32", "%33", "%34", "bf16", BFloat16)
FD_MULTIPLY_ROWS(64, 32, "%32", "%33", "%34", "f16", Half)
FD_MULTIPLY_ROWS(128, 64, "%64", "%65", "%66", "bf16", BFloat16)
FD_MULTIPLY_ROWS(128, 64, "%64", "%65", "%66", "f16", Half)

// c += a b for `a` [64][16] in registers, laid out as by multiply_add, and b [16][columns of c] in shared memory, a row
// for each number of the depth.
#define FD_MULTIPLY_COLUMNS(columns, numbers, a_operands, b_operand, add_operand, name, type)                      \
  __device__ __forceinline__ void multiply_columns(float (&c)[columns / 8][4], const uint32_t (&a)[4], uint64_t b, \
                                                   type) {                                                         \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " add_operand                                               \
                 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." name "." name                       \
                 " {" FD_NAMES_##numbers "}, {" a_operands "}, " b_operand ", adds, 1, 1, 1;\n}\n"                  \
                 : FD_SUMS_##numbers(c, 0)                                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(1));                                    \
  }
FD_MULTIPLY_COLUMNS(64, 32, "%32, %33, %34, %35", "%36", "%37", "bf16", BFloat16)
FD_MULTIPLY_COLUMNS(64, 32, "%32, %33, %34, %35", "%36", "%37", "f16", Half)
FD_MULTIPLY_COLUMNS(128, 64, "%64, %65, %66, %67", "%68", "%69", "bf16", BFloat16)
FD_MULTIPLY_COLUMNS(128, 64, "%64, %65, %66, %67", "%68", "%69", "f16", Half)
FD_MULTIPLY_COLUMNS(256, 128, "%128, %129, %130, %131", "%132", "%133", "bf16", BFloat16)
FD_MULTIPLY_COLUMNS(256, 128, "%128, %129, %130, %131", "%132", "%133", "f16", Half)

}  // namespace fused_diffusion
#endif
