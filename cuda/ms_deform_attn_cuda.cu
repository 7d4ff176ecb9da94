// Deformable attention on NVIDIA GPUs. No header of torch is included here.
//
//   value      (B, S, M, D)        S: the cells of all levels, one level after another
//   locations  (B, Q, M, L, P, 2)
//   weights    (B, Q, M, L, P)
//   output     (B, Q, M, D)
//
// blockIdx.y is (image, head), so that the threads of a block read one head's map around neighbouring queries.
// Forward: the lanes of a row (one query and head) hold 16 bytes of its D channels each; rows are packed without gaps.
//
//   thread  0 .. D/v-1 | D/v .. 2 D/v-1 | ...          v = 4 float or 8 half channels
//   query        0     |       1        | ...
//
// Backward: 4 channels per lane, rows in groups of 8, 16 or 32 lanes (a power of two, for the sums over channels; of
// D = 48, 12 of 16 lanes hold channels). Lane 0 writes the gradients of a sample's location and weight, which no other
// group touches; the gradients of the four cells are added in memory, 16 bytes at once where the GPU can.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "ms_deform_attn.h"
#include "ms_deform_attn_cuda.h"

namespace solq {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kWholeWarp = 0xffffffffu;

template <typename T>
struct Accumulator {
  using Real = float;
};
template <>
struct Accumulator<double> {
  using Real = double;
};
template <typename T>
using RealOf = typename Accumulator<T>::Real;

__device__ __forceinline__ double widen(double number) { return number; }
__device__ __forceinline__ float widen(float number) { return number; }
__device__ __forceinline__ float widen(__half number) { return __half2float(number); }
__device__ __forceinline__ float widen(__nv_bfloat16 number) { return __bfloat162float(number); }

template <typename T>
__device__ __forceinline__ T narrow(RealOf<T> number) {
  return number;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float number) {
  return __float2half_rn(number);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float number) {
  return __float2bfloat16_rn(number);
}

// kCount neighbouring numbers, read and written in one instruction (two where they exceed 16 bytes).
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T numbers[kCount];
};

template <typename T, int kCount>
__device__ __forceinline__ void read(const T* from, RealOf<T> (&to)[kCount]) {
  const Pack<T, kCount> pack = *reinterpret_cast<const Pack<T, kCount>*>(from);
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = widen(pack.numbers[i]);
}

template <typename T, int kCount>
__device__ __forceinline__ void write(T* to, const RealOf<T> (&from)[kCount]) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pack.numbers[i] = narrow<T>(from[i]);
  *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
}

// Where a cell's numbers are. An image has fewer than 2^32 bytes, so 32 bits count them, in fewer instructions than 64.
template <typename T>
__device__ __forceinline__ T* locate(T* map, int cell, int stride) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(map) + unsigned(cell) * unsigned(stride * sizeof(T)));
}

// The channels at the four corners; zero beyond the map.
template <typename T, int kCount>
__device__ __forceinline__ void read_corners(const T* map, int stride, const int (&cell)[4],
                                             RealOf<T> (&corners)[4][kCount]) {
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) corners[corner][i] = 0;
    if (cell[corner] != kOutside) read<T, kCount>(locate(map, cell[corner], stride), corners[corner]);
  }
}

// The samples of one row and level, up to kPoints at once.
template <typename Real, int kPoints>
struct Samples {
  Real xy[2 * kPoints], attention[kPoints];

  __device__ __forceinline__ void read_all(const Real* locations, const Real* weights) {
    read<Real, 2 * kPoints>(locations, xy);
    read<Real, kPoints>(weights, attention);
  }
};

