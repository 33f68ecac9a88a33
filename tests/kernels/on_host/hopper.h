// The functions of csrc/cuda/hopper.h on the host, after the text of the PTX ISA: "mbarrier", "cp.async.bulk.tensor",
// "Tensor Swizzling Modes", and, of "Asynchronous Warpgroup Level Matrix Instructions", "Register Fragments" and
// "Shared Memory Matrix Layout" with its descriptors. The host adds in float32, in order.
//
// Shared memory begins at address 0. A box is copied as soon as its copy begins, or when nothing else can go on; a
// product is computed when it is issued, or when it is waited for: by turns, as copy_16_bytes.
#pragma once

#include <cuda.h>

#include <cstdio>

#include "tensor_core.h"

#define __grid_constant__
#define swizzled_memory shared_memory

namespace on_host {

using fused_diffusion::shared_memory;

[[noreturn]] inline void refuse(const char* what) {
  fprintf(stderr, "on the host: %s\n", what);
  abort();
}

inline BarrierState& state_of(uint64_t* barrier) {
  const auto found = barriers.find(barrier);
  if (found == barriers.end()) refuse("a barrier was not made");
  return found->second;
}

inline void end_phase(BarrierState& state) {
  if (state.missing == 0 && state.bytes == 0) state.phase += 1, state.missing = state.arrivals;
}

inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void copy_box(unsigned char* to, const TensorMap& map, uint64_t* barrier, const int64_t (&first)[4]) {
  const uint32_t row_bytes = map.box[0] * 2;
  const auto start = static_cast<uint32_t>(to - shared_memory);
  const bool known = start % 128 == 0 && row_bytes == 128 && map.swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  if (!known) refuse("such a box is not copied here");
  uint32_t written = 0;
  int64_t at[4];
  for (uint32_t b = 0; b < map.box[3]; ++b) {
    for (uint32_t h = 0; h < map.box[2]; ++h) {
      for (uint32_t r = 0; r < map.box[1]; ++r) {
        for (uint32_t c = 0; c < map.box[0]; ++c, written += 2) {
          at[0] = first[0] + c, at[1] = first[1] + r, at[2] = first[2] + h, at[3] = first[3] + b;
          const char* from = map.data;
          bool inside = true;
          for (int d = 0; d < 4; ++d) {
            inside = inside && at[d] >= 0 && at[d] < static_cast<int64_t>(map.sizes[d]);
            from += at[d] * static_cast<int64_t>(map.strides[d]);
          }
          uint16_t bits = 0;
          if (inside) memcpy(&bits, from, 2);
          memcpy(shared_memory + swizzled(start + written), &bits, 2);
        }
      }
    }
  }
  BarrierState& state = state_of(barrier);
  state.bytes -= written;
  end_phase(state);
}

// A matrix in shared memory, read through the bits of its descriptor.
struct Described {
  uint64_t bits;

  uint32_t field(int from) const { return static_cast<uint32_t>(bits >> from & 0x3FFF) << 4; }

  uint16_t at(uint32_t offset) const {
    if (bits >> 62 != 1 || (bits >> 49 & 7) != 0) refuse("a descriptor has another swizzle");
    uint16_t number;
    memcpy(&number, shared_memory + swizzled(field(0) + offset), 2);
    return number;
  }
  // Rows along the depth.
  uint16_t by_row(int row, int depth) const { return at(row / 8 * field(32) + row % 8 * 128 + depth * 2); }
  // Rows across it: one for each number of the depth.
  uint16_t by_depth(int depth, int column) const {
    return at(column / 64 * field(16) + depth / 8 * field(32) + depth % 8 * 128 + column % 64 * 2);
  }
};

// What a thread computes of a product: rows threadId / 4 and 8 more of its warp's 16, in every 8 columns the numbers
// 2 (threadId % 4) and the next.
template <class T>
struct WarpProduct {
  float (*sums)[4];
  int blocks;
  bool add, rows_of_b;
  bool a_in_registers;
  uint16_t a[2][16];
  Described left, right;
  int warp, lane;

  void run() const {
    const auto number = [](uint16_t bits) { return fused_diffusion::to_float(T{bits}); };
    for (int n = 0; n < blocks; ++n) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = 8 * n + 2 * (lane % 4) + i % 2;
        float sum = add ? sums[n][i] : 0.0f;
        for (int depth = 0; depth < 16; ++depth) {
          const uint16_t one = a_in_registers ? a[i / 2][depth] : left.by_row(16 * warp + row, depth);
          sum += number(one) * number(rows_of_b ? right.by_row(column, depth) : right.by_depth(depth, column));
        }
        sums[n][i] = sum;
      }
    }
  }
};

