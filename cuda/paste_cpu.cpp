// Box-frame masks straight to compressed COCO run-length codes: each mask is sampled inside its box only, one image
// column after another, and what comes out is the list of places where 0 and 1 change. No image is ever made.
//
// A pixel lies between four cells, two neighbours of each of two neighbouring columns of the mask. Columns are kept as
// bits, so that a few logical operations find where all four agree; only pixels between the others are computed.
//
// The result equals, byte for byte, run-length coding of `solq_lab.masks.paste_masks`: every rounding is that of its
// float32 operations, in its order. One task is some masks, so threads change nothing.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

#include "masks_cpu.h"
#include "rle.h"

namespace solq {
namespace {

constexpr int64_t kWord = 64, kByte = 8;  // bits
constexpr int64_t kBorder = kByte;        // cells of zeros around a mask, so that no sample needs a bounds check
constexpr int64_t kMasksPerTask = 128;    // about a millisecond; for less, waking a thread costs more than it saves

// Where the pixel centres start..stop of one axis fall between the cells of a mask.
struct Axis {
  int64_t start = 0, stop = 0;
  std::vector<int64_t> cell;  // the lower one of two neighbouring cells, counted with the border; never falls
  // Their bilinear weights: numbers of float32, as doubles. The product of two of them is then exact, and rounding it
  // to float32 is a step of its own, which no compiler fuses with the sum that follows.
  std::vector<double> lower, upper;

  void place(float low, float high, int64_t cells, int64_t length) {
    start = int64_t(std::clamp(std::floor(low) - 1, 0.0f, float(length)));
    stop = int64_t(std::clamp(std::ceil(high) + 1, 0.0f, float(length)));
    const int64_t count = std::max<int64_t>(stop - start, 0);
    cell.resize(count);
    lower.resize(count);
    upper.resize(count);
    const double half = double(cells) / 2;
    for (int64_t i = 0; i < count; ++i) {
      const float center = float(start + i) + 0.5f;
      const float grid = (center - low) / (high - low) * 2 - 1;
      const float position = float(double(grid + 1) * half) - 0.5f;
      const float first = std::floor(position);
      const float above = position - first;
      cell[i] = int64_t(std::clamp(first, -float(kBorder), float(cells))) + kBorder;
      upper[i] = above;
      lower[i] = 1 - above;
    }
  }
};

bool has_area(const float* box) {
  const bool finite = std::all_of(box, box + 4, [](float side) { return std::isfinite(side); });
  return finite && box[0] < box[2] && box[1] < box[3];
}

class Paster {
 public:
  Paster(int64_t cells, int64_t height, int64_t width)
      : cells_(cells),
        height_(height),
        width_(width),
        padded_(cells + 2 * kBorder),
        words_(padded_ / kWord + 1),
        byte_(cells) {
    for (auto* bits : {&west_, &east_, &south_west_, &south_east_, &full_, &mixed_}) bits->resize(words_);
  }

  std::string paste(const bool* mask, const float* box) {
    changes_.clear();
    if (!has_area(box)) return changes_.compress(height_ * width_);
    across_.place(box[0], box[2], cells_, width_);
    down_.place(box[1], box[3], cells_, height_);
    const int64_t rows = int64_t(down_.cell.size());
    if (rows > 0 && !across_.cell.empty()) {
      gather_bits(mask);
      find_first_pixels();
      for (size_t i = 0; i < across_.cell.size(); ++i) {
        if (i == 0 || across_.cell[i] != across_.cell[i - 1]) compare_columns(across_.cell[i]);
        const int64_t place = (across_.start + int64_t(i)) * height_ + down_.start;
        paste_column(place, across_.lower[i], across_.upper[i]);
        if (rows < height_) changes_.set(place + rows, false);  // else the run may go on in the next column
      }
      const int64_t end = (across_.stop - 1) * height_ + down_.stop;
      if (end < height_ * width_) changes_.set(end, false);
    }
    return changes_.compress(height_ * width_);
  }

 private:
  static bool bit(const std::vector<uint64_t>& bits, int64_t index) { return bits[index / kWord] >> index % kWord & 1; }
  static int trailing_zeros(uint64_t word) { return word == 0 ? kWord : __builtin_ctzll(word); }

