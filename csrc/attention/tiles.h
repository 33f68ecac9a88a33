// The positions of a lane's numbers in a 16x8 tensor-core product, and the merging of two softmaxes over different
// keys. Plain functions, which run on the host too.
//
// PTX ISA, "Matrix Fragments for mma.m16n8k16" and "ldmatrix": lane l gives the address of one row of eight 16-bit
// numbers, and receives numbers 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each 8x8 matrix, or with .trans of its
// transpose. Lanes 0 to 7 address the first matrix, 8 to 15 the second, and so on.
#pragma once

#include "common/common.h"

namespace fused_diffusion {

constexpr float kNoMaximum = -__builtin_huge_valf();  // the maximum of an empty set of logits

struct TilePlace {
  int row, column;
};

// The four matrices of a 16x16 left factor [row][depth].
FD_HD TilePlace left_row(int lane) { return {lane % 16, lane / 16 * 8}; }

// The four matrices of a right factor [depth 16][column 16], stored as [column][depth]: two products of 8 columns.
FD_HD TilePlace right_row(int lane) { return {lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8}; }

// The four matrices of a right factor [depth 16][column 16], stored as such and loaded with .trans: two products of 8
// columns.
FD_HD TilePlace right_row_transposed(int lane) { return {lane % 16, lane / 16 * 8}; }

// Number i of the four numbers of a 16x8 product that a lane holds.
FD_HD TilePlace product_place(int lane, int i) { return {lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2}; }

// The factor from weights relative to `maximum` to weights relative to `later`, which is larger: a unit of the maxima
// is a factor of 2^octaves. 0 where there were no weights.
FD_HD float rescale(float maximum, float later, float octaves) {
  if (maximum == later) return 1.0f;
  return maximum == kNoMaximum ? 0.0f : exp2f((maximum - later) * octaves);
}

}  // namespace fused_diffusion
