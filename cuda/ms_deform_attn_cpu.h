// The arithmetic of deformable attention on the CPU, free of torch: vector registers along the channels.
//
//   value      (B, S, M, D)        S: the cells of all levels, one level after another
//   locations  (B, Q, M, L, P, 2)
//   weights    (B, Q, M, L, P)
//   output     (B, Q, M, D)
//
// Forward: one unit of work is the row of a query and a head; neighbours in the order (B, M, Q) read the same head's
// map, a part of the values small enough for a cache. Backward: one unit is (image, head, level); it alone writes the
// gradient of that slice of the values and visits the queries in order, so no bit depends on the number of threads.
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>
#include <vector>

#include "lanes_cpu.h"
#include "ms_deform_attn.h"

namespace solq {

constexpr int kBlock = 64;  // samples whose footprints are computed together
// The D channels of one row, in registers: the widest ones that D fills, which for D = 12 are those of 4 numbers.
template <typename Real, int kWidth>
class Channels {
  static constexpr int kBytes = kWidth * sizeof(Real);
  using Vector = Lanes<Real, std::min(kRegisterBytes, kBytes & -kBytes)>;
  static constexpr int kCount = kWidth / Vector::kSize;

 public:
  explicit Channels(int64_t) {}

  SOLQ_INLINE void clear() {
    for (int i = 0; i < kCount; ++i) numbers_[i] = typename Vector::Register{};
  }
  SOLQ_INLINE void load(const Real* row) {
    for (int i = 0; i < kCount; ++i) numbers_[i] = Vector::load(row + i * Vector::kSize);
  }
  SOLQ_INLINE void store(Real* row) const {
    for (int i = 0; i < kCount; ++i) Vector::store(row + i * Vector::kSize, numbers_[i]);
  }
  // this += weight * row
  SOLQ_INLINE void add(Real weight, const Real* row) {
    for (int i = 0; i < kCount; ++i) numbers_[i] += weight * Vector::load(row + i * Vector::kSize);
  }
  // The sum over channels of this * row.
  SOLQ_INLINE Real dot(const Real* row) const {
    typename Vector::Register products = numbers_[0] * Vector::load(row);
    for (int i = 1; i < kCount; ++i) products += numbers_[i] * Vector::load(row + i * Vector::kSize);
    return Vector::sum(products);
  }
  // row += weight * this
  SOLQ_INLINE void scatter(Real weight, Real* row) const {
    for (int i = 0; i < kCount; ++i) {
      Real* const to = row + i * Vector::kSize;
      Vector::store(to, Vector::load(to) + weight * numbers_[i]);
    }
  }

 private:
  typename Vector::Register numbers_[kCount];
};

// The same for a D that is known only now, in memory.
template <typename Real>
class Channels<Real, 0> {
 public:
  explicit Channels(int64_t width) : numbers_(width) {}

  void clear() { std::fill(numbers_.begin(), numbers_.end(), Real(0)); }
  void load(const Real* row) { std::copy_n(row, numbers_.size(), numbers_.begin()); }
  void store(Real* row) const { std::copy(numbers_.begin(), numbers_.end(), row); }
  void add(Real weight, const Real* row) {
    Real* const to = numbers_.data();
#pragma omp simd
    for (size_t i = 0; i < numbers_.size(); ++i) to[i] += weight * row[i];
  }
  Real dot(const Real* row) const {
    const Real* const from = numbers_.data();
    Real total = 0;
#pragma omp simd reduction(+ : total)
    for (size_t i = 0; i < numbers_.size(); ++i) total += from[i] * row[i];
    return total;
  }
  void scatter(Real weight, Real* row) const {
    const Real* const from = numbers_.data();
#pragma omp simd
    for (size_t i = 0; i < numbers_.size(); ++i) row[i] += weight * from[i];
  }

 private:
  std::vector<Real> numbers_;
};

template <typename Real>
struct Inputs {
  const Real *value, *locations, *weights;
};

template <typename Real>
struct Gradients {
  Real *value, *locations, *weights;
};

// Up to kBlock samples, one array per number: loops over samples become vector instructions.
template <typename Real>
struct Block {
  int cell[4][kBlock];
  Real right[kBlock], bottom[kBlock], share[4][kBlock];

