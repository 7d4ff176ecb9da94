// Objects, given as run-length codes, as masks of N x N cells of their boxes: ROI-align of the bitmap at a threshold of
// one half. A cell averages bilinear samples, and both the interpolation and the average are separable:
//
//   sums (N, N) = down (N, height) * bitmap (height, width) * across (width, N)
//
// A column of the bitmap is a few runs of ones, and `down` sums over a run to the difference of two of its running
// sums. The arithmetic of positions and weights is that of `solq_lab.masks._sample_axis`. One task is some objects.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "lanes_cpu.h"
#include "masks_cpu.h"
#include "rle.h"

namespace solq {
namespace {

using Vector = Lanes<float>;

constexpr int64_t kTile = 16;  // cells a side, transposed together

// How the cells of a box sample the pixels of one axis: each pixel's weights in the cells that it touches, in the order
// of pixels and cells.
struct Sampling {
  int64_t start = 0, stop = 0;  // the pixels that any sample touches
  int64_t samples = 0;          // of a cell

  // weights: (stop - start, stride) of which N columns count.
  bool place(float low, float high, int64_t cells, int64_t stride, int64_t length, std::vector<float>& weights) {
    const float side = (high - low) / float(cells);
    if (!(side > 0) || !std::isfinite(side)) return false;
    samples = int64_t(std::ceil(side));
    const int64_t count = cells * samples;
    const double step = side / float(samples), first = low - 0.5f;
    const auto position = [&](int64_t sample) { return first + (double(sample) + 0.5) * step; };
    if (!(position(count - 1) >= -1 && position(0) <= double(length))) return false;
    const auto clipped = [&](int64_t sample) { return std::clamp(position(sample), 0.0, double(length - 1)); };
    start = int64_t(clipped(0));
    stop = std::min(int64_t(clipped(count - 1)) + 1, length - 1) + 1;
    sums_.assign((stop - start) * stride, 0);
    bool touched = false;
    for (int64_t cell = 0; cell < cells; ++cell) {
      for (int64_t sample = cell * samples; sample < (cell + 1) * samples; ++sample) {
        if (position(sample) < -1 || position(sample) > double(length)) continue;
        touched = true;
        const double at = clipped(sample);  // the outermost pixels reach half a pixel further
        const int64_t before = int64_t(at), after = std::min(before + 1, length - 1);
        sums_[(before - start) * stride + cell] += 1 - (at - double(before));
        sums_[(after - start) * stride + cell] += at - double(before);
      }
    }
    weights.assign(sums_.begin(), sums_.end());
    return touched;
  }

 private:
  std::vector<double> sums_;
};

class Cropper {
 public:
  explicit Cropper(int64_t cells)
      : cells_(cells),
        stride_((cells + Vector::kSize - 1) / Vector::kSize * Vector::kSize),
        profile_(stride_),
        sums_(stride_ * stride_) {}

  // The code of `rows` rows whose first pixel is at `corner` of the image.
  void crop(const char* code, const char* code_end, int64_t rows, const int64_t* corner, const float* box,
            int64_t height, int64_t width, bool* mask) {
    const bool meets = across_.place(box[0], box[2], cells_, stride_, width, across_weights_) &&
                       down_.place(box[1], box[3], cells_, stride_, height, down_weights_);
    if (!meets) return;
    sum_down_weights();
    expand(code, code_end, places_);
    std::fill(sums_.begin(), sums_.end(), 0.0f);
    const int64_t top = down_.start - corner[1], bottom = down_.stop - corner[1];  // of the window, in the code's rows
    size_t run = 0;
    for (int64_t x = across_.start; x < across_.stop; ++x) {
      const int64_t column = (x - corner[0]) * rows;
      while (run < places_.size() && places_[run + 1] <= column) run += 2;
      if (column < 0 || run == places_.size() || places_[run] >= column + rows) continue;
      std::fill(profile_.begin(), profile_.end(), 0.0f);
      for (size_t i = run; i < places_.size() && places_[i] < column + rows; i += 2) {
        const int64_t from = std::clamp(std::max(places_[i] - column, int64_t(0)), top, bottom) - top;
        const int64_t to = std::clamp(std::min(places_[i + 1] - column, rows), top, bottom) - top;
        if (from < to) add_run(from, to);
      }
      add_column(&across_weights_[(x - across_.start) * stride_]);
    }
    const float half = float(down_.samples * across_.samples) / 2;  // of a cell's samples
    for (int64_t down = 0; down < cells_; down += kTile) {
      for (int64_t across = 0; across < cells_; across += kTile) {
        for (int64_t i = down; i < std::min(down + kTile, cells_); ++i) {
          for (int64_t j = across; j < std::min(across + kTile, cells_); ++j) {
            mask[i * cells_ + j] = sums_[j * stride_ + i] >= half;
          }
        }
      }
    }
  }

 private:
  // From weights to running sums: row y becomes the sum of the rows above, and a row is added for the sum of all.
  void sum_down_weights() {
    const int64_t rows = down_.stop - down_.start;
    running_.assign((rows + 1) * stride_, 0);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t cell = 0; cell < stride_; cell += Vector::kSize) {
        const float* const before = &running_[row * stride_ + cell];
        Vector::store(&running_[(row + 1) * stride_ + cell],
                      Vector::load(before) + Vector::load(&down_weights_[row * stride_ + cell]));
      }
    }
  }

  void add_run(int64_t from, int64_t to) {
    for (int64_t cell = 0; cell < stride_; cell += Vector::kSize) {
      float* const total = &profile_[cell];
      Vector::store(total, Vector::load(total) + (Vector::load(&running_[to * stride_ + cell]) -
                                                  Vector::load(&running_[from * stride_ + cell])));
    }
  }

  // sums_[across][down] += weight[across] * profile[down]
  void add_column(const float* weights) {
    for (int64_t across = 0; across < cells_; ++across) {
      if (weights[across] == 0) continue;
      for (int64_t cell = 0; cell < stride_; cell += Vector::kSize) {
        float* const total = &sums_[across * stride_ + cell];
        Vector::store(total, Vector::load(total) + weights[across] * Vector::load(&profile_[cell]));
      }
    }
  }

  int64_t cells_, stride_;  // N, and N filled up to whole vectors
  Sampling across_, down_;
  std::vector<float> across_weights_, down_weights_, running_, profile_, sums_;
  std::vector<int64_t> places_;
};

}  // namespace

void crop_codes(const Codes& codes, const int64_t* heights, const int64_t* corners, const float* boxes, int64_t height,
                int64_t width, int64_t mask_size, bool* masks) {
  at::parallel_for(0, codes.count, 1, [&](int64_t begin, int64_t end) {
    Cropper cropper(mask_size);
    for (int64_t k = begin; k < end; ++k) {
      cropper.crop(codes.texts + (k > 0 ? codes.ends[k - 1] : 0), codes.texts + codes.ends[k], heights[k],
                   corners + 2 * k, boxes + 4 * k, height, width, masks + k * mask_size * mask_size);
    }
  });
}

}  // namespace solq
