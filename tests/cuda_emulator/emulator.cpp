// Runs CUDA kernels on a CPU, one block at a time, and finds what a GPU would let pass.
//
// Each CUDA thread is a fiber. All threads of a block must meet at one __syncthreads, and all lanes of a mask at one
// warp intrinsic; a lane that is read must be there; who waits for ever is named. Shared memory is full of NaN when a
// block starts, allocated at its exact size, and 48 KiB at most. Launches are held against the limits of grids. What
// is wrong is an exception with kernel, block, thread and line; so is an address that is not mapped or not aligned.
// AddressSanitizer sees accesses beyond arrays. ThreadSanitizer takes each CUDA thread for a thread: barriers and
// __syncwarp order memory, shuffles do not, as CUDA says.
//
// It cannot see: the GPU's arithmetic (exp, log, tanh, sin of libdevice differ from libm's by 1 or 2 ulp), its memory
// model, time, registers, coalescing, streams, asynchronous errors, graphs, a device's pointer used on the host, what
// nvcc refuses. To ThreadSanitizer the threads of one number in different blocks are one thread.
//
// EMULATOR_ORDER is the order of threads: 0 as numbered, 1 backwards (blocks too), more: random, with that seed.
#include <sys/mman.h>

#include <csignal>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_SANITIZED
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(EMULATOR_TSAN)  // this file is not itself looked at by ThreadSanitizer, but tells it of the threads
#define EMULATOR_SANITIZED
#include <sanitizer/tsan_interface.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>  // slower: it asks the kernel for the mask of signals
#endif

