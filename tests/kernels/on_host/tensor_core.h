// The functions of csrc/cuda/tensor_core.h on the host, after the text of the PTX ISA: "cp.async", "ldmatrix", and
// "Matrix Fragments for mma.m16n8k16 with floating point type". The host adds in float32, in order.
#pragma once

#include <deque>

#include "common/floats.h"
#include "cuda_runtime.h"

namespace on_host {

struct Copy {
  void* to;
  const void* from;
  bool exists;

  void run() const {
    if (exists) {
      memcpy(to, from, 16);
    } else {
      memset(to, 0, 16);
    }
  }
};

// Those of a thread which have begun, but are not yet known to have ended.
struct Copies {
  std::vector<Copy> latest;
  std::deque<std::vector<Copy>> groups;
};

inline Copies copies[1024];

// A copy may happen as soon as it has begun, or as late as the wait for it: by turns, so that a tile which is
// overwritten too early shows, and one which is read too early.
inline bool at_once() {
  static uint32_t number = 0;
  return ++number * 0x9E3779B9u >> 31;
}

inline void require_packs(const void* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) abort();
}

// Elements i = 0, 1, ... of a fragment, two to a register, the first in the lower half.
template <class T, int kRegisters>
float element(const uint32_t (&registers)[kRegisters], int i) {
  return fused_diffusion::to_float(T{static_cast<uint16_t>(registers[i / 2] >> 16 * (i % 2))});
}

// "row r of matrix m is at the address that thread 8 m + r gives; each thread receives a fragment of each matrix's
// row threadId / 4": its elements 2 (threadId % 4) and the next one. With .trans the matrix is loaded in
// column-major format.
inline void load_matrices(uint32_t (&to)[4], const void* row, bool transposed) {
  require_packs(row);
  const Lanes<const void*> rows = exchange(row);
  const int group = thread % kWarp / 4, in_group = thread % 4;
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int r = transposed ? 2 * in_group + i : group, c = transposed ? group : 2 * in_group + i;
      pair[i] = static_cast<const uint16_t*>(rows[8 * m + r])[c];
    }
    to[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragments {
    uint32_t a[4], b[2];
  };
  const Lanes<Fragments> lanes = exchange(Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  float left[16][16], right[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Fragments fragments = lanes[lane];
    const int group = lane / 4, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
      const int column = i < 4 ? in_group * 2 + i % 2 : in_group * 2 + i % 2 + 8;
      left[row][column] = element<T>(fragments.a, i);
    }
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? in_group * 2 + i % 2 : in_group * 2 + i % 2 + 8;
      right[row][group] = element<T>(fragments.b, i);
    }
  }
  const int group = thread % kWarp / 4, in_group = thread % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? group : group + 8, column = in_group * 2 + i % 2;
    for (int k = 0; k < 16; ++k) c[i] += left[row][k] * right[k][column];
  }
}

}  // namespace on_host

namespace fused_diffusion {

inline void copy_16_bytes(void* to, const void* from, bool exists) {
  on_host::require_packs(to);
  if (exists) on_host::require_packs(from);
  const on_host::Copy copy{to, from, exists};
  if (on_host::at_once()) {
    copy.run();
  } else {
    on_host::copies[on_host::thread].latest.push_back(copy);
  }
}

inline void commit_copies() {
  on_host::Copies& copies = on_host::copies[on_host::thread];
  copies.groups.push_back(std::move(copies.latest));
  copies.latest.clear();
}

template <int kPending>
void wait_for_copies() {
  auto& groups = on_host::copies[on_host::thread].groups;
  for (; groups.size() > kPending; groups.pop_front()) {
    for (const on_host::Copy& copy : groups.front()) copy.run();
  }
}

inline void load_matrices(uint32_t (&to)[4], const void* row) { on_host::load_matrices(to, row, false); }
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) { on_host::load_matrices(to, row, true); }

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  on_host::multiply_add<T>(c, a, b0, b1);
}

template <class T>
uint32_t round_pair(float low, float high, T) {
  T pair[2];
  from_float(low, pair[0]);
  from_float(high, pair[1]);
  return pair[0].bits | static_cast<uint32_t>(pair[1].bits) << 16;
}

inline float approximate_exp2(float x) { return exp2f(x); }

inline float approximate_reciprocal(float x) { return 1.0f / x; }

}  // namespace fused_diffusion