// kWidth and kPoints are 0 where they are known only at run time; then samples are read one by one.
template <typename T, int kWidth, int kPoints, int kVector>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Problem problem, T* output) {
  using Real = RealOf<T>;
  constexpr int kStep = kPoints > 0 ? kPoints : 1;
  const int width = kWidth > 0 ? kWidth : problem.width;
  const int points = kPoints > 0 ? kPoints : problem.points;
  const unsigned lanes = width / kVector;
  const unsigned index = blockIdx.x * kThreads + threadIdx.x;
  const unsigned query = index / lanes, channel = index % lanes * kVector;
  if (query >= problem.queries) return;
  const int64_t image = blockIdx.y / problem.heads, head = blockIdx.y % problem.heads;
  const int64_t row = (image * problem.queries + query) * problem.heads + head;
  const int stride = problem.heads * width;  // from one cell's channels to the next's
  const T* const maps =
      static_cast<const T*>(problem.value) + (image * problem.cells * problem.heads + head) * width + channel;
  const Real* locations = static_cast<const Real*>(problem.locations) + 2 * row * problem.level_count * points;
  const Real* weights = static_cast<const Real*>(problem.weights) + row * problem.level_count * points;

  Real sums[kVector] = {};
  for (int index = 0; index < problem.level_count; ++index) {
    const Level level = problem.levels[index];
    const T* const map = maps + static_cast<int64_t>(level.start) * stride;
    for (int first = 0; first < points; first += kStep) {
      Samples<Real, kStep> samples;
      samples.read_all(locations, weights);
      locations += 2 * kStep;
      weights += kStep;
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        const auto at = footprint(samples.xy[2 * i], samples.xy[2 * i + 1], level.height, level.width);
        Real share[4], corners[4][kVector];
        corner_weights(at.right, at.bottom, samples.attention[i], share);
        read_corners<T, kVector>(map, stride, at.cell, corners);
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
          for (int lane = 0; lane < kVector; ++lane) sums[lane] += share[corner] * corners[corner][lane];
        }
      }
    }
  }
  write<T, kVector>(output + row * width + channel, sums);
}

// How the gradients of cells are added up: in floating point as they come, or in integers, whose sum does not depend on the order.
// `row` is the place of a lane's channels of one cell.
template <typename RealType>
struct FastSums {
  using Real = RealType;
  using Number = Real;
  Number* sums;

  __device__ __forceinline__ void prepare() {}

  template <int kVector>
  __device__ __forceinline__ void add(Number* row, Real share, const Real (&gradient)[kVector]) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    constexpr bool kFourAtOnce = kVector == 4 && sizeof(Real) == 4;
#else
    constexpr bool kFourAtOnce = false;
#endif
    if constexpr (kFourAtOnce) {
      atomicAdd(reinterpret_cast<float4*>(row), make_float4(share * gradient[0], share * gradient[1],
                                                            share * gradient[2], share * gradient[3]));
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) atomicAdd(row + i, share * gradient[i]);
    }
  }
};

template <typename RealType>
struct OrderlessSums {
  using Real = RealType;
  using Number = unsigned long long;
  Number* sums;
  const Real* largest;  // of the output's gradient, and of the weights
  int headroom;         // bits for the carries of all addends that one cell may get
  double scale;

  // One unit is 1 / scale, a power of two; the largest scale for which no sum can overflow 63 bits. It and its inverse
  // stay finite for the smallest bound.
  __device__ __forceinline__ void prepare() {
    const double bound = double(largest[0]) * double(largest[1]);
    const int exponent = bound > 0 && isfinite(bound) ? 61 - headroom - ilogb(bound) : 0;
    scale = ldexp(1.0, exponent < 1023 ? exponent : 1023);
  }

  template <int kVector>
  __device__ __forceinline__ void add(Number* row, Real share, const Real (&gradient)[kVector]) const {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      // A product of two floats may be beyond them, not beyond double. Negative numbers wrap around and come out right:
      // integers of two's complement.
      atomicAdd(row + i, static_cast<Number>(__double2ll_rn(double(share) * double(gradient[i]) * scale)));
    }
  }
};

template <int kGroup, typename Real>
__device__ __forceinline__ Real sum_over_group(Real number) {
#pragma unroll
  for (int distance = kGroup / 2; distance > 0; distance /= 2) {
    number += __shfl_xor_sync(kWholeWarp, number, distance);
  }
  return number;
}