namespace emulated {

Place* here;
extern "C" __attribute__((visibility("default"))) int64_t emulated_launches;
int64_t emulated_launches;

namespace {

// Fibers.

constexpr size_t kStack = 256 << 10, kMostShared = 48 << 10;

struct Fiber {
#if defined(__x86_64__)
  void* top = nullptr;
#else
  ucontext_t context;
#endif
  char* stack = nullptr;
  size_t size = kStack;
  [[maybe_unused]] void* fake = nullptr;  // AddressSanitizer's and ThreadSanitizer's idea of it
  [[maybe_unused]] void* shadow = nullptr;
};

#if defined(__x86_64__)
extern "C" void emulated_switch(void** save, void* load);
asm(R"(
.text
.type emulated_switch, @function
emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#endif

Fiber main_fiber;

void arrived([[maybe_unused]] Fiber& at) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(at.fake, &bottom, &size);
  if (!main_fiber.stack) main_fiber.stack = static_cast<char*>(const_cast<void*>(bottom)), main_fiber.size = size;
#endif
}

void switch_fiber(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake, to.stack, to.size);
#endif
#if defined(EMULATOR_TSAN)
  __tsan_switch_to_fiber(to.shadow, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
  emulated_switch(&from.top, to.top);
#else
  swapcontext(&from.context, &to.context);
#endif
  arrived(from);
}

// A block.

constexpr size_t kMostThreads = 1024;

enum class State { ready, at_barrier, in_exchange, done };

struct Thread {
  Place place;
  Fiber fiber;
  State state;
  Line line;
  // of an exchange
  Exchange kind;
  unsigned mask;
  int argument, width;
  uint64_t value, result;
};

struct Block {
  const char* kernel;
  const std::function<void()>* body;
  std::vector<Thread> threads;
  std::unordered_map<const void*, std::pair<char*, size_t>> shared;
  char* dynamic = nullptr;
  size_t dynamic_size = 0, size = 0, left = 0, barriers = 0;
  Thread* running = nullptr;
  std::string error;
} block;

[[maybe_unused]] char launched, finished, passed[2];  // what ThreadSanitizer knows launches and barriers by

[[maybe_unused]] void release([[maybe_unused]] void* what) {
#if defined(EMULATOR_TSAN)
  __tsan_release(what);
#endif
}
[[maybe_unused]] void acquire([[maybe_unused]] void* what) {
#if defined(EMULATOR_TSAN)
  __tsan_acquire(what);
#endif
}

cudaError_t last_error;
int device;

std::string text(const Thread& t) {
  const auto three = [](dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  return "block " + three(t.place.block) + " thread " + three(t.place.thread);
}
std::string text(Line line) { return line.file ? line.file + (":" + std::to_string(line.number)) : "its start"; }

bool operator!=(Line a, Line b) { return a.number != b.number || strcmp(a.file, b.file); }

// Ends the launch by an exception, whoever runs. The fibers that have not ended are never run again.
[[noreturn]] void fail(const std::string& what) {
  block.error = std::string("CUDA emulator: ") + block.kernel + ": " + what;
  if (Thread* t = std::exchange(block.running, nullptr)) {
    block.error += "; " + text(*t) + ", last seen at " + text(t->line);
    switch_fiber(t->fiber, main_fiber);
  }
  throw std::runtime_error(block.error);
}

void wait(State state, Line line) {
  Thread& t = *block.running;
  t.state = state, t.line = line;
  switch_fiber(t.fiber, main_fiber);
}

int number(const Thread& t) { return int(&t - block.threads.data()); }

// Threads 0 .. n - 1 of the warp of `t`.
Thread* warp(const Thread& t) { return block.threads.data() + number(t) / 32 * 32; }
int lanes(const Thread& t) { return std::min(32, int(block.size) - number(t) / 32 * 32); }

// Lets the lanes that wait with `t` go on, if all have come that must.
bool try_exchange(Thread& t) {
  Thread* w = warp(t);
  unsigned there = 0;
  for (int l = 0; l < lanes(t); ++l) {
    if (!(t.mask >> l & 1) || w[l].state == State::done) continue;
    if (w[l].state != State::in_exchange) return false;
    if (w[l].mask != t.mask) return false;
    if (w[l].kind != t.kind || w[l].line != t.line) {
      fail("lanes of one mask meet at " + text(t.line) + " and " + text(w[l].line));
    }
    there |= 1u << l;
  }
  for (int l = 0; l < lanes(t); ++l) {
    if (!(there >> l & 1)) continue;
    Thread& to = w[l];
    const int segment = l & ~(to.width - 1);
    int from = l;
    switch (to.kind) {
      case Exchange::sync:
      case Exchange::ballot: break;
      case Exchange::shuffle: from = segment + (to.argument & (to.width - 1)); break;
      case Exchange::shuffle_up: from = l - to.argument < segment ? l : l - to.argument; break;
      case Exchange::shuffle_down: from = l + to.argument >= segment + to.width ? l : l + to.argument; break;
      case Exchange::shuffle_xor: from = (l ^ to.argument) >= segment + to.width ? l : l ^ to.argument; break;
    }
    if (!(there >> from & 1)) {
      fail(text(to) + " reads lane " + std::to_string(from) + ", which is not there, at " + text(to.line));
    }
    if (to.kind == Exchange::ballot) {
      to.result = 0;
      for (int k = 0; k < lanes(t); ++k) to.result |= (there >> k & 1) && w[k].value ? uint64_t(1) << k : 0;
    } else {
      to.result = w[from].value;
    }
  }
  for (int l = 0; l < lanes(t); ++l) {
    if (there >> l & 1) w[l].state = State::ready;
  }
  return true;
}

bool try_barrier() {
  const Thread *waits = nullptr, *gone = nullptr;
  for (size_t i = 0; i < block.size; ++i) {
    const Thread& t = block.threads[i];
    if (t.state == State::done) {
      gone = &t;
      continue;
    }
    if (t.state != State::at_barrier) return false;
    if (waits && waits->line != t.line) {
      fail("threads wait at __syncthreads of " + text(waits->line) + " and of " + text(t.line));
    }
    waits = &t;
  }
  if (!waits) return false;
  if (gone)
    fail(text(*waits) + " waits at __syncthreads of " + text(waits->line) + "; " + text(*gone) + " has returned");
  for (size_t i = 0; i < block.size; ++i) block.threads[i].state = State::ready;
  ++block.barriers;
  return true;
}

void thread_main() {
  arrived(block.running->fiber);
  while (true) {
    Thread& t = *block.running;
    acquire(&launched);
    (*block.body)();
    release(&finished);
    t.state = State::done;
    --block.left;
    switch_fiber(t.fiber, main_fiber);  // and back, as another thread of the same number
  }
}

void prepare(Fiber& f) {
#if defined(EMULATOR_TSAN)
  if (!f.shadow) f.shadow = __tsan_create_fiber(0);
#endif
  if (f.stack) return;
  f.stack = static_cast<char*>(
      mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(f.stack + kStack - 64);
  *--top = nullptr;  // no one to return to
  *--top = reinterpret_cast<void*>(&thread_main);
  f.top = top - 6;
#else
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack, f.context.uc_stack.ss_size = kStack;
  makecontext(&f.context, thread_main, 0);
#endif
}

[[noreturn]] void deadlock() {
  std::string who;
  for (size_t i = 0; i < block.size; ++i) {
    const Thread& t = block.threads[i];
    if (t.state == State::done) continue;
    who += "\n  " + text(t) +
           (t.state == State::at_barrier ? " at __syncthreads of " : " in an exchange of a warp at ") + text(t.line);
    if (t.state == State::in_exchange) who += ", mask " + std::to_string(t.mask);
  }
  fail("no thread can go on:" + who);
}

void run_block(dim3 index, const Grid& grid, int order, std::mt19937& random) {
  const size_t n = size_t(grid.threads.x) * grid.threads.y * grid.threads.z;
  block.threads.reserve(kMostThreads);  // a fiber remembers where its thread is
  if (block.threads.size() < n) block.threads.resize(n);
  for (size_t i = 0; i < n; ++i) {
    Thread& t = block.threads[i];
    t.place.thread = dim3(unsigned(i % grid.threads.x), unsigned(i / grid.threads.x % grid.threads.y),
                          unsigned(i / grid.threads.x / grid.threads.y));
    t.place.block = index, t.place.blocks = grid.blocks, t.place.threads = grid.threads;
    t.state = State::ready, t.line = {};
    prepare(t.fiber);
  }
  for (auto& [key, variable] : block.shared) memset(variable.first, 0xff, variable.second);
  if (block.dynamic) memset(block.dynamic, 0xff, block.dynamic_size);
  block.size = n;
  std::vector<int> turn(n);
  std::iota(turn.begin(), turn.end(), 0);
  if (order == 1) std::reverse(turn.begin(), turn.end());
  release(&launched);
  for (block.left = n; block.left;) {
    if (order > 1) std::shuffle(turn.begin(), turn.end(), random);
    bool any = false;
    for (const int i : turn) {
      Thread& t = block.threads[size_t(i)];
      if (t.state != State::ready) continue;
      any = true;
      block.running = &t;
      here = &t.place;
      switch_fiber(main_fiber, t.fiber);
      if (!block.error.empty()) throw std::runtime_error(block.error);
      block.running = nullptr;
      if (t.state == State::in_exchange) {
        try_exchange(t);
      } else if (t.state == State::done) {  // which others may have waited for
        const unsigned gone = 1u << (number(t) % 32);
        for (Thread *w = warp(t), *l = w; l < w + lanes(t); ++l) {
          if (l->state == State::in_exchange && l->mask & gone) try_exchange(*l);
        }
      }
    }
    if (try_barrier()) any = true;
    if (!any && block.left) deadlock();
  }
  here = nullptr;
  acquire(&finished);
}

#if !defined(EMULATOR_SANITIZED)
// An access that traps or faults, as an exception.
void on_signal(int number, siginfo_t* info, void*) {
  if (!block.running) {
    signal(number, SIG_DFL);
    return;
  }
  char address[32];
  snprintf(address, sizeof(address), "%p", info->si_addr);
  fail(number == SIGILL ? "an access that is not aligned" : std::string(strsignal(number)) + " at " + address);
}
constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
#endif

// What a launch has for itself.
class Launched {
 public:
  Launched(const char* kernel, size_t dynamic, const std::function<void()>& thread) {
#if defined(EMULATOR_TSAN)
    main_fiber.shadow = __tsan_get_current_fiber();
#endif
    main_fiber.stack = nullptr;
    block.kernel = kernel, block.body = &thread, block.error.clear();
    block.dynamic = dynamic ? static_cast<char*>(malloc(dynamic)) : nullptr, block.dynamic_size = dynamic;
#if !defined(EMULATOR_SANITIZED)
    struct sigaction action = {};
    action.sa_sigaction = on_signal, action.sa_flags = SA_SIGINFO | SA_NODEFER;
    for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &before_[i]);
#endif
  }
  ~Launched() {
#if !defined(EMULATOR_SANITIZED)
    for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &before_[i], nullptr);
#endif
    for (auto& [key, variable] : block.shared) free(variable.first);
    block.shared.clear();
    free(block.dynamic);
    if (!block.error.empty()) block.threads.clear();  // and not their stacks, which may be in use
  }

 private:
#if !defined(EMULATOR_SANITIZED)
  struct sigaction before_[std::size(kSignals)];
#endif
};

}  // namespace

void barrier(Line line) {
  char* const token = &passed[block.barriers % 2];
  release(token);
  wait(State::at_barrier, line);
  acquire(token);
}

uint64_t meet(Exchange kind, unsigned mask, uint64_t value, int argument, int width, Line line) {
  Thread& t = *block.running;
  t.line = line;
  if (!(mask >> (number(t) % 32) & 1)) fail("a lane is not in its own mask");
  if (lanes(t) < 32 && mask >> lanes(t)) fail("the mask names lanes that the warp does not have");
  t.kind = kind, t.mask = mask, t.value = value, t.argument = argument, t.width = width;
  if (kind == Exchange::sync) release(warp(t));  // which orders memory; a shuffle does not
  wait(State::in_exchange, line);
  if (kind == Exchange::sync) acquire(warp(t));
  return t.result;
}

void* shared_variable(const void* key, size_t size, size_t alignment) {
  auto& variable = block.shared[key];
  if (!variable.first) {
#if defined(EMULATOR_TSAN)
    __tsan_switch_to_fiber(main_fiber.shadow, __tsan_switch_to_fiber_no_sync);  // it is no thread's own
#endif
    void* room = nullptr;
    if (posix_memalign(&room, std::max(alignment, sizeof(void*)), size)) throw std::bad_alloc();
    variable = {static_cast<char*>(room), size};
    memset(variable.first, 0xff, size);
    release(&variable);
#if defined(EMULATOR_TSAN)
    __tsan_switch_to_fiber(block.running->fiber.shadow, __tsan_switch_to_fiber_no_sync);
#endif
  }
  acquire(&variable);
  return variable.first;
}

void* dynamic_shared() { return block.dynamic; }

void launch(const char* kernel, Grid grid, size_t parameters, const std::function<void()>& thread) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const dim3 b = grid.blocks, t = grid.threads;
  const uint64_t threads = uint64_t(t.x) * t.y * t.z, blocks = uint64_t(b.x) * b.y * b.z;
  if (!blocks || b.x > 0x7fffffffu || b.y > 65535 || b.z > 65535 || !threads || threads > kMostThreads || t.z > 64 ||
      parameters > 32764) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  if (grid.shared > kMostShared) {
    last_error = cudaErrorInvalidValue;
    return;
  }
  ++emulated_launches;
  const Launched launched(kernel, grid.shared, thread);
  const char* value = getenv("EMULATOR_ORDER");
  const int order = value ? atoi(value) : 0;
  std::mt19937 random{unsigned(order)};
  for (uint64_t k = 0; k < blocks; ++k) {
    const uint64_t i = order == 1 ? blocks - 1 - k : k;
    run_block(dim3(unsigned(i % b.x), unsigned(i / b.x % b.y), unsigned(i / b.x / b.y)), grid, order, random);
  }
  size_t used = grid.shared;
  for (const auto& [key, variable] : block.shared) used += variable.second;
  if (used > kMostShared) fail("takes " + std::to_string(used) + " bytes of shared memory");
}

}  // namespace emulated

cudaError_t cudaGetLastError() { return std::exchange(emulated::last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return emulated::last_error; }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    default: return "another error";
  }
}
cudaError_t cudaGetDevice(int* to) {
  *to = emulated::device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int to) {
  if (to) return cudaErrorInvalidDevice;
  emulated::device = to;
  return cudaSuccess;
}
