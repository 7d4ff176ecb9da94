// The search for races: two threads of one launch at one address, one of them writing, not both by an atomic operation.
//
// The compiler reports every access to memory under -fsanitize=thread; these are the callbacks, in place of
// its own library. Without that flag nothing is heard and nothing is found.
#pragma once

#include <cstddef>

#include "machine.h"

namespace races {

// From now to `end` the accesses are this thread's; its own stack is its own affair.
void begin(const dim3& block, unsigned thread, const char* stack, size_t stack_bytes);
void end();

// A new launch: what was written before is there for all.
void forget();

}  // namespace races
