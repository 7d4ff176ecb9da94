#include "races.h"

#include <cstdint>
#include <unordered_map>

namespace races {
namespace {

enum Kind { kRead, kWrite, kAtomic };
constexpr const char* kNames[] = {"read", "written", "added to"};
constexpr size_t kGrain = 2;  // bytes; no number of the kernels is smaller

using Thread = uint64_t;  // one more than its number in the grid; 0 is none
constexpr Thread kSeveral = ~Thread(0);

Thread running = 0;
uintptr_t stack_begin = 0, stack_end = 0;

struct History {
  Thread by[3] = {};  // who read it, wrote it, added to it
};
std::unordered_map<uintptr_t, History> history;

void note(const void* address, size_t size, Kind kind) {
  const auto from = reinterpret_cast<uintptr_t>(address);
  if (!running || (from >= stack_begin && from < stack_end)) return;
  const Thread me = running;
  for (uintptr_t grain = from / kGrain; grain * kGrain < from + size; ++grain) {
    History& past = history[grain];
    for (Kind other : {kRead, kWrite, kAtomic}) {
      if ((other == kind && kind != kWrite) || !past.by[other] || past.by[other] == me) continue;
      running = 0;
      machine::fail("a race at %p: %s by thread %u, %s by another", address, kNames[kind], threadIdx.x, kNames[other]);
    }
    past.by[kind] = !past.by[kind] || past.by[kind] == me ? me : kSeveral;
  }
}

}  // namespace

void begin(const dim3& block, unsigned thread, const char* stack, size_t stack_bytes) {
  running = ((Thread(block.z) * gridDim.y + block.y) * gridDim.x + block.x) * blockDim.x + thread + 1;
  stack_begin = reinterpret_cast<uintptr_t>(stack);
  stack_end = stack_begin + stack_bytes;
}

void end() { running = 0; }

void forget() { history.clear(); }

}  // namespace races

namespace machine {

void note_atomic(const void* address, size_t size) { races::note(address, size, races::kAtomic); }

}  // namespace machine

// What GCC and Clang call.
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(const void* address, size_t size) { races::note(address, size, races::kRead); }
void __tsan_write_range(const void* address, size_t size) { races::note(address, size, races::kWrite); }
void __tsan_vptr_update(void**, void*) {}
#define CALLBACK(size)                                                                    \
  void __tsan_read##size(const void* at) { races::note(at, size, races::kRead); }         \
  void __tsan_write##size(const void* at) { races::note(at, size, races::kWrite); }       \
  void __tsan_unaligned_read##size(const void* at) { races::note(at, size, races::kRead); } \
  void __tsan_unaligned_write##size(const void* at) { races::note(at, size, races::kWrite); }
CALLBACK(1)
CALLBACK(2)
CALLBACK(4)
CALLBACK(8)
CALLBACK(16)
#undef CALLBACK
}
