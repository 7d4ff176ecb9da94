#include "machine.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "races.h"

dim3 gridDim(0), blockDim(0), blockIdx(0), threadIdx(0);

namespace machine {
namespace {

constexpr size_t kStackBytes = 256 * 1024;

// A place where execution goes on. ucontext begins a fiber; the compiler's own jump changes between fibers, as
// swapcontext calls the operating system for the signal mask each time, and a sample costs some 15 changes per lane.
using Jump = void* [5];

[[noreturn]] __attribute__((noinline)) void jump(Jump& to) { __builtin_longjmp(to, 1); }

__attribute__((noinline)) void change(Jump& from, Jump& to) {
  if (!__builtin_setjmp(from)) jump(to);
}

struct Lane {
  enum State { kReady, kWaiting, kEnded } state = kEnded;
  Jump place;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  unsigned thread = 0;  // in its block
  unsigned mask = 0;    // of the shuffle that it waits at
  int distance = 0;
  size_t size = 0;
  // Turn and turn about: a lane may bring its next number before all others have taken the last one.
  char brought[2][8] = {};
  int turn = 0;
};

Lane lanes[kWarp];
Lane* running = nullptr;
Jump scheduler;
const std::function<void()>* kernel = nullptr;
unsigned order_seed = 0;

void live(int lane) {
  for (;;) {
    (*kernel)();
    lanes[lane].state = Lane::kEnded;
    change(lanes[lane].place, scheduler);
  }
}

// Leaves each fiber at the head of its life, once.
void bear_lanes() {
  static bool born = false;
  if (born) return;
  born = true;
  for (int lane = 0; lane < int(kWarp); ++lane) {
    static ucontext_t begin, back;
    getcontext(&begin);
    begin.uc_stack.ss_sp = lanes[lane].stack.data();
    begin.uc_stack.ss_size = kStackBytes;
    makecontext(&begin, reinterpret_cast<void (*)()>(+[](int lane) {
                  static ucontext_t unused;
                  if (!__builtin_setjmp(lanes[lane].place)) swapcontext(&unused, &back);
                  live(lane);
                }),
                1, lane);
    swapcontext(&back, &begin);
  }
}

void run(Lane& lane) {
  running = &lane;
  threadIdx.x = lane.thread;
  races::begin(blockIdx, lane.thread, lane.stack.data(), kStackBytes);
  lane.state = Lane::kReady;
  change(scheduler, lane.place);
  races::end();
  running = nullptr;
}

// All lanes have ended or wait: they must do the same.
void check_that_lanes_agree(const std::vector<unsigned>& order) {
  const Lane& first = lanes[order[0]];
  for (unsigned index : order) {
    const Lane& lane = lanes[index];
    running = &lanes[index];
    threadIdx.x = lane.thread;
    if (lane.state != first.state) {
      const bool ended = lane.state == Lane::kEnded;
      fail("a shuffle without all lanes: thread %u %s, thread %u %s", lane.thread, ended ? "has ended" : "waits",
           first.thread, ended ? "waits" : "has ended");
    }
    if (lane.state != Lane::kWaiting) continue;
    if (lane.distance != first.distance || lane.size != first.size) {
      fail("two different shuffles at once: thread %u over %d, thread %u over %d", lane.thread, lane.distance,
           first.thread, first.distance);
    }
  }
  running = nullptr;
}

template <typename Random>
std::vector<unsigned> in_some_order(unsigned count, Random& random) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (order_seed) std::shuffle(order.begin(), order.end(), random);
  return order;
}

template <typename Random>
void run_warp(unsigned first_thread, Random& random) {
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    lanes[lane].thread = first_thread + lane;
    lanes[lane].state = Lane::kReady;
  }
  do {
    const std::vector<unsigned> order = in_some_order(kWarp, random);
    for (unsigned lane : order) run(lanes[lane]);
    check_that_lanes_agree(order);
  } while (lanes[0].state != Lane::kEnded);
}

}  // namespace

void launch(dim3 grid, dim3 block, size_t shared_bytes, const void*, const std::function<void()>& body) {
  const auto within = [](unsigned number, unsigned most) { return 1 <= number && number <= most; };
  if (!within(grid.x, 0x7fffffffu) || !within(grid.y, 65535) || !within(grid.z, 65535)) {
    fail("no GPU takes a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
  }
  if (!within(block.x, 1024) || block.x % kWarp || block.y != 1 || block.z != 1 || shared_bytes) {
    fail("not emulated: blocks of %u x %u x %u threads with %zu bytes", block.x, block.y, block.z, shared_bytes);
  }
  bear_lanes();
  kernel = &body;
  gridDim = grid;
  blockDim = block;
  races::forget();
  std::mt19937 random(order_seed);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y : in_some_order(grid.y, random)) {
      for (unsigned x : in_some_order(grid.x, random)) {
        blockIdx = dim3(x, y, z);
        for (unsigned warp : in_some_order(block.x / kWarp, random)) run_warp(warp * kWarp, random);
      }
    }
  }
}

void exchange(unsigned mask, int distance, const void* mine, void* theirs, size_t size) {
  Lane& lane = *running;
  if (mask != 0xffffffffu) fail("not emulated: a shuffle of the lanes %08x", mask);
  if (distance < 0 || distance >= int(kWarp)) fail("a shuffle over %d lanes", distance);
  const int turn = lane.turn;
  lane.turn = 1 - turn;
  std::memcpy(lane.brought[turn], mine, size);
  lane.distance = distance;
  lane.size = size;
  lane.state = Lane::kWaiting;
  change(lane.place, scheduler);
  std::memcpy(theirs, lanes[lane.thread % kWarp ^ unsigned(distance)].brought[turn], size);
}

void fail(const char* message, ...) {
  std::fprintf(stderr, "CUDA on the CPU: ");
  if (running) std::fprintf(stderr, "block (%u, %u, %u), ", blockIdx.x, blockIdx.y, blockIdx.z);
  va_list values;
  va_start(values, message);
  std::vfprintf(stderr, message, values);
  va_end(values);
  std::fprintf(stderr, "\n");
  std::abort();
}

}  // namespace machine

extern "C" void shuffle_threads(unsigned seed) { machine::order_seed = seed; }
