// The low corner of the cosine transform of masks, and back. One task is some masks, each worked on in cache.
//
//   mask (N, N)   row basis (U, N)   column basis (V, N)
//   corner (U, V) = row basis * mask * column basis^T;   the vector's D entries are chosen places of the corner
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "lanes_cpu.h"
#include "masks_cpu.h"

namespace solq {
namespace {

using Vector = Lanes<float>;

// A product is summed in tiles of 6 rows by 2 vectors: with 2 vectors of the right factor and one number of the left,
// 15 of the 16 registers that the smallest processors have.
constexpr int kRows = 6, kVectors = 2;
constexpr int64_t kColumns = kVectors * Vector::kSize;
constexpr int64_t kMasksPerTask = 32;  // a fifth of a millisecond; for less, waking a thread costs more than it saves
constexpr float kFlat = 1e-3f;         // codecs/base.py's FLAT: a smaller range is rounding

int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

struct Tile {
  Vector::Register sums[kRows][kVectors] = {};

  // this += left (depth, kRows)^T * right (depth, kColumns); the strides lead from one row of a factor to the next.
  SOLQ_INLINE void add_product(const float* left, int64_t left_stride, const float* right, int64_t right_stride,
                               int64_t depth) {
    for (int64_t k = 0; k < depth; ++k, left += left_stride, right += right_stride) {
      const Vector::Register numbers[kVectors] = {Vector::load(right), Vector::load(right + Vector::kSize)};
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kVectors; ++j) sums[i][j] += left[i] * numbers[j];
      }
    }
  }

  // The first `count` numbers of row i.
  SOLQ_INLINE void store(int i, float* to, int64_t count = kColumns) const {
    if (count >= kColumns) {
      for (int j = 0; j < kVectors; ++j) Vector::store(to + j * Vector::kSize, sums[i][j]);
    } else {
      float all[kColumns];
      store(i, all);
      std::copy_n(all, count, to);
    }
  }
};

// Where 0 and 1 change along a row, which counts as 0 outside: starts and ends of its runs of ones, in turn.
int find_changes(const bool* row, int64_t count, int* places) {
  int found = 0;
  uint64_t before = 0;  // the cell before the next eight
  for (int64_t start = 0; start < count; start += 8) {
    uint64_t cells = 0;  // one byte each, the first one lowest
    if (start + 8 <= count) {
      std::memcpy(&cells, row + start, 8);
    } else {
      for (int64_t i = start; i < count; ++i) cells |= uint64_t(row[i]) << 8 * (i - start);
    }
    for (uint64_t change = cells ^ (cells << 8 | before); change != 0; change &= change - 1) {
      places[found++] = int(start) + __builtin_ctzll(change) / 8;
    }
    before = cells >> 56;
  }
  if (found % 2 == 1) places[found++] = int(count);
  return found;
}

class Encoder {
 public:
  explicit Encoder(const Cosines& cosines)
      : size_(cosines.mask_size),
        filled_(round_up(cosines.columns, Vector::kSize)),
        stride_(round_up(cosines.columns, kColumns)),
        pairs_(round_up((cosines.rows + 1) / 2, kRows)),
        running_((size_ + 1) * stride_),
        rows_((size_ + 1) / 2 * 2 * pairs_),
        places_(cosines.kept, cosines.kept + cosines.vector_dim),
        reach_(2 * pairs_),
        changes_(size_ + 1),
        half_(size_ * stride_),
        corner_(2 * pairs_ * stride_) {
    for (int64_t column = 0; column < cosines.columns; ++column) {
      double sum = 0;
      for (int64_t pixel = 0; pixel < size_; ++pixel) {
        sum += cosines.column_basis[column * size_ + pixel];
        running_[(pixel + 1) * stride_ + column] = float(sum);
      }
    }
    for (int64_t row = 0; row < cosines.rows; ++row) {
      for (int64_t pixel = 0; pixel < (size_ + 1) / 2; ++pixel) {
        rows_[pixel * 2 * pairs_ + sorted(row)] = float(cosines.row_basis[row * size_ + pixel]);
      }
    }
    for (int64_t& place : places_) {
      const int64_t row = sorted(place / cosines.columns), column = place % cosines.columns;
      int64_t& reach = reach_[row / kRows * kRows];
      reach = std::max(reach, column + 1);
      place = row * stride_ + column;
    }
  }

