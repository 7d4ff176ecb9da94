// A strict emulation of a GPU on one core: what compute-sanitizer would report on a GPU ends the process with one line.
//
// The threads of a warp are fibers. Each runs alone until it meets the others at a shuffle or ends; blocks, warps and
// lanes come in an order that `shuffle_threads` changes. Nothing that the kernels do not use is emulated: a kernel with
// shared memory, barriers or partial warps does not compile or is rejected.
#pragma once

#include <cstddef>
#include <functional>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs now.
extern dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace machine {

constexpr unsigned kWarp = 32;

// Plays all threads of a grid, one after another.
void launch(dim3 grid, dim3 block, size_t shared_bytes, const void* stream, const std::function<void()>& kernel);

// Waits for the other lanes of the warp and copies what lane `this ^ distance` brought.
void exchange(unsigned mask, int distance, const void* mine, void* theirs, size_t size);

// For the search for races: an atomic operation of the thread that runs now.
void note_atomic(const void* address, size_t size);

[[noreturn]] void fail(const char* message, ...) __attribute__((format(printf, 1, 2)));

}  // namespace machine

// 0 is the natural order.
extern "C" void shuffle_threads(unsigned seed);
