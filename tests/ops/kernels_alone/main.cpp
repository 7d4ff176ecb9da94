// Runs the CPU kernels without torch on numbers that are the same on every processor, and prints what they give.
#include <cstdio>
#include <memory>
#include <random>

#include "lanes_cpu.h"
#include "masks_cpu.h"
#include "ms_deform_attn_cpu.h"

using namespace solq;

namespace {

std::mt19937 generator(0);  // the standard fixes its numbers, unlike those of its distributions

template <typename Real>
std::vector<Real> draw(size_t count, double low, double high) {
  std::vector<Real> numbers(count);
  for (Real& number : numbers) number = Real(low + (high - low) * (generator() / 4294967296.0));
  return numbers;
}

template <typename Numbers>
void print(const char* name, const Numbers& numbers) {
  std::printf("%s", name);
  for (const auto number : numbers) std::printf(" %.9g", double(number));
  std::printf("\n");
}

template <typename Real, int kWidth>
void attend(int64_t width) {
  const Sizes sizes{2, 20 + 6, 2, width, 5, 3, {{4, 5, 0}, {2, 3, 20}}};
  const int64_t units = sizes.batch * sizes.heads * int64_t(sizes.levels.size());
  const int64_t rows = sizes.batch * sizes.queries * sizes.heads, samples = rows * sizes.samples_per_row();
  const auto value = draw<Real>(sizes.batch * sizes.cells * sizes.heads * width, -1, 1);
  const auto locations = draw<Real>(2 * samples, -0.2, 1.2), weights = draw<Real>(samples, 0, 1);
  const auto gradient = draw<Real>(rows * width, -1, 1);
  const Inputs<Real> inputs{value.data(), locations.data(), weights.data()};
  std::vector<Real> output(rows * width), to_value(value.size()), to_locations(2 * samples), to_weights(samples);
  forward_rows<Real, kWidth>(sizes, inputs, output.data(), 0, rows);
  const Gradients<Real> to{to_value.data(), to_locations.data(), to_weights.data()};
  backward_units<Real, kWidth>(sizes, inputs, gradient.data(), to, 0, units);
  for (const auto& numbers : {output, to_value, to_locations, to_weights}) print("attention", numbers);
}

void transform() {
  constexpr int64_t kSize = 19, kRows = 4, kColumns = 5;
  const auto rows = draw<double>(kRows * kSize, -1, 1), columns = draw<double>(kColumns * kSize, -1, 1);
  const std::vector<int64_t> kept{0, 1, 5, 10, 6, 2, 19};
  const Cosines cosines{kSize, kRows, kColumns, int64_t(kept.size()), rows.data(), columns.data(), kept.data()};
  const auto vectors = draw<float>(3 * kept.size(), -1, 1);
  const auto bits = std::make_unique<bool[]>(3 * cosines.pixels());
  std::vector<float> decoded(3 * cosines.pixels()), encoded(vectors.size());
  dct_decode(cosines, vectors.data(), 3, decoded.data());
  dct_decode_bits(cosines, vectors.data(), 3, bits.get());
  dct_encode(cosines, bits.get(), 3, encoded.data());
  print("dct_decode", decoded);
  print("dct_encode", encoded);
}

void paste_and_crop() {
  constexpr int64_t kSize = 17, kHeight = 40, kWidth = 50;
  const auto masks = std::make_unique<bool[]>(2 * kSize * kSize), crops = std::make_unique<bool[]>(2 * kSize * kSize);
  for (int64_t i = 0; i < 2 * kSize * kSize; ++i) masks[i] = generator() % 5 > 0;
  const float boxes[8] = {3.25f, 5.5f, 30.75f, 36.f, -4.f, 10.f, 60.f, 30.5f};
  const auto codes = paste_to_counts(masks.get(), kSize, boxes, 2, kHeight, kWidth);
  const std::string texts = codes[0] + codes[1];
  const int64_t ends[2] = {int64_t(codes[0].size()), int64_t(texts.size())};
  const int64_t heights[2] = {kHeight, kHeight}, corners[4] = {};
  crop_codes({texts.data(), ends, 2}, heights, corners, boxes, kHeight, kWidth, kSize, crops.get());
  print("paste", texts);
  print("crop", std::vector<int>(crops.get(), crops.get() + 2 * kSize * kSize));
}

}  // namespace

int main() {
  std::printf("%s\n", kInstructionSet);
  attend<float, 48>(48);
  attend<float, 12>(12);
  attend<float, 0>(7);
  attend<double, 16>(16);
  transform();
  paste_and_crop();
}
