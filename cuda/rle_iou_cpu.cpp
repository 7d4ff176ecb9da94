// The overlap of masks given as run-length codes. All codes are expanded once; a pair then walks along its two lists of
// runs, from the first place that both can cover.
#include <ATen/Parallel.h>

#include <algorithm>

#include "masks_cpu.h"
#include "rle.h"

namespace solq {
namespace {

constexpr int64_t kCodesPerTask = 256;
constexpr int64_t kPairsPerTask = 256;

using Places = std::vector<int64_t>;  // starts and ends of runs of ones, in turn

int64_t area(const Places& places) {
  int64_t total = 0;
  for (size_t i = 0; i < places.size(); i += 2) total += places[i + 1] - places[i];
  return total;
}

int64_t intersection(const Places& one, const Places& other) {
  if (one.empty() || other.empty() || one.back() <= other.front() || other.back() <= one.front()) return 0;
  // The first runs that end behind the other mask's begin.
  const auto first_run = [](const Places& places, int64_t begin) {
    return (std::upper_bound(places.begin(), places.end(), begin) - places.begin()) / 2 * 2;
  };
  size_t i = first_run(one, other.front()), j = first_run(other, one.front());
  int64_t total = 0;
  while (i < one.size() && j < other.size()) {
    const int64_t start = std::max(one[i], other[j]), end_one = one[i + 1], end_other = other[j + 1];
    total += std::max<int64_t>(std::min(end_one, end_other) - start, 0);
    i += end_one <= end_other ? 2 : 0;
    j += end_other <= end_one ? 2 : 0;
  }
  return total;
}

}  // namespace

void rle_ious(const Codes& codes, const int64_t* first, const int64_t* second, const bool* crowd, int64_t pairs,
              int64_t* areas, double* ious) {
  std::vector<Places> masks(codes.count);
  at::parallel_for(0, codes.count, kCodesPerTask, [&](int64_t begin, int64_t end) {
    Places places;
    for (int64_t k = begin; k < end; ++k) {
      expand(codes.texts + (k > 0 ? codes.ends[k - 1] : 0), codes.texts + codes.ends[k], places);
      masks[k].assign(places.begin(), places.end());
      areas[k] = area(places);
    }
  });
  at::parallel_for(0, pairs, kPairsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t common = intersection(masks[first[pair]], masks[second[pair]]);
      const int64_t size = areas[first[pair]];
      const int64_t whole = crowd[pair] ? size : size + areas[second[pair]] - common;
      ious[pair] = common > 0 ? double(common) / double(whole) : 0.0;
    }
  });
}

}  // namespace solq