  SOLQ_INLINE void set(int i, const Footprint<Real>& one, Real attention) {
    Real shares[4];
    corner_weights(one.right, one.bottom, attention, shares);
    right[i] = one.right;
    bottom[i] = one.bottom;
    cell[0][i] = one.cell[0];
    cell[1][i] = one.cell[1];
    cell[2][i] = one.cell[2];
    cell[3][i] = one.cell[3];
    share[0][i] = shares[0];
    share[1][i] = shares[1];
    share[2][i] = shares[2];
    share[3][i] = shares[3];
  }
};

// Memory that begins with a cache line, so that rows of a specialised width straddle no more lines than they must.
template <typename Real>
class AlignedSpace {
 public:
  Real* zeros(int64_t count) {
    Real* const start = numbers(count);
    std::fill_n(start, count, Real(0));
    return start;
  }
  Real* numbers(int64_t count) {
    constexpr size_t kCacheLine = 64;
    memory_.resize(count + kCacheLine / sizeof(Real));
    void* start = memory_.data();
    size_t room = memory_.size() * sizeof(Real);
    return static_cast<Real*>(std::align(kCacheLine, count * sizeof(Real), start, room));
  }

 private:
  std::vector<Real> memory_;
};

// The level of each sample of a row, likewise.
struct RowLevels {
  std::vector<int> height, width, start;

  explicit RowLevels(const Sizes& sizes) {
    for (const Level& level : sizes.levels) {
      height.insert(height.end(), sizes.points, level.height);
      width.insert(width.end(), sizes.points, level.width);
      start.insert(start.end(), sizes.points, level.start);
    }
  }
};

// Forward, rows begin..end of the order (B, M, Q). A map that is read more often than it has cells is gathered first:
// cells M heads apart touch so many pages of memory that looking up their addresses takes longer than the sums.
template <typename Real, int kWidth>
void forward_rows(const Sizes& sizes, const Inputs<Real>& inputs, Real* output, int64_t begin, int64_t end) {
  const int64_t width = kWidth > 0 ? kWidth : sizes.width;
  const int64_t row_samples = sizes.samples_per_row();
  const int64_t heads_stride = sizes.heads * width;  // from one cell's channels to the next's, in the values
  const std::vector<Real> zeros(width);              // what a corner beyond the map reads
  const RowLevels levels(sizes);
  AlignedSpace<Real> space;
  const Real* maps = nullptr;
  int64_t stride = heads_stride;  // the same in `maps`
  Channels<Real, kWidth> sums(width);
  Block<Real> at;

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t query = unit % sizes.queries, head = unit / sizes.queries % sizes.heads;
    const int64_t image = unit / (sizes.queries * sizes.heads);
    const int64_t row = (image * sizes.queries + query) * sizes.heads + head;  // in the order (B, Q, M)
    if (unit == begin || query == 0) {
      maps = inputs.value + (image * sizes.cells * sizes.heads + head) * width;
      stride = heads_stride;
      const int64_t reads = std::min(sizes.queries - query, end - unit) * row_samples;
      if (sizes.heads > 1 && reads > sizes.cells) {
        Real* const gathered = space.numbers(sizes.cells * width);
        for (int64_t cell = 0; cell < sizes.cells; ++cell) {
          std::copy_n(maps + cell * stride, width, gathered + cell * width);
        }
        maps = gathered;
        stride = width;
      }
    }
    sums.clear();
    for (int64_t first = 0; first < row_samples; first += kBlock) {
      const int count = int(std::min<int64_t>(kBlock, row_samples - first));
      const Real* const xy = inputs.locations + 2 * (row * row_samples + first);
      const Real* const attention = inputs.weights + row * row_samples + first;
      const int *const heights = &levels.height[first], *const widths = &levels.width[first];
      for (int i = 0; i < count; ++i) {
        at.set(i, footprint(xy[2 * i], xy[2 * i + 1], heights[i], widths[i]), attention[i]);
      }
      for (int i = 0; i < count; ++i) {
        const Real* const map = maps + levels.start[first + i] * stride;
        for (int corner = 0; corner < 4; ++corner) {
          const int cell = at.cell[corner][i];
          sums.add(at.share[corner][i], cell == kOutside ? zeros.data() : map + cell * stride);
        }
      }
    }
    sums.store(output + row * width);
  }
}

