// Launches of kernels, and what the lanes of a warp show each other.
#pragma once

#include <deque>
#include <vector>

#include "block.h"
#ifdef EMULATE_THREADS
#include "os_threads.h"
#else
#include "fibers.h"
#endif

namespace emulation {

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
  run_blocks(order, threads, kernel);
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

}  // namespace emulation
