// A GPU small enough to run in a unit test: what the kernels in csrc/cuda need of CUDA, on the CPU.
//
// Every thread of a block is a fiber. A fiber runs until its next barrier or shuffle; which one
// runs next is drawn from a seeded generator, and so is the order of the blocks; a few blocks are
// under way at once. Shared memory starts as NaN and ends at a page that may not be touched. A
// wrong use of a barrier ends the launch with a message in `failure()`.
//
// With -DEMULATE_THREADS every thread of a block is a thread of the operating system instead, so
// that ThreadSanitizer sees each race between the barriers.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <vector>
#ifdef EMULATE_THREADS
#include <barrier>
#include <thread>
#endif

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__

#ifdef EMULATE_THREADS
#define PER_THREAD thread_local
#else
#define PER_THREAD
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline PER_THREAD dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

// What one launch needs to know, set by the test.
inline uint64_t seed = 0;
inline bool uneven = false;  // whether some warps run ahead of others
inline int mutant = -1;      // which defect, planted by the test into a copy of a kernel, is awake
inline const char* failed = nullptr;

inline uint64_t random_bits() {
  seed += 0x9e3779b97f4a7c15;
  uint64_t z = seed;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// `value` with every bit flipped, which makes 0 a NaN: what a defect puts in its place.
template <class T>
T spoiled(T value) {
  unsigned char bytes[sizeof(T)];
  memcpy(bytes, &value, sizeof(T));
  for (unsigned char& byte : bytes) byte = ~byte;
  memcpy(&value, bytes, sizeof(T));
  return value;
}

// Memory full of NaN whose last byte is followed by a page that faults.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : page_(sysconf(_SC_PAGESIZE)) {
    length_ = (bytes + page_ - 1) / page_ * page_ + 2 * page_;
    base_ = static_cast<char*>(
        mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_, page_, PROT_NONE);
    mprotect(base_ + length_ - page_, page_, PROT_NONE);
    data_ = base_ + length_ - page_ - bytes;
    memset(base_ + page_, 0xff, length_ - 2 * page_);
  }
  ~Guarded() { munmap(base_, length_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  void* data() const { return data_; }

 private:
  size_t page_, length_;
  char *base_, *data_;
};

// The copies that the current thread has started and not yet waited for.
struct Copy {
  void* to;
  const void* from;
};

struct Exchange {  // what the lanes of a warp show each other, alternating between two slots
  uint64_t value[2][32];
};

struct Block {
  unsigned number = 0;
  std::unique_ptr<Guarded> shared;
  std::vector<Exchange> exchanges;
  int votes = 0, last_votes = 0, waiting = 0, left = 0;
  std::vector<int> waiting_at_warp;
};

struct Thread {
  Block* block = nullptr;
  std::vector<Copy> copies;
  unsigned exchanges = 0;
};

inline PER_THREAD Thread* self;
inline size_t shared_bytes;

#ifndef EMULATE_THREADS

constexpr int kBlocksUnderWay = 3;

enum class State { ready, waiting, done };

struct Fiber : Thread {
  State state = State::ready;
  bool started = false;
  unsigned index = 0;  // within its block
  jmp_buf where;
  ucontext_t start;
  std::vector<char> stack = std::vector<char>(64 << 10);
};

// The fibers of the block in slot s are [s * blockDim.x, (s + 1) * blockDim.x).
inline std::deque<Fiber> fibers;
inline std::deque<Block> slots;
inline std::vector<int> ready;
inline std::vector<uint64_t> priority;  // by warp of all slots; empty where all are equal
inline std::vector<unsigned> blocks_to_come;
inline jmp_buf scheduler;
inline void (*body)(void*);
inline void* body_argument;

inline Fiber& current() { return *static_cast<Fiber*>(self); }

[[noreturn]] inline void fail(const char* message) {
  failed = message;
  _longjmp(scheduler, 2);
}

inline void suspend(State state) {
  current().state = state;
  if (_setjmp(current().where) == 0) _longjmp(scheduler, 1);
}

inline int first_fiber(const Block& block) {
  int slot = 0;
  while (&slots[slot] != &block) ++slot;
  return slot * blockDim.x;
}

inline void make_ready(int first, int count) {
  for (int i = first; i < first + count; ++i) {
    fibers[i].state = State::ready;
    ready.push_back(i);
  }
}

inline int block_barrier(int vote) {
  Block& block = *current().block;
  block.votes += vote != 0;
  if (++block.waiting == static_cast<int>(blockDim.x)) {
    block.last_votes = block.votes;
    block.votes = block.waiting = 0;
    make_ready(first_fiber(block), blockDim.x);
  }
  suspend(State::waiting);
  return block.last_votes;
}

inline void warp_barrier() {
  Block& block = *current().block;
  const int warp = current().index / 32, first = warp * 32;
  const int lanes = std::min(32, static_cast<int>(blockDim.x) - first);
  if (++block.waiting_at_warp[warp] == lanes) {
    block.waiting_at_warp[warp] = 0;
    make_ready(first_fiber(block) + first, lanes);
  }
  suspend(State::waiting);
}

// Puts the next block, if there is one, into a slot whose block has ended.
inline void begin_block(Block& block) {
  if (blocks_to_come.empty()) return;
  block.number = blocks_to_come.back();
  blocks_to_come.pop_back();
  block.shared = std::make_unique<Guarded>(shared_bytes);
  block.exchanges.resize((blockDim.x + 31) / 32);
  block.waiting_at_warp.assign((blockDim.x + 31) / 32, 0);
  block.votes = block.waiting = 0;
  block.left = blockDim.x;
  const int first = first_fiber(block);
  for (unsigned i = 0; i < blockDim.x; ++i) {
    Fiber& fiber = fibers[first + i];
    fiber.block = &block;
    fiber.index = i;
    fiber.started = false;
    fiber.exchanges = 0;
    fiber.copies.clear();
  }
  make_ready(first, blockDim.x);
}

inline void enter() {
  body(body_argument);
  current().state = State::done;
  if (--current().block->left == 0) begin_block(*current().block);
  _longjmp(scheduler, 1);
}

inline void run(Fiber& fiber) {
  self = &fiber;
  threadIdx.x = fiber.index;
  blockIdx.x = fiber.block->number;
  if (fiber.started) _longjmp(fiber.where, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.data();
  fiber.start.uc_stack.ss_size = fiber.stack.size();
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

inline int next_ready() {
  size_t next = random_bits() % ready.size();
  if (!priority.empty())
    for (size_t i = 0; i < ready.size(); ++i)
      if (priority[ready[i] / 32] > priority[ready[next] / 32]) next = i;
  std::swap(ready[next], ready.back());
  const int fiber = ready.back();
  ready.pop_back();
  return fiber;
}

inline void run_blocks() {
  slots.clear();
  slots.resize(std::min<size_t>(kBlocksUnderWay, blocks_to_come.size()));
  while (fibers.size() < slots.size() * blockDim.x) fibers.emplace_back();
  ready.clear();
  for (Block& block : slots) begin_block(block);
  if (_setjmp(scheduler) == 2) return;
  if (!ready.empty()) run(fibers[next_ready()]);
  for (const Block& block : slots)
    if (block.left > 0) failed = "some threads wait for ever at a barrier";
}

#else

struct CountVotes {
  void operator()() noexcept;
};
inline Block only_block;
inline std::unique_ptr<std::barrier<CountVotes> > block_meeting;
inline std::deque<std::barrier<> > warp_meeting;

inline void CountVotes::operator()() noexcept {
  only_block.last_votes = only_block.votes;
  only_block.votes = 0;
}

[[noreturn]] inline void fail(const char*) { abort(); }

inline int block_barrier(int vote) {
  if (vote != 0) __atomic_add_fetch(&only_block.votes, 1, __ATOMIC_RELAXED);
  block_meeting->arrive_and_wait();
  return only_block.last_votes;
}

inline void warp_barrier() { warp_meeting[threadIdx.x / 32].arrive_and_wait(); }

#endif

template <class T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  static_assert(sizeof(T) <= sizeof(bits));
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_lane(T value, int lane) {
  const unsigned turn = self->exchanges++ % 2;
  Exchange& slot = self->block->exchanges[threadIdx.x / 32];
  slot.value[turn][threadIdx.x % 32] = to_bits(value);
  warp_barrier();
  T result;
  memcpy(&result, &slot.value[turn][lane], sizeof(T));
  return result;
}

// Runs kernel(arguments...) for each block, in random order, and each thread.
template <class Kernel>
void launch(int64_t grid, int threads, size_t shared, Kernel kernel) {
  if (failed || grid == 0) return;
  gridDim.x = static_cast<unsigned>(grid);
  blockDim.x = threads;
  shared_bytes = (shared + 15) / 16 * 16;
  std::vector<unsigned> order(grid);
  for (int64_t i = 0; i < grid; ++i) {
    order[i] = static_cast<unsigned>(i);
    std::swap(order[i], order[random_bits() % (i + 1)]);
  }
#ifndef EMULATE_THREADS
  blocks_to_come = order;
  priority.clear();
  if (uneven)
    for (int warp = 0; warp < kBlocksUnderWay * (threads + 31) / 32; ++warp)
      priority.push_back(random_bits());
  body = [](void* k) { (*static_cast<Kernel*>(k))(); };
  body_argument = &kernel;
  run_blocks();
#else
  only_block.shared = std::make_unique<Guarded>(shared_bytes);
  only_block.exchanges.resize((threads + 31) / 32);
  only_block.votes = 0;
  block_meeting = std::make_unique<std::barrier<CountVotes> >(threads);
  warp_meeting.clear();
  for (int first = 0; first < threads; first += 32)
    warp_meeting.emplace_back(std::min(32, threads - first));
  std::barrier between(threads,
                       []() noexcept { memset(only_block.shared->data(), 0xff, shared_bytes); });
  std::vector<std::thread> workers;
  for (int index = 0; index < threads; ++index)
    workers.emplace_back([&, index] {
      Thread state;
      state.block = &only_block;
      self = &state;
      threadIdx.x = index;
      for (unsigned block : order) {
        blockIdx.x = block;
        kernel();
        between.arrive_and_wait();
      }
    });
  for (std::thread& worker : workers) worker.join();
#endif
}

// The launcher that the operations take: runs kernels and lends scratch memory.
class Launcher {
 public:
  explicit Launcher(int processors) : processors_(processors) {}

  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t grid, int threads, size_t shared,
                  Arguments... arguments) {
    ++launches;
    launch(grid, threads, shared, [=] { kernel(arguments...); });
  }

  template <class T>
  T* scratch(int64_t count) {
    scratch_.emplace_back(count * sizeof(T));
    return static_cast<T*>(scratch_.back().data());
  }

  int processors() const { return processors_; }

  int launches = 0;

 private:
  int processors_;
  std::deque<Guarded> scratch_;
};

// A number in [-1, 1] that depends on the bits of x alone.
inline double noise(float x) {
  uint64_t z = to_bits(x) * 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 29)) * 0xbf58476d1ce4e5b9;
  return static_cast<double>(z >> 32) / 2147483648.0 - 1.0;
}

}  // namespace emulation