template <typename T, int kWidth, int kPoints, int kVector, int kGroup, typename Sums>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 3)  // blocks at once: room for 80 registers
    backward_kernel(const Problem problem, const T* grad_output, Sums sums, RealOf<T>* grad_locations,
                    RealOf<T>* grad_weights) {
  using Real = RealOf<T>;
  constexpr int kStep = kPoints > 0 ? kPoints : 1;
  const int width = kWidth > 0 ? kWidth : problem.width;
  const int points = kPoints > 0 ? kPoints : problem.points;
  const unsigned index = blockIdx.x * kThreads + threadIdx.x;
  // No thread may leave early, as the sums over a group need every lane of the warp: what is beyond the last query
  // works on that query with a gradient of zero and writes nothing.
  const bool real_query = index / kGroup < problem.queries;
  const int query = real_query ? index / kGroup : problem.queries - 1;
  const int lane = threadIdx.x % kGroup;
  const int64_t image = blockIdx.y / problem.heads, head = blockIdx.y % problem.heads;
  const int64_t row = (image * problem.queries + query) * problem.heads + head;
  const int stride = problem.heads * width;
  const int64_t maps_offset = (image * problem.cells * problem.heads + head) * width;
  const int64_t first_sample = row * problem.level_count * points;
  const Real* locations = static_cast<const Real*>(problem.locations) + 2 * first_sample;
  const Real* weights = static_cast<const Real*>(problem.weights) + first_sample;
  grad_locations += 2 * first_sample;
  grad_weights += first_sample;
  grad_output += row * width;
  sums.prepare();

  // Where D is known, a lane holds its channels of the output's gradient; else it goes over them for each sample.
  constexpr int kStride = kVector * kGroup;
  Real gradient[kVector] = {};
  const auto load_gradient = [&](int channel) {
    if (real_query && channel < width) read<T, kVector>(grad_output + channel, gradient);
  };
  if constexpr (kWidth > 0) load_gradient(lane * kVector);

  for (int index = 0; index < problem.level_count; ++index) {
    const Level level = problem.levels[index];
    const int64_t level_offset = maps_offset + static_cast<int64_t>(level.start) * stride;
    const T* const map = static_cast<const T*>(problem.value) + level_offset;
    auto* const grad_map = sums.sums + level_offset;
    for (int first = 0; first < points; first += kStep) {
      Samples<Real, kStep> samples;
      samples.read_all(locations, weights);
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        const auto at = footprint(samples.xy[2 * i], samples.xy[2 * i + 1], level.height, level.width);
        Real share[4], dot[4] = {};
        corner_weights(at.right, at.bottom, samples.attention[i], share);
#pragma unroll 1
        for (int channel = lane * kVector; channel < width; channel += kStride) {
          if constexpr (kWidth == 0) load_gradient(channel);
          Real corners[4][kVector];
          read_corners<T, kVector>(map + channel, stride, at.cell, corners);
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
            for (int c = 0; c < kVector; ++c) dot[corner] += gradient[c] * corners[corner][c];
            if (real_query && at.cell[corner] != kOutside) {
              sums.template add<kVector>(locate(grad_map + channel, at.cell[corner], stride), share[corner], gradient);
            }
          }
        }
        // The three gradients are linear in the dot products: three sums over the lanes instead of four.
        auto result = sample_gradient(dot, at.right, at.bottom, samples.attention[i], level.height, level.width);
        result.weight = sum_over_group<kGroup>(result.weight);
        result.x = sum_over_group<kGroup>(result.x);
        result.y = sum_over_group<kGroup>(result.y);
        if (real_query && lane == 0) {
          grad_weights[i] = result.weight;
          const Real xy[2] = {result.x, result.y};
          write<Real, 2>(grad_locations + 2 * i, xy);
        }
      }
      locations += 2 * kStep;
      weights += kStep;
      grad_locations += 2 * kStep;
      grad_weights += kStep;
    }
  }
}

// From integer sums to numbers; not finite where an addend was not.
template <typename T>
__global__ void __launch_bounds__(kThreads) settle_kernel(OrderlessSums<RealOf<T>> sums, T* grad_value, int64_t count) {
  sums.prepare();
  const double bound = double(sums.largest[0]) * double(sums.largest[1]);
  const double unit = isfinite(bound) ? 1.0 / sums.scale : bound - bound;  // NaN
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    grad_value[i] = narrow<T>(RealOf<T>(double(static_cast<long long>(sums.sums[i])) * unit));
  }
}

dim3 grid(const Problem& problem, int lanes) {
  return dim3((int64_t(problem.queries) * lanes + kThreads - 1) / kThreads, problem.batch * problem.heads);
}

