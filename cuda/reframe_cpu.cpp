// Box-frame masks in the frames of other boxes: bilinear between the cells of the mask, which is zero outside, and cut
// at half. Every mask is interpolated along its columns, a row of the result at a time, and then along that row.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "masks_cpu.h"

namespace solq {
namespace {

constexpr int64_t kMasksPerTask = 64;  // a fifth of a millisecond; for less, waking a thread costs more than it saves

// Where the cells of one frame lie between those of another, along one axis.
struct Cells {
  std::vector<int> first;          // the lower one of two neighbours, counted with a border of one
  std::vector<float> lower, upper;  // their bilinear weights

  explicit Cells(int64_t count) : first(count), lower(count), upper(count) {}

  void place(float center, float side, float other_center, float other_side) {
    const float cells = float(first.size()), scale = other_side / side, shift = 2 * (other_center - center) / side;
    for (size_t i = 0; i < first.size(); ++i) {
      const float place = scale * ((2 * float(i) + 1) / cells - 1) + shift;  // -1..1 over the mask's own box
      float position = ((place + 1) * cells - 1) / 2;
      position = (position > -1) & (position < cells) ? position : -1;  // far away, and NaN: on the border
      const float below = std::floor(position);
      first[i] = int(below) + 1;
      upper[i] = position - below;
      lower[i] = 1 - upper[i];
    }
  }
};

}  // namespace

void reframe(const bool* masks, int64_t size, const float* boxes, const float* others, int64_t count, bool* moved) {
  at::parallel_for(0, count, kMasksPerTask, [&](int64_t begin, int64_t end) {
    Cells down(size), across(size);
    const int64_t padded = size + 2;
    std::vector<float> cells(padded * padded), row(padded);
    for (int64_t k = begin; k < end; ++k) {
      const float *const box = boxes + 4 * k, *const other = others + 4 * k;
      bool* to = moved + k * size * size;
      if (!(other[2] > 0 && other[3] > 0)) {
        std::fill_n(to, size * size, false);
        continue;
      }
      across.place(box[0], box[2], other[0], other[2]);
      down.place(box[1], box[3], other[1], other[3]);
      for (int64_t y = 0; y < size; ++y) {
        std::copy_n(masks + (k * size + y) * size, size, &cells[(y + 1) * padded + 1]);
      }
      for (int64_t y = 0; y < size; ++y, to += size) {
        const float *const upper = &cells[down.first[y] * padded], *const lower = upper + padded;
        for (int64_t x = 0; x < padded; ++x) row[x] = down.lower[y] * upper[x] + down.upper[y] * lower[x];
        for (int64_t x = 0; x < size; ++x) {
          const float* const at = &row[across.first[x]];
          to[x] = across.lower[x] * at[0] + across.upper[x] * at[1] >= 0.5f;
        }
      }
    }
  });
}

}  // namespace solq
