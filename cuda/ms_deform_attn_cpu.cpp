// Deformable attention on the CPU as operators of torch: sizes checked, outputs allocated, units shared among threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "ms_deform_attn_arguments.h"
#include "ms_deform_attn_cpu.h"

namespace solq {
namespace {

// Channels read by one task, about half a millisecond: for less, waking a thread costs more than it saves.
constexpr int64_t kTaskWork = int64_t(1) << 22;

int64_t grain(int64_t work_per_unit) { return std::max<int64_t>(1, kTaskWork / std::max<int64_t>(1, work_per_unit)); }

template <typename Real>
void forward(const Sizes& sizes, const Inputs<Real>& inputs, Real* output) {
  const int64_t work = 4 * sizes.samples_per_row() * sizes.width;
  with_width(sizes.width, [&](auto width) {
    at::parallel_for(0, sizes.batch * sizes.heads * sizes.queries, grain(work), [&](int64_t begin, int64_t end) {
      forward_rows<Real, width>(sizes, inputs, output, begin, end);
    });
  });
}

template <typename Real>
void backward(const Sizes& sizes, const Inputs<Real>& inputs, const Real* grad_output, const Gradients<Real>& to) {
  const int64_t units = sizes.batch * sizes.heads * int64_t(sizes.levels.size());
  const int64_t work = 8 * sizes.queries * sizes.points * sizes.width;
  with_width(sizes.width, [&](auto width) {
    at::parallel_for(0, units, grain(work), [&](int64_t begin, int64_t end) {
      backward_units<Real, width>(sizes, inputs, grad_output, to, begin, end);
    });
  });
}

// Half-precision values are widened once; sums and gradients are those of float32, rounded at the end.
at::Tensor widened(const at::Tensor& tensor) {
  const auto type = tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return tensor.to(type).contiguous();
}

template <typename Real>
Inputs<Real> pointers(const at::Tensor& value, const at::Tensor& locations, const at::Tensor& weights) {
  return {value.const_data_ptr<Real>(), locations.const_data_ptr<Real>(), weights.const_data_ptr<Real>()};
}

template <typename Run>
void with_real(const at::Tensor& tensor, Run run) {
  tensor.scalar_type() == at::kDouble ? run(double()) : run(float());
}

at::Tensor ms_deform_attn_cpu(const at::Tensor& value, at::IntArrayRef flat_shapes, const at::Tensor& locations,
                              const at::Tensor& weights) {
  const Sizes sizes = read_sizes(value, flat_shapes, locations, weights);
  const at::Tensor wide = widened(value), places = locations.contiguous(), attention = weights.contiguous();
  at::Tensor output = at::empty({sizes.batch, sizes.queries, sizes.heads * sizes.width}, wide.options());
  with_real(wide, [&](auto real) {
    using Real = decltype(real);
    forward<Real>(sizes, pointers<Real>(wide, places, attention), output.mutable_data_ptr<Real>());
  });
  return output.to(value.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& value, at::IntArrayRef flat_shapes, const at::Tensor& locations,
    const at::Tensor& weights) {
  const Sizes sizes = read_sizes(value, flat_shapes, locations, weights);
  const std::vector<int64_t> expected{sizes.batch, sizes.queries, sizes.heads * sizes.width};
  TORCH_CHECK_VALUE(grad_output.sizes() == at::IntArrayRef(expected), "grad_output must be ",
                    at::IntArrayRef(expected), ", got ", grad_output.sizes());
  const at::Tensor wide = widened(value), gradient = grad_output.to(wide.scalar_type()).contiguous();
  const at::Tensor places = locations.contiguous(), attention = weights.contiguous();
  at::Tensor grad_value = at::empty_like(wide), grad_locations = at::empty_like(places);
  at::Tensor grad_weights = at::empty_like(attention);
  with_real(wide, [&](auto real) {
    using Real = decltype(real);
    const Gradients<Real> to{grad_value.mutable_data_ptr<Real>(), grad_locations.mutable_data_ptr<Real>(),
                             grad_weights.mutable_data_ptr<Real>()};
    backward<Real>(sizes, pointers<Real>(wide, places, attention), gradient.const_data_ptr<Real>(), to);
  });
  return {grad_value.to(value.scalar_type()), grad_locations, grad_weights};
}

}  // namespace
}  // namespace solq

TORCH_LIBRARY_FRAGMENT(solq_lab, library) {
  library.def(
      "ms_deform_attn_cpu(Tensor value, int[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights)"
      " -> Tensor");
  library.impl("ms_deform_attn_cpu", torch::dispatch(c10::kCPU, &solq::ms_deform_attn_cpu));
  library.def(
      "ms_deform_attn_backward_cpu(Tensor grad_output, Tensor value, int[] spatial_shapes, Tensor sampling_locations,"
      " Tensor attention_weights) -> (Tensor, Tensor, Tensor)");
  library.impl("ms_deform_attn_backward_cpu", torch::dispatch(c10::kCPU, &solq::ms_deform_attn_backward_cpu));
  library.def("cpu_instruction_set() -> str", [] { return std::string(solq::kInstructionSet); });
}