  void encode(const bool* mask, float* vector) {
    // A row of a mask is a few runs of ones; a basis sums over a run to the difference of two of its running sums.
    for (int64_t row = 0; row < size_; ++row) {
      const int count = find_changes(mask + row * size_, size_, changes_.data());
      for (int64_t column = 0; column < filled_; column += Vector::kSize) {
        const float* const sums = running_.data() + column;
        Vector::Register total{};
        for (int i = 0; i < count; i += 2) {
          const int start = changes_[i], stop = changes_[i + 1];
          total += Vector::load(sums + stop * stride_) - Vector::load(sums + start * stride_);
        }
        Vector::store(&half_[row * stride_ + column], total);
      }
    }

    // Even basis functions are symmetric and want the sum of a row and its mirror image, odd ones the difference.
    for (int64_t row = 0; row < size_ / 2; ++row) {
      float *const upper = &half_[row * stride_], *const lower = &half_[(size_ - 1 - row) * stride_];
      for (int64_t column = 0; column < filled_; column += Vector::kSize) {
        const auto above = Vector::load(upper + column), below = Vector::load(lower + column);
        Vector::store(upper + column, above + below);
        Vector::store(lower + column, above - below);
      }
    }
    multiply_rows(0, half_.data(), stride_, (size_ + 1) / 2);
    multiply_rows(pairs_, half_.data() + (size_ - 1) * stride_, -stride_, size_ / 2);
    for (size_t i = 0; i < places_.size(); ++i) vector[i] = corner_[places_[i]];
  }

 private:
  // Place of a basis function in the order of the tiles: first the even ones, then the odd ones.
  int64_t sorted(int64_t row) const { return row % 2 * pairs_ + row / 2; }

  // The corner's rows from `first` to `first` + U / 2: even or odd basis times what `half` and its stride lead to.
  void multiply_rows(int64_t first, const float* half, int64_t stride, int64_t depth) {
    for (int64_t row = first; row < first + pairs_; row += kRows) {
      for (int64_t column = 0; column < reach_[row]; column += kColumns) {
        Tile tile;
        tile.add_product(&rows_[row], 2 * pairs_, half + column, stride, depth);
        for (int i = 0; i < kRows; ++i) tile.store(i, &corner_[(row + i) * stride_ + column]);
      }
    }
  }

  int64_t size_, filled_, stride_, pairs_;  // N; V rounded up to whole vectors and to whole tiles; U / 2 to whole tiles
  std::vector<float> running_, rows_;  // (N + 1, V): column basis summed over the pixels before; (N / 2, U), sorted
  std::vector<int64_t> places_;        // of the vector's entries in the corner (U, V)
  std::vector<int64_t> reach_;         // of each tile's rows of the corner: columns that are asked for
  std::vector<int> changes_;           // of one row of a mask
  std::vector<float> half_, corner_;   // (N, V) and (U, V) of one mask
};

class Decoder {
 public:
  explicit Decoder(const Cosines& cosines)
      : size_(cosines.mask_size),
        rows_count_(cosines.rows),
        stride_(round_up(size_, kColumns)),
        height_(round_up(cosines.rows, kRows)),
        pairs_(round_up((size_ + 1) / 2, kRows)),
        places_(cosines.kept, cosines.kept + cosines.vector_dim),
        reach_(height_),
        columns_(cosines.columns * stride_),
        rows_(cosines.rows * pairs_),
        corner_(cosines.columns * height_),
        half_(height_ * stride_) {
    for (int64_t column = 0; column < cosines.columns; ++column) {
      std::copy_n(cosines.column_basis + column * size_, size_, &columns_[column * stride_]);
    }
    for (int64_t row = 0; row < cosines.rows; ++row) {
      std::copy_n(cosines.row_basis + row * size_, (size_ + 1) / 2, &rows_[row * pairs_]);
    }
    for (int64_t& place : places_) {
      const int64_t row = place / cosines.columns, column = place % cosines.columns;
      int64_t& reach = reach_[row / kRows * kRows];
      reach = std::max(reach, column + 1);
      place = column * height_ + row;
    }
  }

