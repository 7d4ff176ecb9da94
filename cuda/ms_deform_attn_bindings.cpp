// The CUDA kernels as operators of torch: sizes checked, outputs allocated, kernels launched on the current stream.
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "ms_deform_attn_arguments.h"
#include "ms_deform_attn_cuda.h"

namespace solq {
namespace {

Type type_of(const at::Tensor& value) {
  switch (value.scalar_type()) {
    case at::kDouble: return Type::kDouble;
    case at::kFloat: return Type::kFloat;
    case at::kHalf: return Type::kHalf;
    case at::kBFloat16: return Type::kBFloat16;
    default: TORCH_CHECK_VALUE(false, "value must be float64, float32, float16 or bfloat16, got ", value.scalar_type());
  }
}

// Contiguous and at an address that 16-byte loads can use, as a view into the middle of a tensor may not be.
at::Tensor prepared(const at::Tensor& tensor) {
  const at::Tensor dense = tensor.contiguous();
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : dense.clone();
}

// An address of another device would fail inside the kernel, and with it every later CUDA call of the process.
void check_device(const char* name, const at::Tensor& tensor, const at::Tensor& value) {
  TORCH_CHECK_VALUE(tensor.device() == value.device(), name, " must be on ", value.device(), " like the value, got ",
                    tensor.device());
}

// What the kernels cannot do is rejected here, before anything is allocated.
Sizes read_cuda_sizes(const at::Tensor& value, at::IntArrayRef flat_shapes, const at::Tensor& locations,
                      const at::Tensor& weights) {
  check_device("sampling_locations", locations, value);
  check_device("attention_weights", weights, value);
  const Sizes sizes = read_sizes(value, flat_shapes, locations, weights);
  TORCH_CHECK_VALUE(sizes.levels.size() <= kMaxLevels, "at most ", kMaxLevels, " levels, got ", sizes.levels.size());
  TORCH_CHECK_VALUE(sizes.batch * sizes.heads <= 65535, "at most 65535 images times heads, got ", sizes.batch, " x ",
                    sizes.heads);
  TORCH_CHECK_VALUE(sizes.cells * sizes.heads * sizes.width * 8 < (int64_t(1) << 32), "value ", value.sizes(),
                    " has 2^29 numbers per image or more; the kernels count their bytes in 32 bits");
  TORCH_CHECK_VALUE(sizes.queries * std::max<int64_t>(sizes.width, 32) < (int64_t(1) << 31), "too many queries: ",
                    sizes.queries, " of ", sizes.width, " channels");
  return sizes;
}

// No cells, no channels or no samples: no GPU takes a grid without blocks.
bool nothing_to_do(const at::Tensor& value, const at::Tensor& locations) {
  return value.numel() == 0 || locations.numel() == 0;
}

// The tensors must outlive the launch.
Problem problem_of(const Sizes& sizes, const at::Tensor& value, const at::Tensor& locations,
                   const at::Tensor& weights) {
  Problem problem{type_of(value), int(sizes.batch), int(sizes.cells), int(sizes.heads), int(sizes.width),
                  int(sizes.queries), int(sizes.points), int(sizes.levels.size()), {},
                  value.const_data_ptr(), locations.const_data_ptr(), weights.const_data_ptr()};
  std::copy(sizes.levels.begin(), sizes.levels.end(), problem.levels);
  return problem;
}

at::Tensor ms_deform_attn_cuda(const at::Tensor& value, at::IntArrayRef flat_shapes, const at::Tensor& locations,
                               const at::Tensor& weights) {
  const Sizes sizes = read_cuda_sizes(value, flat_shapes, locations, weights);
  const c10::cuda::CUDAGuard guard(value.device());
  const std::vector<int64_t> shape{sizes.batch, sizes.queries, sizes.heads * sizes.width};
  if (nothing_to_do(value, locations)) return at::zeros(shape, value.options());
  const at::Tensor values = prepared(value), places = prepared(locations), attention = prepared(weights);
  at::Tensor output = at::empty(shape, value.options());
  launch_forward(problem_of(sizes, values, places, attention), output.mutable_data_ptr(),
                 c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ms_deform_attn_backward_cuda(
    const at::Tensor& grad_output, const at::Tensor& value, at::IntArrayRef flat_shapes, const at::Tensor& locations,
    const at::Tensor& weights) {
  const Sizes sizes = read_cuda_sizes(value, flat_shapes, locations, weights);
  const c10::cuda::CUDAGuard guard(value.device());
  const std::vector<int64_t> shape{sizes.batch, sizes.queries, sizes.heads * sizes.width};
  TORCH_CHECK_VALUE(grad_output.sizes() == at::IntArrayRef(shape), "grad_output must be ", at::IntArrayRef(shape),
                    ", got ", grad_output.sizes());
  check_device("grad_output", grad_output, value);
  if (nothing_to_do(value, locations)) {
    return {at::zeros(value.sizes(), value.options()), at::zeros(locations.sizes(), locations.options()),
            at::zeros(weights.sizes(), weights.options())};
  }
  const at::Tensor values = prepared(value), places = prepared(locations), attention = prepared(weights);
  const at::Tensor gradient = prepared(grad_output.to(value.scalar_type()));
  const Problem problem = problem_of(sizes, values, places, attention);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  at::Tensor grad_locations = at::empty_like(places), grad_weights = at::empty_like(attention);

  if (at::globalContext().deterministicAlgorithms()) {
    const auto largest_of = [&](const at::Tensor& tensor) {
      return tensor.abs().amax().to(attention.scalar_type()).reshape(1);
    };
    const at::Tensor largest = at::cat({largest_of(gradient), largest_of(attention)});
    at::Tensor sums = at::zeros(values.sizes(), values.options().dtype(at::kLong)), grad_value = at::empty_like(values);
    launch_deterministic_backward(problem, gradient.const_data_ptr(), largest.const_data_ptr(),
                                  reinterpret_cast<long long*>(sums.mutable_data_ptr<int64_t>()),
                                  grad_value.mutable_data_ptr(), grad_locations.mutable_data_ptr(),
                                  grad_weights.mutable_data_ptr(), stream);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return {grad_value, grad_locations, grad_weights};
  }
  at::Tensor grad_value = at::zeros(values.sizes(), values.options().dtype(attention.scalar_type()));
  launch_backward(problem, gradient.const_data_ptr(), grad_value.mutable_data_ptr(), grad_locations.mutable_data_ptr(),
                  grad_weights.mutable_data_ptr(), stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {grad_value.to(value.scalar_type()), grad_locations, grad_weights};
}

}  // namespace
}  // namespace solq

TORCH_LIBRARY_FRAGMENT(solq_lab, library) {
  library.def(
      "ms_deform_attn_cuda(Tensor value, int[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights)"
      " -> Tensor");
  library.impl("ms_deform_attn_cuda", torch::dispatch(c10::kCUDA, &solq::ms_deform_attn_cuda));
  library.def(
      "ms_deform_attn_backward_cuda(Tensor grad_output, Tensor value, int[] spatial_shapes, Tensor sampling_locations,"
      " Tensor attention_weights) -> (Tensor, Tensor, Tensor)");
  library.impl("ms_deform_attn_backward_cuda", torch::dispatch(c10::kCUDA, &solq::ms_deform_attn_backward_cuda));
}
