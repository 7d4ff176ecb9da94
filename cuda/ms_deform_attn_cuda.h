// The arguments of the CUDA kernels, free of torch: compiling torch's headers with nvcc takes six times as long.
#pragma once

#include <cuda_runtime_api.h>

#include "ms_deform_attn.h"

namespace solq {

constexpr int kMaxLevels = 8;

enum class Type { kDouble, kFloat, kHalf, kBFloat16 };

// Passed to kernels by value: nothing is read from the device to launch them, so a CUDA graph can hold them.
struct Problem {
  Type type;  // of values, outputs and their gradients; locations and weights are double or float
  int batch, cells, heads, width, queries, points, level_count;
  Level levels[kMaxLevels];
  const void *value, *locations, *weights;
};

void launch_forward(const Problem& problem, void* output, cudaStream_t stream);

// Adds to `grad_value`, which is double or float and zero before; writes the other two.
void launch_backward(const Problem& problem, const void* grad_output, void* grad_value, void* grad_locations,
                     void* grad_weights, cudaStream_t stream);

// The same with sums that do not depend on the order of threads: integers of 64 bits in a unit that fits the largest
// addend. `largest` points to two numbers on the device, the largest sizes in grad_output and in the weights, of their
// accumulating type; `sums` is as large as the values and zero before; `grad_value` is of the type of the values.
void launch_deterministic_backward(const Problem& problem, const void* grad_output, const void* largest,
                                   long long* sums, void* grad_value, void* grad_locations, void* grad_weights,
                                   cudaStream_t stream);

}  // namespace solq
