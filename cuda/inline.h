// Functions that must not become calls, on the CPU and on the GPU. All kernels are C++17, which torch 2.11 compiles.
#pragma once

#if defined(__CUDACC__)
#define SOLQ_INLINE __host__ __device__ __forceinline__
#else
#define SOLQ_INLINE inline __attribute__((always_inline))
#endif
