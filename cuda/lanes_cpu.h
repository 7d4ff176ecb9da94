// Several numbers as one value; the compiler cuts it into what the processor has.
#pragma once

#include "inline.h"

namespace solq {

template <typename Real, int kBytes = 64>
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
