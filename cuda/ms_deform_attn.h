// The arithmetic of one deformable-attention sample, shared by the CPU and the CUDA kernels.
//
// A level is a map of height x width cells; the cell in row r and column c covers the normalised square around its
// centre ((c + 1/2) / width, (r + 1/2) / height). A sample at (x, y) mixes the four cells around it:
//
//        0 --------- 1         0 top left     weight (1 - right) (1 - bottom)
//        |    .      |         1 top right    weight      right  (1 - bottom)
//        |    sample |         2 bottom left  weight (1 - right)      bottom
//        2 --------- 3         3 bottom right weight      right       bottom
//
// A cell beyond the map counts as zero. Not finite or far away locations touch nothing.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "inline.h"

namespace solq {

constexpr int kOutside = -1;  // in place of a cell's index where the map ends before the corner

struct Level {
  int height, width;
  int start;  // its first cell in the row of all levels' cells
};

// Of one call.
struct Sizes {
  int64_t batch, cells, heads, width, queries, points;  // B, S, M, D, Q, P
  std::vector<Level> levels;

  int64_t samples_per_row() const { return int64_t(levels.size()) * points; }  // of one query and head
};

template <typename Real>
struct Footprint {
  int cell[4];         // row-major index in the level's map, or kOutside
  Real right, bottom;  // how far the sample is from the left column and the top row, 0..1
};

// Without branches, so that compilers turn a loop over samples into vector instructions.
template <typename Real>
SOLQ_INLINE Footprint<Real> footprint(Real x, Real y, int height, int width) {
  Real column = x * Real(width) - Real(0.5);
  Real row = y * Real(height) - Real(0.5);
  column = (column > Real(-1)) & (column < Real(width)) ? column : Real(-2);  // NaN and huge numbers go where
  row = (row > Real(-1)) & (row < Real(height)) ? row : Real(-2);             // no corner is on the map
  const int left = int(std::floor(column));
  const int top = int(std::floor(row));
  // 0 on the map, kOutside (all bits set) beyond; one unsigned comparison checks both ends.
  const int misses_left = unsigned(left) < unsigned(width) ? 0 : kOutside;
  const int misses_right = unsigned(left + 1) < unsigned(width) ? 0 : kOutside;
  const int misses_top = unsigned(top) < unsigned(height) ? 0 : kOutside;
  const int misses_bottom = unsigned(top + 1) < unsigned(height) ? 0 : kOutside;
  const int first = top * width + left;

  Footprint<Real> result;
  result.cell[0] = first | misses_left | misses_top;
  result.cell[1] = (first + 1) | misses_right | misses_top;
  result.cell[2] = (first + width) | misses_left | misses_bottom;
  result.cell[3] = (first + width + 1) | misses_right | misses_bottom;
  result.right = column - Real(left);
  result.bottom = row - Real(top);
  return result;
}

// The share of each corner in the sample, times `scale` (the attention weight).
template <typename Real>
SOLQ_INLINE void corner_weights(Real right, Real bottom, Real scale, Real (&weight)[4]) {
  const Real upper = scale * (Real(1) - bottom);
  const Real lower = scale * bottom;
  weight[1] = upper * right;
  weight[0] = upper - weight[1];
  weight[3] = lower * right;
  weight[2] = lower - weight[3];
}

template <typename Real>
struct SampleGradient {
  Real weight, x, y;  // for the attention weight and the normalised location
};

// `dot[k]` is the product of the output's gradient with the values at corner k (zero outside), summed over channels.
template <typename Real>
SOLQ_INLINE SampleGradient<Real> sample_gradient(const Real (&dot)[4], Real right, Real bottom, Real attention,
                                                 int height, int width) {
  const Real across_top = dot[1] - dot[0];
  const Real across_bottom = dot[3] - dot[2];
  const Real top = dot[0] + right * across_top;
  const Real down = dot[2] + right * across_bottom - top;
  SampleGradient<Real> result;
  result.weight = top + bottom * down;
  result.x = attention * Real(width) * (across_top + bottom * (across_bottom - across_top));
  result.y = attention * Real(height) * down;
  return result;
}

}  // namespace solq
