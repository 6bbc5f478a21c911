// Runs the threads of a CUDA block as fibers: in an order that a seed chooses, each until it waits
// for others, so that a missing barrier gives wrong results for some seed and a barrier that not
// all threads reach is an error instead of a hang. Blocks run one after another, in any order too.
// What stays unproven: the visibility of memory between blocks, and all timing.
#include "emulation.h"

#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

dim3 g_block_index;
dim3 g_grid_size;
State g_state;

namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 128 * 1024;

// GCC's own pair saves three registers; the C library's also hides the addresses it saves, which
// takes longer than all else here.
#if defined(__x86_64__) && !defined(__clang__)
#define KEEPS_FRAME __attribute__((noinline, optimize("no-omit-frame-pointer")))
using Jump = void* [5];
#define SAVE_PLACE(jump) __builtin_setjmp(jump)
#define GO_TO(jump) __builtin_longjmp(jump, 1)
#else
#define KEEPS_FRAME
using Jump = jmp_buf;
#define SAVE_PLACE(jump) _setjmp(jump)
#define GO_TO(jump) _longjmp(jump, 1)
#endif

enum class Wait { kNone, kBlock, kWarp, kDone };

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t context;
  Jump jump;
  bool started = false;
  Wait wait = Wait::kNone;
  dim3 index;
  int number = 0;
  unsigned exchanges = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

struct Warp {
  uint64_t values[2][kWarp];
  unsigned mask = 0;
  unsigned arrived = 0;
};

std::vector<Fiber> g_fibers;
std::vector<Warp> g_warps;
std::vector<uint32_t> g_order;  // in which this round runs the fibers
size_t g_position;              // of the current one in it
Fiber g_scheduler;
Fiber* g_current = &g_scheduler;
std::mt19937_64 g_random;
void (*g_body)(void*);
void* g_context;
int g_threads;
int g_done;
int g_at_barrier;
int g_barrier_votes;
int g_barrier_result;
std::string g_problem;

#if defined(__SANITIZE_ADDRESS__)
const void* g_scheduler_stack;
size_t g_scheduler_bytes;
Fiber* g_previous;

void before_switch(Fiber* from, Fiber* to) {
  g_previous = from;
  const bool back = to == &g_scheduler;
  __sanitizer_start_switch_fiber(&from->fake_stack, back ? g_scheduler_stack : to->stack.get(),
                                 back ? g_scheduler_bytes : kStackBytes);
}

void after_switch(Fiber* self) {
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(self->fake_stack, &stack, &bytes);
  if (g_previous == &g_scheduler) {
    g_scheduler_stack = stack;
    g_scheduler_bytes = bytes;
  }
}
#endif

// Without AddressSanitizer by jumps: swapcontext asks the kernel for the signal mask each time.
KEEPS_FRAME void switch_to(Fiber* to) {
  Fiber* from = g_current;
  g_current = to;
#if defined(__SANITIZE_ADDRESS__)
  before_switch(from, to);
  swapcontext(&from->context, &to->context);
  after_switch(from);
#else
  if (SAVE_PLACE(from->jump) != 0) return;
  if (to->started) GO_TO(to->jump);
  setcontext(&to->context);
#endif
}

// Runs the round's next fiber that waits for nothing; after the last one the scheduler.
void yield() {
  while (++g_position < g_order.size()) {
    Fiber& next = g_fibers[g_order[g_position]];
    if (next.wait == Wait::kNone) return switch_to(&next);
  }
  switch_to(&g_scheduler);
}

void enter() {
  Fiber* self = g_current;
#if defined(__SANITIZE_ADDRESS__)
  after_switch(self);
#endif
  self->started = true;
  for (;;) {  // once a block
    g_body(g_context);
    self->wait = Wait::kDone;
    ++g_done;
    yield();
  }
}

void make_fibers(int threads) {
  if (static_cast<int>(g_fibers.size()) == threads) return;
  g_fibers = std::vector<Fiber>(static_cast<size_t>(threads));
  g_warps = std::vector<Warp>(static_cast<size_t>((threads + kWarp - 1) / kWarp));
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = g_fibers[static_cast<size_t>(i)];
    fiber.stack = std::make_unique<char[]>(kStackBytes);
    fiber.number = i;
    fiber.index = dim3(static_cast<unsigned>(i), 0, 0);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
}

