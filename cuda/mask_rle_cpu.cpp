// Box-frame masks straight to compressed COCO run-length codes: each mask is sampled inside its box only, one picture
// column after another, and what comes out is the list of places where 0 and 1 change. No picture is ever made.
//
//   masks  (K, N, N) bool, box frame      boxes (K, 4) float32 x0 y0 x1 y1, image pixels
//   a pixel at row y, column x of the picture has place x * height + y: run-length codes go down the columns
//
// The result equals, byte for byte, run-length coding of `solq_lab.masks.paste_masks`: every rounding is that of its
// float32 operations, in its order. One task is one mask, so threads change nothing.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

namespace solq {
namespace {

constexpr int64_t kBorder = 2;       // cells of zeros around a mask, so that no sample has to ask where it is
constexpr int64_t kMasksPerTask = 4;

// A product rounded to float32. Compilers would otherwise fuse it with the sum that follows and round once, not twice.
inline float rounded(float product) {
  volatile float stored = product;
  return stored;
}

// Where the pixel centres start..stop of one axis fall between the cells of a mask.
struct Axis {
  int64_t start = 0, stop = 0;
  std::vector<int64_t> cell;        // the lower one of two neighbouring cells, counted with the border
  std::vector<float> lower, upper;  // their bilinear weights

  Axis(float low, float high, int64_t cells, int64_t length) {
    start = int64_t(std::clamp(std::floor(low) - 1, 0.0f, float(length)));
    stop = int64_t(std::clamp(std::ceil(high) + 1, 0.0f, float(length)));
    const float half = float(cells) / 2;
    for (int64_t pixel = start; pixel < stop; ++pixel) {
      const float center = float(pixel) + 0.5f;
      const float grid = (center - low) / (high - low) * 2 - 1;
      const float position = rounded((grid + 1) * half) - 0.5f;
      const float first = std::floor(position);
      cell.push_back(int64_t(std::clamp(first, -float(kBorder), float(cells))) + kBorder);
      upper.push_back(position - first);
      lower.push_back(1 - upper.back());
    }
  }
};

// The places where a picture changes between 0 and 1; it starts with 0.
class Changes {
 public:
  void set(int64_t place, bool value) {
    if (value != value_) places_.push_back(place);
    value_ = value;
  }

  // COCO's compressed string: run lengths, from the fourth on as differences to the last but one, in groups of five
  // bits, lowest first; the sixth bit says that more follow.
  std::string encode(int64_t pixels) const {
    std::vector<int64_t> runs;
    int64_t before = 0;
    for (const int64_t place : places_) {
      runs.push_back(place - before);
      before = place;
    }
    if (before < pixels || runs.empty()) runs.push_back(pixels - before);
    std::string text;
    text.reserve(2 * runs.size());
    for (size_t i = 0; i < runs.size(); ++i) {
      int64_t rest = i > 2 ? runs[i] - runs[i - 2] : runs[i];
      bool more = true;
      while (more) {
        const int64_t group = rest & 0x1f;
        rest >>= 5;
        more = rest != ((group & 0x10) ? -1 : 0);
        text.push_back(char(48 + group + (more ? 0x20 : 0)));
      }
    }
    return text;
  }

 private:
  std::vector<int64_t> places_;
  bool value_ = false;
};

bool has_area(const float* box) {
  const bool finite = std::all_of(box, box + 4, [](float side) { return std::isfinite(side); });
  return finite && box[0] < box[2] && box[1] < box[3];
}

std::string paste(const bool* mask, int64_t cells, const float* box, int64_t height, int64_t width) {
  Changes changes;
  if (!has_area(box)) return changes.encode(height * width);
  const Axis across(box[0], box[2], cells, width), down(box[1], box[3], cells, height);

  const int64_t padded = cells + 2 * kBorder;
  std::vector<uint8_t> columns(padded * padded, 0);  // the mask with its border, transposed: [column][row]
  for (int64_t row = 0; row < cells; ++row) {
    for (int64_t column = 0; column < cells; ++column) {
      columns[(column + kBorder) * padded + row + kBorder] = mask[row * cells + column];
    }
  }

  const int64_t rows = down.stop - down.start;
  for (int64_t x = across.start; x < across.stop && rows > 0; ++x) {
    const int64_t i = x - across.start, place = x * height + down.start;
    const uint8_t* west = &columns[across.cell[i] * padded];
    const uint8_t* east = west + padded;
    for (int64_t y = 0; y < rows;) {
      const int64_t north = down.cell[y], south = north + 1;
      const int covered = west[north] + east[north] + west[south] + east[south];
      if (covered == 0 || covered == 4) {  // the four weights sum to one: no need to look at the pixels one by one
        changes.set(place + y, covered == 4);
        while (y < rows && down.cell[y] == north) ++y;
        continue;
      }
      float sum = west[north] ? rounded(across.lower[i] * down.lower[y]) : 0.0f;
      sum += east[north] ? rounded(across.upper[i] * down.lower[y]) : 0.0f;
      sum += west[south] ? rounded(across.lower[i] * down.upper[y]) : 0.0f;
      sum += east[south] ? rounded(across.upper[i] * down.upper[y]) : 0.0f;
      changes.set(place + y, sum >= 0.5f);
      ++y;
    }
    if (rows < height) changes.set(place + rows, false);  // else the run may go on in the next column
  }
  const int64_t end = (across.stop - 1) * height + down.stop;
  if (end < height * width) changes.set(end, false);
  return changes.encode(height * width);
}

c10::List<std::string> paste_to_rle(const at::Tensor& masks, const at::Tensor& boxes, int64_t height, int64_t width) {
  TORCH_CHECK_VALUE(masks.dim() == 3 && masks.size(1) == masks.size(2) && masks.scalar_type() == at::kBool,
                    "masks must be (K, N, N) bool, got ", masks.sizes(), " ", masks.scalar_type());
  TORCH_CHECK_VALUE(boxes.dim() == 2 && boxes.size(0) == masks.size(0) && boxes.size(1) == 4 &&
                        boxes.scalar_type() == at::kFloat,
                    "boxes must be (", masks.size(0), ", 4) float32, got ", boxes.sizes(), " ", boxes.scalar_type());
  TORCH_CHECK_VALUE(height > 0 && width > 0, "a picture cannot be ", height, " x ", width, " pixels");
  const at::Tensor dense_masks = masks.contiguous(), dense_boxes = boxes.contiguous();
  const bool* mask = dense_masks.const_data_ptr<bool>();
  const float* box = dense_boxes.const_data_ptr<float>();
  const int64_t cells = masks.size(1);
  std::vector<std::string> counts(masks.size(0));
  at::parallel_for(0, masks.size(0), kMasksPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      counts[k] = paste(mask + k * cells * cells, cells, box + 4 * k, height, width);
    }
  });
  return c10::List<std::string>(counts);
}

}  // namespace
}  // namespace solq

TORCH_LIBRARY_FRAGMENT(solq_lab, library) {
  library.def("paste_to_rle(Tensor masks, Tensor boxes, int height, int width) -> str[]");
  library.impl("paste_to_rle", torch::dispatch(c10::kCPU, &solq::paste_to_rle));
}