// Backward, units begin..end of the order (B, M, L).
template <typename Real, int kWidth>
void backward_units(const Sizes& sizes, const Inputs<Real>& inputs, const Real* grad_output, const Gradients<Real>& to,
                    int64_t begin, int64_t end) {
  const int64_t width = kWidth > 0 ? kWidth : sizes.width;
  const int64_t level_count = sizes.levels.size();
  const int64_t stride = sizes.heads * width;
  const std::vector<Real> zeros(width);  // what a corner beyond the map reads
  Channels<Real, kWidth> gradient(width);
  Block<Real> at;
  int64_t place[kBlock];            // of each sample in the order (B, Q, M, L, P)
  const Real* grad_row[kBlock];     // the output's gradient for its query and head
  Real x[kBlock], y[kBlock], attention[kBlock], dot[4][kBlock];
  SampleGradient<Real> result[kBlock];
  AlignedSpace<Real> space;

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t index = unit % level_count, head = unit / level_count % sizes.heads;
    const int64_t image = unit / (level_count * sizes.heads);
    const Level level = sizes.levels[index];
    const int64_t cells = int64_t(level.height) * level.width;
    const int64_t offset = ((image * sizes.cells + level.start) * sizes.heads + head) * width;
    const Real* const map = inputs.value + offset;
    // The map's gradient gathers in one piece of memory, which caches hold better than rows M heads apart. Its last row
    // takes what falls beyond the map.
    Real* const gathered = space.zeros((cells + 1) * width);

    const int64_t samples = sizes.queries * sizes.points;  // of this unit, in the order (Q, P)
    int64_t query = 0, point = 0;
    for (int64_t first = 0; first < samples; first += kBlock) {
      const int count = int(std::min<int64_t>(kBlock, samples - first));
      for (int i = 0; i < count; ++i) {
        const int64_t row = (image * sizes.queries + query) * sizes.heads + head;
        place[i] = (row * level_count + index) * sizes.points + point;
        grad_row[i] = grad_output + row * width;
        x[i] = inputs.locations[2 * place[i]];
        y[i] = inputs.locations[2 * place[i] + 1];
        attention[i] = inputs.weights[place[i]];
        if (++point == sizes.points) {
          point = 0;
          ++query;
        }
      }
      for (int i = 0; i < count; ++i) at.set(i, footprint(x[i], y[i], level.height, level.width), attention[i]);
      // Reads and writes in loops of their own: between stores, processors hold loads back whose addresses look alike.
      for (int i = 0; i < count; ++i) {
        gradient.load(grad_row[i]);
        for (int corner = 0; corner < 4; ++corner) {
          const int cell = at.cell[corner][i];
          dot[corner][i] = gradient.dot(cell == kOutside ? zeros.data() : map + cell * stride);
        }
      }
      for (int i = 0; i < count; ++i) {
        gradient.load(grad_row[i]);
        for (int corner = 0; corner < 4; ++corner) {
          const int64_t cell = at.cell[corner][i];
          gradient.scatter(at.share[corner][i], gathered + (cell == kOutside ? cells : cell) * width);
        }
      }
      for (int i = 0; i < count; ++i) {
        const Real dots[4] = {dot[0][i], dot[1][i], dot[2][i], dot[3][i]};
        result[i] = sample_gradient(dots, at.right[i], at.bottom[i], attention[i], level.height, level.width);
      }
      for (int i = 0; i < count; ++i) {
        to.weights[place[i]] = result[i].weight;
        to.locations[2 * place[i]] = result[i].x;
        to.locations[2 * place[i] + 1] = result[i].y;
      }
    }
    for (int64_t cell = 0; cell < cells; ++cell) {
      std::copy_n(gathered + cell * width, width, to.value + offset + cell * stride);
    }
  }
}

// Calls `run` with the head width as a constant where the kernels have a version for it, else with 0.
template <typename Run>
void with_width(int64_t width, Run run) {
  switch (width) {
    case 2: return run(std::integral_constant<int, 2>());
    case 12: return run(std::integral_constant<int, 12>());
    case 16: return run(std::integral_constant<int, 16>());
    case 24: return run(std::integral_constant<int, 24>());
    case 32: return run(std::integral_constant<int, 32>());
    case 48: return run(std::integral_constant<int, 48>());
    case 64: return run(std::integral_constant<int, 64>());
    default: return run(std::integral_constant<int, 0>());
  }
}

}  // namespace solq
