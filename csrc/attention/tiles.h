// Where the numbers of a 16x8 tensor-core product lie in a warp, and how two softmaxes over different keys are
// merged: plain functions, the same on the host.
//
// PTX ISA, "Matrix Fragments for mma.m16n8k16" and "ldmatrix": lane l gives the address of one row of eight
// 16-bit numbers, and receives numbers 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each 8x8 matrix, or of its
// transpose with .trans. Lanes 0 to 7 address the first matrix, 8 to 15 the second, and so on.
#pragma once

#include "common/common.h"

namespace fused_diffusion {

constexpr float kNothing = -__builtin_huge_valf();  // the maximum of no logits

struct TilePlace {
  int row, column;
};

// The four matrices of a 16x16 left factor [row][depth].
FD_HD TilePlace left_row(int lane) { return {lane % 16, lane / 16 * 8}; }

// Those of a right factor [depth 16][column 16], stored as [column][depth]: two products of 8 columns.
FD_HD TilePlace right_row(int lane) { return {lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8}; }

// Those of a right factor [depth 16][column 16], stored as it is and loaded with .trans: two of 8 columns.
FD_HD TilePlace right_row_transposed(int lane) { return {lane % 16, lane / 16 * 8}; }

// Number i of the four that a lane holds of a 16x8 product.
FD_HD TilePlace product_place(int lane, int i) { return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2}; }

// What weights relative to one maximum are worth relative to a later, larger one, where a unit of the maxima is
// `octaves` powers of two; nothing where there were none.
FD_HD float rescale(float maximum, float later, float octaves) {
  if (maximum == later) return 1.0f;
  return maximum == kNothing ? 0.0f : exp2f((maximum - later) * octaves);
}

}  // namespace fused_diffusion
