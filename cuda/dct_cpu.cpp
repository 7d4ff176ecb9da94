// The low corner of the cosine transform of masks, and back. One task is some masks, each worked on in cache.
//
//   mask (N, N)   row basis (U, N)   column basis (V, N)
//   corner (U, V) = row basis * mask * column basis^T;   the vector's D entries are chosen places of the corner
#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>
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

constexpr int kRows = 8;               // rows of a product that are summed together, in registers
constexpr int kPairs = 4;              // of rows of a decoded mask, likewise
constexpr int64_t kMasksPerTask = 32;  // a fifth of a millisecond; for less, waking a thread costs more than it saves
constexpr float kFlat = 1e-3f;         // codecs/base.py's FLAT: a smaller range is rounding

int64_t whole_vectors(int64_t count) { return (count + Vector::kSize - 1) / Vector::kSize * Vector::kSize; }
int64_t whole_blocks(int64_t count) { return (count + kRows - 1) / kRows * kRows; }

// The first `count` numbers of a vector.
SOLQ_INLINE void store_some(float* to, Vector::Register numbers, int64_t count) {
  if (count >= Vector::kSize) return Vector::store(to, numbers);
  float all[Vector::kSize];
  Vector::store(all, numbers);
  std::copy_n(all, count, to);
}

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
      places[found++] = int(start) + std::countr_zero(change) / 8;
    }
    before = cells >> 56;
  }
  if (found % 2 == 1) places[found++] = int(count);
  return found;
}

class Encoder {
 public:
  explicit Encoder(const Cosines& cosines)
      : cosines_(cosines),
        size_(cosines.mask_size),
        stride_(whole_vectors(cosines.columns)),
        height_(whole_blocks(cosines.rows)),
        running_((size_ + 1) * stride_),
        rows_(size_ * height_),
        places_(cosines.kept, cosines.kept + cosines.vector_dim) {
    for (int64_t column = 0; column < cosines.columns; ++column) {
      double sum = 0;
      for (int64_t cell = 0; cell < size_; ++cell) {
        sum += cosines.column_basis[column * size_ + cell];
        running_[(cell + 1) * stride_ + column] = float(sum);
      }
    }
    for (int64_t row = 0; row < cosines.rows; ++row) {
      for (int64_t cell = 0; cell < size_; ++cell) {
        rows_[cell * height_ + row] = float(cosines.row_basis[row * size_ + cell]);
      }
    }
    for (int64_t& place : places_) place = place / cosines.columns * stride_ + place % cosines.columns;
  }

  struct Scratch {
    std::vector<int> changes;
    std::vector<float> half, corner;
  };
  Scratch scratch() const {
    return {std::vector<int>(size_ + 1), std::vector<float>(size_ * stride_), std::vector<float>(height_ * stride_)};
  }

  void encode(const bool* mask, float* vector, Scratch& scratch) const {
    // A row of a mask is a few runs of ones; a basis sums over a run to the difference of two of its running sums.
    for (int64_t row = 0; row < size_; ++row) {
      const int count = find_changes(mask + row * size_, size_, scratch.changes.data());
      for (int64_t column = 0; column < stride_; column += Vector::kSize) {
        const float* const sums = running_.data() + column;
        Vector::Register total{};
        for (int i = 0; i < count; i += 2) {
          const int start = scratch.changes[i], stop = scratch.changes[i + 1];
          total += Vector::load(sums + stop * stride_) - Vector::load(sums + start * stride_);
        }
        Vector::store(&scratch.half[row * stride_ + column], total);
      }
    }
    for (int64_t first = 0; first < height_; first += kRows) {
      for (int64_t column = 0; column < stride_; column += Vector::kSize) {
        Vector::Register sums[kRows] = {};
        for (int64_t cell = 0; cell < size_; ++cell) {
          const Vector::Register half = Vector::load(&scratch.half[cell * stride_ + column]);
          const float* const basis = &rows_[cell * height_ + first];
          for (int i = 0; i < kRows; ++i) sums[i] += basis[i] * half;
        }
        for (int i = 0; i < kRows; ++i) Vector::store(&scratch.corner[(first + i) * stride_ + column], sums[i]);
      }
    }
    for (size_t i = 0; i < places_.size(); ++i) vector[i] = scratch.corner[places_[i]];
  }

 private:
  const Cosines& cosines_;
  int64_t size_, stride_, height_;      // N, and V and U filled up to whole vectors and blocks
  std::vector<float> running_, rows_;   // (N + 1, V): column basis summed over the cells before; (N, U)
  std::vector<int64_t> places_;         // of the vector's entries in the corner (U, V)
};