  // columns_: the rows of each column of the mask with its border, as bits. Eight rows at a time become one byte of
  // every column.
  void gather_bits(const bool* mask) {
    columns_.assign(padded_ * words_, 0);
    auto* const bytes = reinterpret_cast<unsigned char*>(&columns_[kBorder * words_]);
    for (int64_t first = 0; first < cells_; first += kByte) {
      std::fill(byte_.begin(), byte_.end(), 0);
      for (int64_t row = std::min(first + kByte, cells_) - 1; row >= first; --row) {
        const bool* const from = mask + row * cells_;
        unsigned char* const to = byte_.data();
#pragma omp simd
        for (int64_t column = 0; column < cells_; ++column) to[column] = to[column] + to[column] + from[column];
      }
      const int64_t place = (first + kBorder) / kByte;
      for (int64_t column = 0; column < cells_; ++column) bytes[column * words_ * kByte + place] = byte_[column];
    }
  }

  // first_pixel_[cell]: the first row of pixels, counted in the window, that lies between this cell and the next one
  // or further down.
  void find_first_pixels() {
    first_pixel_.clear();
    for (size_t pixel = 0; pixel < down_.cell.size(); ++pixel) {
      first_pixel_.resize(down_.cell[pixel] + 1, int64_t(pixel));
    }
    first_pixel_.resize(words_ * kWord + 1, int64_t(down_.cell.size()));
  }

  // Between which cells of two neighbouring columns four ones meet, and between which ones and zeros.
  void compare_columns(int64_t west) {
    for (int64_t word = 0; word < words_; ++word) {
      west_[word] = columns_[west * words_ + word];
      east_[word] = columns_[(west + 1) * words_ + word];
    }
    for (int64_t word = 0; word < words_; ++word) {
      const uint64_t both = west_[word] & east_[word], any = west_[word] | east_[word];
      const bool more = word + 1 < words_;
      south_west_[word] = west_[word] >> 1 | (more ? west_[word + 1] << (kWord - 1) : 0);
      south_east_[word] = east_[word] >> 1 | (more ? east_[word + 1] << (kWord - 1) : 0);
      full_[word] = both & south_west_[word] & south_east_[word];
      mixed_[word] = (any | south_west_[word] | south_east_[word]) & ~full_[word];
    }
  }

  void paste_column(int64_t place, double left, double right) {
    const int64_t start = down_.cell.front(), last = down_.cell.back();
    if (!bit(mixed_, start)) changes_.set(place, bit(full_, start));
    for (int64_t word = start / kWord; word <= last / kWord; ++word) {
      uint64_t mixed = mixed_[word];
      while (mixed != 0) {
        const int first = trailing_zeros(mixed), count = trailing_zeros(~(mixed >> first));
        mixed = first + count < kWord ? mixed >> (first + count) << (first + count) : 0;
        const int64_t cell = word * kWord + first, next = cell + count;
        const int64_t stop = first_pixel_[next];
        for (int64_t y = first_pixel_[cell]; y < stop; ++y) changes_.set(place + y, sample(y, left, right));
        if (next > start && stop < first_pixel_.back() && !bit(mixed_, next)) {
          changes_.set(place + stop, bit(full_, next));
        }
      }
    }
  }

  // The four cells count as 0 or 1, so products with them are exact, fused with the sum or not.
  bool sample(int64_t y, double left, double right) const {
    const int64_t word = down_.cell[y] / kWord, shift = down_.cell[y] % kWord;
    const auto cell = [&](const std::vector<uint64_t>& bits) { return float(bits[word] >> shift & 1); };
    const double up = down_.lower[y], low = down_.upper[y];
    float sum = cell(west_) * float(left * up);
    sum += cell(east_) * float(right * up);
    sum += cell(south_west_) * float(left * low);
    sum += cell(south_east_) * float(right * low);
    return sum >= 0.5f;
  }

  int64_t cells_, height_, width_, padded_, words_;
  Axis across_, down_;
  Changes changes_;
  std::vector<uint64_t> columns_, west_, east_, south_west_, south_east_, full_, mixed_;
  std::vector<unsigned char> byte_;
  std::vector<int64_t> first_pixel_;
};

}  // namespace

std::vector<std::string> paste_to_counts(const bool* masks, int64_t mask_size, const float* boxes, int64_t count,
                                         int64_t height, int64_t width) {
  std::vector<std::string> counts(count);
  at::parallel_for(0, count, kMasksPerTask, [&](int64_t begin, int64_t end) {
    Paster paster(mask_size, height, width);
    for (int64_t k = begin; k < end; ++k) {
      counts[k] = paster.paste(masks + k * mask_size * mask_size, boxes + 4 * k);
    }
  });
  return counts;
}

}  // namespace solq
