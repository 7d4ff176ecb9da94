// The sizes of one deformable-attention call, read from its tensors and checked with the values in the message.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "ms_deform_attn.h"

namespace solq {

// Args: as the operator's; `flat_shapes` is (H0, W0, H1, W1, ...).
inline Sizes read_sizes(const at::Tensor& value, at::IntArrayRef flat_shapes, const at::Tensor& locations,
                        const at::Tensor& weights) {
  TORCH_CHECK_VALUE(value.dim() == 4, "value must be (B, S, M, D), got ", value.sizes());
  TORCH_CHECK_VALUE(!flat_shapes.empty() && flat_shapes.size() % 2 == 0,
                    "spatial_shapes must be (H0, W0, H1, W1, ...), got ", flat_shapes);
  TORCH_CHECK_VALUE(locations.dim() == 6, "sampling_locations must be (B, Q, M, L, P, 2), got ", locations.sizes());
  Sizes sizes{value.size(0), value.size(1), value.size(2), value.size(3), locations.size(1), locations.size(4), {}};
  const int64_t level_count = int64_t(flat_shapes.size()) / 2;
  int64_t cells = 0;
  for (int64_t level = 0; level < level_count; ++level) {
    const int64_t height = flat_shapes[2 * level], width = flat_shapes[2 * level + 1];
    TORCH_CHECK_VALUE(height >= 0 && width >= 0, "a level cannot be ", height, " x ", width);
    sizes.levels.push_back({int(height), int(width), int(cells)});
    cells += height * width;
  }
  TORCH_CHECK_VALUE(cells == sizes.cells, "spatial_shapes ", flat_shapes, " hold ", cells, " cells, value has ",
                    sizes.cells);
  TORCH_CHECK_VALUE(cells * sizes.heads * sizes.width <= std::numeric_limits<int>::max(), "value ", value.sizes(),
                    " has more than 2^31 numbers per image; the kernels count them in 32 bits");
  const std::vector<int64_t> expected{sizes.batch, sizes.queries, sizes.heads, level_count, sizes.points, 2};
  TORCH_CHECK_VALUE(locations.sizes() == at::IntArrayRef(expected), "sampling_locations must be ",
                    at::IntArrayRef(expected), " for value ", value.sizes(), ", got ", locations.sizes());
  TORCH_CHECK_VALUE(weights.sizes() == locations.sizes().slice(0, 5), "attention_weights must be ",
                    locations.sizes().slice(0, 5), " like the locations, got ", weights.sizes());
  const auto exact = value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(locations.scalar_type() == exact && weights.scalar_type() == exact,
                    "sampling_locations and attention_weights must be ", exact, " for values of type ",
                    value.scalar_type(), ", got ", locations.scalar_type(), " and ", weights.scalar_type());
  return sizes;
}

}  // namespace solq