template <typename T, int kWidth, int kPoints, int kVector>
void run_forward(const Problem& problem, void* output, cudaStream_t stream) {
  forward_kernel<T, kWidth, kPoints, kVector>
      <<<grid(problem, problem.width / kVector), kThreads, 0, stream>>>(problem, static_cast<T*>(output));
}

template <typename T, int kWidth, int kPoints, int kVector, int kGroup, typename Sums>
void run_backward(const Problem& problem, const void* grad_output, Sums sums, void* grad_locations, void* grad_weights,
                  cudaStream_t stream) {
  using Real = RealOf<T>;
  backward_kernel<T, kWidth, kPoints, kVector, kGroup><<<grid(problem, kGroup), kThreads, 0, stream>>>(
      problem, static_cast<const T*>(grad_output), sums, static_cast<Real*>(grad_locations),
      static_cast<Real*>(grad_weights));
}

template <typename T, typename Sums>
void run_fitting_backward(const Problem& problem, const void* grad_output, Sums sums, void* grad_locations,
                          void* grad_weights, cudaStream_t stream) {
  auto run = problem.width % 4 == 0 ? run_backward<T, 0, 0, 4, 32, Sums> : run_backward<T, 0, 0, 1, 32, Sums>;
  if constexpr (sizeof(T) < 8) {
    if (problem.points == 4 && problem.width == 32) run = run_backward<T, 32, 4, 4, 8, Sums>;
    if (problem.points == 4 && problem.width == 48) run = run_backward<T, 48, 4, 4, 16, Sums>;
    if (problem.points == 4 && problem.width == 64) run = run_backward<T, 64, 4, 4, 16, Sums>;
  }
  run(problem, grad_output, sums, grad_locations, grad_weights, stream);
}

// Calls `run` with a value of the problem's type.
template <typename Run>
void with_type(Type type, Run run) {
  switch (type) {
    case Type::kDouble: return run(double());
    case Type::kFloat: return run(float());
    case Type::kHalf: return run(__half());
    case Type::kBFloat16: return run(__nv_bfloat16());
  }
}

}  // namespace

void launch_forward(const Problem& problem, void* output, cudaStream_t stream) {
  with_type(problem.type, [&](auto number) {
    using T = decltype(number);
    constexpr int kVector = 16 / sizeof(T);
    auto run = problem.width % kVector == 0 ? run_forward<T, 0, 0, kVector> : run_forward<T, 0, 0, 1>;
    if constexpr (sizeof(T) < 8) {
      if (problem.points == 4 && problem.width == 32) run = run_forward<T, 32, 4, kVector>;
      if (problem.points == 4 && problem.width == 48) run = run_forward<T, 48, 4, kVector>;
      if (problem.points == 4 && problem.width == 64) run = run_forward<T, 64, 4, kVector>;
    }
    run(problem, output, stream);
  });
}

void launch_backward(const Problem& problem, const void* grad_output, void* grad_value, void* grad_locations,
                     void* grad_weights, cudaStream_t stream) {
  with_type(problem.type, [&](auto number) {
    using T = decltype(number);
    const FastSums<RealOf<T>> sums{static_cast<RealOf<T>*>(grad_value)};
    run_fitting_backward<T>(problem, grad_output, sums, grad_locations, grad_weights, stream);
  });
}

void launch_deterministic_backward(const Problem& problem, const void* grad_output, const void* largest,
                                   long long* sums, void* grad_value, void* grad_locations, void* grad_weights,
                                   cudaStream_t stream) {
  int headroom = 1;
  while ((int64_t(1) << headroom) < int64_t(problem.queries) * problem.points) ++headroom;
  with_type(problem.type, [&](auto number) {
    using T = decltype(number);
    const OrderlessSums<RealOf<T>> orderless{reinterpret_cast<unsigned long long*>(sums),
                                             static_cast<const RealOf<T>*>(largest), headroom, 1.0};
    run_fitting_backward<T>(problem, grad_output, orderless, grad_locations, grad_weights, stream);
    const int64_t count = int64_t(problem.batch) * problem.cells * problem.heads * problem.width;
    const int blocks = int(count < 1024 * kThreads ? (count + kThreads - 1) / kThreads : 1024);
    settle_kernel<T><<<blocks, kThreads, 0, stream>>>(orderless, static_cast<T*>(grad_value), count);
  });
}

}  // namespace solq