struct Products {
  bool fenced = false;
  std::vector<std::function<void()>> latest;
  std::deque<std::vector<std::function<void()>>> groups;
};

inline Products products[1024];

template <class T>
void begin(const WarpProduct<T>& product) {
  Products& mine = products[thread];
  if (!mine.fenced) refuse("a product without a fence");
  // Products of one sum stay in their order: those after a late one are late, too.
  const bool none = mine.latest.empty() && mine.groups.empty();
  if (none && at_once()) {
    product.run();
  } else {
    mine.latest.push_back([product] { product.run(); });
  }
}

}  // namespace on_host

namespace fused_diffusion {

// A pointer as an address of shared memory.
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - shared_memory);
}

inline void init_barrier(uint64_t* barrier, int arrivals) {
  if (shared_address(barrier) % 8 != 0) abort();
  on_host::barriers[barrier] = {arrivals, arrivals, 0, 0};
}

inline void publish_barriers() {}

inline void arrive_and_expect(uint64_t* barrier, int bytes) {
  on_host::BarrierState& state = on_host::state_of(barrier);
  if (state.missing == 0) on_host::refuse("too many threads arrived");
  state.bytes += bytes;
  state.missing -= 1;
  on_host::end_phase(state);
}

inline void arrive(uint64_t* barrier) { arrive_and_expect(barrier, 0); }

inline void wait_for_phase(uint64_t* barrier, int parity) {
  on_host::state_of(barrier);
  on_host::Fiber& fiber = *on_host::fibers[on_host::thread];
  fiber.barrier = barrier, fiber.parity = parity;
  on_host::wait(on_host::Waits::barrier);
}

inline void copy_box(void* to, const CUtensorMap& tensor, uint64_t* barrier, int column, int row, int head, int image) {
  on_host::TensorMap map;
  memcpy(&map, tensor.opaque, sizeof(map));
  const auto copy = [to, map, barrier, column, row, head, image] {
    on_host::copy_box(static_cast<unsigned char*>(to), map, barrier, {column, row, head, image});
  };
  if (on_host::at_once()) {
    copy();
  } else {
    on_host::box_copies.push_back(copy);
  }
}

template <int kCount>
void give_registers() {}

template <int kCount>
void take_registers() {}

inline void fence_products() { on_host::products[on_host::thread].fenced = true; }

inline void commit_products() {
  on_host::Products& mine = on_host::products[on_host::thread];
  mine.groups.push_back(std::move(mine.latest));
  mine.latest.clear();
}

template <int kPending, int kBlocks>
void wait_for_products(float (&)[kBlocks][4]) {
  on_host::Products& mine = on_host::products[on_host::thread];
  for (; mine.groups.size() > kPending; mine.groups.pop_front()) {
    for (const auto& product : mine.groups.front()) product();
  }
  mine.fenced = false;
}

template <int kBlocks, class T>
void multiply_rows(float (&c)[kBlocks][4], uint64_t a, uint64_t b, bool add, T) {
  using namespace on_host;
  exchange(0);
  begin(WarpProduct<T>{c, kBlocks, add, true, false, {}, {a}, {b}, thread / kWarp % 4, thread % kWarp});
}

template <int kBlocks, class T>
void multiply_columns(float (&c)[kBlocks][4], const uint32_t (&a)[4], uint64_t b, T) {
  using namespace on_host;
  struct Fragment {
    uint32_t a[4];
  };
  const Lanes<Fragment> lanes = exchange(Fragment{{a[0], a[1], a[2], a[3]}});
  WarpProduct<T> product{c, kBlocks, true, false, true, {}, {}, {b}, thread / kWarp % 4, thread % kWarp};
  for (int other = 0; other < 4; ++other) {
    const Fragment fragment = lanes[product.lane / 4 * 4 + other];
    for (int i = 0; i < 8; ++i) {  // as the left factor of mma.m16n8k16
      const auto bits = static_cast<uint16_t>(fragment.a[i / 2] >> 16 * (i % 2));
      product.a[i / 2 % 2][2 * other + i % 2 + i / 4 * 8] = bits;
    }
  }
  begin(product);
}

}  // namespace fused_diffusion