std::vector<uint32_t> shuffled(size_t n) {
  std::vector<uint32_t> order(n);
  std::iota(order.begin(), order.end(), 0u);
  if (g_state.seed == 1) std::reverse(order.begin(), order.end());
  if (g_state.seed > 1) std::shuffle(order.begin(), order.end(), g_random);
  return order;
}

// The fibers of one round. Shuffled ones leave out half of the warps, so that warps get far ahead
// of each other where no barrier forbids it.
std::vector<uint32_t> next_round() {
  std::vector<uint32_t> order = shuffled(g_fibers.size());
  if (g_state.seed > 1) {
    const uint64_t in = g_random();
    const auto left_out = [in](uint32_t i) { return (in >> i / kWarp & 1) == 0; };
    order.erase(std::remove_if(order.begin(), order.end(), left_out), order.end());
  }
  return order;
}

bool run_block() {
  for (Fiber& fiber : g_fibers) {
    fiber.wait = Wait::kNone;
    fiber.exchanges = 0;
  }
  for (Warp& warp : g_warps) warp.arrived = 0;
  g_at_barrier = g_barrier_votes = 0;
  g_done = 0;
  while (g_done < g_threads) {
    g_order = next_round();
    g_position = ~size_t{0};  // one before the first
    yield();
    const bool stuck =
        g_done < g_threads && std::none_of(
                                  g_fibers.begin(), g_fibers.end(),
                                  [](const Fiber& fiber) { return fiber.wait == Wait::kNone; });
    if (g_problem.empty() && stuck) g_problem = "threads wait at a barrier that others miss";
    if (!g_problem.empty()) {
      g_fibers.clear();  // their stacks are in the middle of a kernel
      return false;
    }
  }
  return true;
}

}  // namespace

const dim3& thread_index() { return g_current->index; }
int lane() { return g_current->number % kWarp; }

int wait_for_block(int value) {
  g_current->wait = Wait::kBlock;
  g_barrier_votes += value != 0;
  if (++g_at_barrier == g_threads) {
    g_barrier_result = g_barrier_votes;
    g_at_barrier = g_barrier_votes = 0;
    for (Fiber& fiber : g_fibers) fiber.wait = Wait::kNone;
    perhaps_yield();
  } else {
    yield();
  }
  return g_barrier_result;
}

const uint64_t* exchange(unsigned mask, uint64_t value) {
  Fiber* self = g_current;
  const int first = self->number / kWarp * kWarp;
  Warp& warp = g_warps[static_cast<size_t>(self->number / kWarp)];
  if (warp.arrived == 0) warp.mask = mask;
  if (warp.mask != mask || (mask >> lane() & 1u) == 0) {
    g_problem = "lanes of a warp call with different masks";
  }
  uint64_t* values = warp.values[self->exchanges++ % 2];
  values[lane()] = value;
  warp.arrived |= 1u << lane();
  self->wait = Wait::kWarp;
  if (warp.arrived == mask) {
    warp.arrived = 0;
    for (int i = 0; i < kWarp; ++i) {
      if ((mask >> i & 1u) != 0) g_fibers[static_cast<size_t>(first + i)].wait = Wait::kNone;
    }
  } else {
    yield();
  }
  return values;
}

void perhaps_yield() {
  if (g_state.seed > 1 && g_random() % 8 == 0) yield();
}

cudaError_t run_grid(dim3 blocks, dim3 threads, size_t parameter_bytes, void (*body)(void* context),
                     void* context) {
  const bool fits = blocks.x > 0 && blocks.x <= 0x7fffffffu && blocks.y > 0 && blocks.y <= 65535 &&
                    blocks.z == 1 && threads.x <= 1024 && threads.x % kWarp == 0 &&
                    threads.y == 1 && threads.z == 1;
  if (!fits) return cudaErrorInvalidConfiguration;
  if (parameter_bytes > 32764) return cudaErrorInvalidValue;
  ++g_state.launches;
  g_state.launch_device = g_state.device;
  g_scheduler.started = true;
  g_body = body;
  g_context = context;
  g_threads = static_cast<int>(threads.x);
  g_grid_size = blocks;
  g_random.seed(g_state.seed);
  g_problem.clear();
  for (const uint32_t i : shuffled(static_cast<size_t>(blocks.x) * blocks.y)) {
    make_fibers(g_threads);
    g_block_index = dim3(i % blocks.x, i / blocks.x, 0);
    if (!run_block()) {
      g_state.error_text = g_problem;
      return cudaErrorLaunchFailure;
    }
  }
  return cudaSuccess;
}

}  // namespace emulation
