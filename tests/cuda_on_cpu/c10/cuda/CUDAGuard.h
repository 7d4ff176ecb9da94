// One device, always current.
#pragma once

namespace c10::cuda {

struct CUDAGuard {
  template <typename Device>
  explicit CUDAGuard(const Device&) {}
};

}  // namespace c10::cuda