class Decoder {
 public:
  explicit Decoder(const Cosines& cosines)
      : cosines_(cosines),
        size_(cosines.mask_size),
        stride_(whole_vectors(cosines.mask_size)),
        height_(whole_blocks(cosines.rows)),
        reach_(height_),
        columns_(cosines.columns * stride_),
        rows_(cosines.rows * stride_) {
    for (int64_t column = 0; column < cosines.columns; ++column) {
      std::copy_n(cosines.column_basis + column * size_, size_, &columns_[column * stride_]);
    }
    for (int64_t row = 0; row < cosines.rows; ++row) {
      std::copy_n(cosines.row_basis + row * size_, size_, &rows_[row * stride_]);
    }
    for (int64_t i = 0; i < cosines.vector_dim; ++i) {
      int64_t& reach = reach_[cosines.kept[i] / cosines.columns / kRows * kRows];
      reach = std::max(reach, cosines.kept[i] % cosines.columns + 1);
    }
  }

  struct Scratch {
    std::vector<float> corner, half;
  };
  Scratch scratch() const {
    return {std::vector<float>(height_ * cosines_.columns), std::vector<float>(height_ * stride_)};
  }

  void decode(const float* vector, float* mask, Scratch& scratch) const {
    for (int64_t i = 0; i < cosines_.vector_dim; ++i) scratch.corner[cosines_.kept[i]] = vector[i];
    for (int64_t first = 0; first < height_; first += kRows) {
      const float* const corner = &scratch.corner[first * cosines_.columns];
      for (int64_t cell = 0; cell < stride_; cell += Vector::kSize) {
        Vector::Register sums[kRows] = {};
        for (int64_t column = 0; column < reach_[first]; ++column) {
          const Vector::Register basis = Vector::load(&columns_[column * stride_ + cell]);
          for (int i = 0; i < kRows; ++i) sums[i] += corner[i * cosines_.columns + column] * basis;
        }
        for (int i = 0; i < kRows; ++i) Vector::store(&scratch.half[(first + i) * stride_ + cell], sums[i]);
      }
    }
    // Even basis functions are symmetric, odd ones antisymmetric: a row and its mirror image share their products.
    const int64_t pairs = (size_ + 1) / 2;
    for (int64_t first = 0; first < pairs; first += kPairs) {
      for (int64_t cell = 0; cell < size_; cell += Vector::kSize) {
        Vector::Register sums[2][kPairs] = {};
        int64_t row = 0;
        for (; row + 2 <= cosines_.rows; row += 2) {
          add<0>(scratch, row, first, cell, sums);
          add<1>(scratch, row + 1, first, cell, sums);
        }
        if (row < cosines_.rows) add<0>(scratch, row, first, cell, sums);
        for (int i = 0; i < std::min<int64_t>(kPairs, pairs - first); ++i) {
          const int64_t upper = first + i, lower = size_ - 1 - upper, count = size_ - cell;
          store_some(mask + upper * size_ + cell, sums[0][i] + sums[1][i], count);
          if (upper != lower) store_some(mask + lower * size_ + cell, sums[0][i] - sums[1][i], count);
        }
      }
    }
  }

 private:
  template <int kOdd>
  SOLQ_INLINE void add(const Scratch& scratch, int64_t row, int64_t first, int64_t cell,
                       Vector::Register (&sums)[2][kPairs]) const {
    const Vector::Register half = Vector::load(&scratch.half[row * stride_ + cell]);
    for (int i = 0; i < kPairs; ++i) sums[kOdd][i] += rows_[row * stride_ + first + i] * half;
  }

  const Cosines& cosines_;
  int64_t size_, stride_, height_;       // N, N filled up to whole vectors, U filled up to whole blocks
  std::vector<int64_t> reach_;           // of each block of rows of the corner: columns that are not all zero
  std::vector<float> columns_, rows_;    // the bases (V, N) and (U, N)
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
  const Encoder encoder(cosines);
  at::parallel_for(0, count, kMasksPerTask, [&](int64_t begin, int64_t end) {
    auto scratch = encoder.scratch();
    for (int64_t k = begin; k < end; ++k) {
      encoder.encode(masks + k * cosines.cells(), vectors + k * cosines.vector_dim, scratch);
    }
  });
}

void dct_decode(const Cosines& cosines, const float* vectors, int64_t count, float* masks) {
  const Decoder decoder(cosines);
  at::parallel_for(0, count, kMasksPerTask, [&](int64_t begin, int64_t end) {
    auto scratch = decoder.scratch();
    for (int64_t k = begin; k < end; ++k) {
      decoder.decode(vectors + k * cosines.vector_dim, masks + k * cosines.cells(), scratch);
    }
  });
}

void dct_decode_bits(const Cosines& cosines, const float* vectors, int64_t count, bool* bits) {
  const Decoder decoder(cosines);
  at::parallel_for(0, count, kMasksPerTask, [&](int64_t begin, int64_t end) {
    auto scratch = decoder.scratch();
    std::vector<float> mask(cosines.cells());
    for (int64_t k = begin; k < end; ++k) {
      decoder.decode(vectors + k * cosines.vector_dim, mask.data(), scratch);
      const auto [low, high] = range(mask.data(), cosines.cells());
      const float cut = high - low < kFlat ? 0.5f : (high + low) / 2;
      bool* const to = bits + k * cosines.cells();
      for (int64_t i = 0; i < cosines.cells(); ++i) to[i] = mask[i] > cut;
    }
  });
}

}  // namespace solq