  void decode(const float* vector, float* mask) {
    for (size_t i = 0; i < places_.size(); ++i) corner_[places_[i]] = vector[i];
    for (int64_t row = 0; row < height_; row += kRows) {
      for (int64_t pixel = 0; pixel < stride_; pixel += kColumns) {
        Tile tile;
        tile.add_product(&corner_[row], height_, &columns_[pixel], stride_, reach_[row]);
        for (int i = 0; i < kRows; ++i) tile.store(i, &half_[(row + i) * stride_ + pixel]);
      }
    }

    // Even basis functions are symmetric, odd ones antisymmetric: a row and its mirror image share their products.
    for (int64_t first = 0; first < (size_ + 1) / 2; first += kRows) {
      for (int64_t pixel = 0; pixel < size_; pixel += kColumns) {
        Tile even, odd;
        even.add_product(&rows_[first], 2 * pairs_, &half_[pixel], 2 * stride_, (rows_count_ + 1) / 2);
        odd.add_product(&rows_[first + pairs_], 2 * pairs_, &half_[pixel + stride_], 2 * stride_, rows_count_ / 2);
        Tile upper, lower;
        for (int i = 0; i < kRows; ++i) {
          for (int j = 0; j < kVectors; ++j) {
            upper.sums[i][j] = even.sums[i][j] + odd.sums[i][j];
            lower.sums[i][j] = even.sums[i][j] - odd.sums[i][j];
          }
        }
        for (int64_t i = 0; i < std::min<int64_t>(kRows, (size_ + 1) / 2 - first); ++i) {
          const int64_t row = first + i, mirrored = size_ - 1 - row, count = size_ - pixel;
          upper.store(i, mask + row * size_ + pixel, count);
          if (row != mirrored) lower.store(i, mask + mirrored * size_ + pixel, count);
        }
      }
    }
  }

 private:
  int64_t size_, rows_count_, stride_, height_, pairs_;  // N, U; N and U rounded up to whole tiles, N / 2 likewise
  std::vector<int64_t> places_;         // of the vector's entries in the transposed corner (V, U)
  std::vector<int64_t> reach_;          // of each tile's rows of the corner: columns that are not all zero
  std::vector<float> columns_, rows_;   // the bases (V, N) and (U, N / 2)
  std::vector<float> corner_, half_;    // (V, U) and (U, N) of one mask
};

// Smallest and largest number, NaN where one of them is.
std::pair<float, float> range(const float* numbers, int64_t count) {
  float low = std::numeric_limits<float>::infinity(), high = -low;
  int unordered = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(| : unordered)
  for (int64_t i = 0; i < count; ++i) {
    low = numbers[i] < low ? numbers[i] : low;
    high = numbers[i] > high ? numbers[i] : high;
    unordered |= numbers[i] != numbers[i];
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  return unordered ? std::pair(nan, nan) : std::pair(low, high);
}

}  // namespace

void dct_encode(const Cosines& cosines, const bool* masks, int64_t count, float* vectors) {
  at::parallel_for(0, count, kMasksPerTask, [&](int64_t begin, int64_t end) {
    Encoder encoder(cosines);
    for (int64_t k = begin; k < end; ++k) encoder.encode(masks + k * cosines.pixels(), vectors + k * cosines.vector_dim);
  });
}

void dct_decode(const Cosines& cosines, const float* vectors, int64_t count, float* masks) {
  at::parallel_for(0, count, kMasksPerTask, [&](int64_t begin, int64_t end) {
    Decoder decoder(cosines);
    for (int64_t k = begin; k < end; ++k) decoder.decode(vectors + k * cosines.vector_dim, masks + k * cosines.pixels());
  });
}

void dct_decode_bits(const Cosines& cosines, const float* vectors, int64_t count, bool* bits) {
  at::parallel_for(0, count, kMasksPerTask, [&](int64_t begin, int64_t end) {
    Decoder decoder(cosines);
    std::vector<float> mask(cosines.pixels());
    for (int64_t k = begin; k < end; ++k) {
      decoder.decode(vectors + k * cosines.vector_dim, mask.data());
      const auto [low, high] = range(mask.data(), cosines.pixels());
      const float cut = high - low < kFlat ? 0.5f : (high + low) / 2;
      bool* const to = bits + k * cosines.pixels();
      for (int64_t i = 0; i < cosines.pixels(); ++i) to[i] = mask[i] > cut;
    }
  });
}

}  // namespace solq
