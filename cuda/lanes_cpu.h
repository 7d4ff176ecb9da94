// Several numbers in one register of the processor.
//
// GCC also accepts vectors wider than a register, but takes them apart badly: with 64 bytes on AVX2, deformable attention
// is three to four times slower than with 32, because the parts go through memory.
#pragma once

#include "inline.h"

namespace solq {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
constexpr const char* kInstructionSet = "AVX-512";
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
constexpr const char* kInstructionSet = "AVX2";
#elif defined(__AVX__)
constexpr int kRegisterBytes = 32;
constexpr const char* kInstructionSet = "AVX";
#elif defined(__x86_64__)
constexpr int kRegisterBytes = 16;
constexpr const char* kInstructionSet = "SSE";
#else
constexpr int kRegisterBytes = 16;
constexpr const char* kInstructionSet = "NEON";
#endif

template <typename Real, int kBytes = kRegisterBytes>
struct Lanes {
  static constexpr int kSize = kBytes / sizeof(Real);
  typedef Real Register __attribute__((vector_size(kBytes)));
  typedef Real Memory __attribute__((vector_size(kBytes), aligned(alignof(Real)), may_alias));

  static SOLQ_INLINE Register load(const Real* from) { return *reinterpret_cast<const Memory*>(from); }
  static SOLQ_INLINE void store(Real* to, Register numbers) { *reinterpret_cast<Memory*>(to) = numbers; }

  static SOLQ_INLINE Real sum(Register numbers) {
    if constexpr (kSize == 2) {
      return numbers[0] + numbers[1];
    } else {
      using Half = Lanes<Real, kBytes / 2>;
      union {
        Register whole;
        typename Half::Register halves[2];
      } parts = {numbers};
      return Half::sum(parts.halves[0] + parts.halves[1]);
    }
  }
};

}  // namespace solq