inline void __syncthreads() { emulation::block_barrier(0); }
inline int __syncthreads_or(int vote) { return emulation::block_barrier(vote) != 0; }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::from_lane(value, static_cast<int>(threadIdx.x % 32) ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int lane = threadIdx.x % 32;
  return emulation::from_lane(value, lane < delta ? lane : lane - delta);
}

template <class T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_integral_v<T>, "a sum of floats would depend on the order of the threads");
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
inline void __threadfence() {}

inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(emulation::to_bits(x)); }
inline long long __double_as_longlong(double x) { return emulation::to_bits(x); }
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
inline double __longlong_as_double(long long bits) {
  double x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

struct __half {
  _Float16 value;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half(float x) { return {static_cast<_Float16>(x)}; }
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {
  const unsigned bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

namespace cwbr::cuda {

template <class T>
T& shared_memory() {
  if (sizeof(T) > emulation::shared_bytes)
    emulation::fail("the launch asked for too little shared memory");
  return *static_cast<T*>(emulation::self->block->shared->data());
}

// The two fast instructions with the largest errors that NVIDIA's PTX manual allows them.
inline float reciprocal(float x) {
  const float result = 1 / x;
  return std::isfinite(result) ? result * (1 + static_cast<float>(emulation::noise(x)) * 0x1p-23f)
                               : result;
}
inline double reciprocal(double x) { return 1 / x; }
inline float fast_log2(float x) {
  const double result = std::log2(static_cast<double>(x));
  const double size = x >= 0.5f && x <= 2 ? 1 : std::abs(result);
  return static_cast<float>(result +
                            (std::isfinite(result) ? emulation::noise(x) * size * 0x1p-22 : 0));
}
inline double fast_log2(double x) { return std::log2(x); }

inline void check_aligned(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0)
    emulation::fail("a 128-bit access is misaligned");
}
inline uint4 load_128(const void* global) {
  check_aligned(global);
  uint4 value;
  memcpy(&value, global, sizeof(value));
  return value;
}
inline void store_128(void* global, uint4 value) {
  check_aligned(global);
  memcpy(global, &value, sizeof(value));
}

// An asynchronous copy arrives as late as it may: until it is waited for its target holds NaN.
inline void copy_async(void* shared, const void* global) {
  check_aligned(shared);
  check_aligned(global);
  memset(shared, 0xff, 16);
  emulation::self->copies.push_back({shared, global});
}
inline void copy_async_wait() {
  for (const emulation::Copy& copy : emulation::self->copies) memcpy(copy.to, copy.from, 16);
  emulation::self->copies.clear();
}

inline void device_check(bool holds) {
  if (!holds) emulation::fail("an index leaves its tensor");
}

}  // namespace cwbr::cuda
