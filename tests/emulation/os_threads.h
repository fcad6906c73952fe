// Every thread of a block is a thread of the operating system, for ThreadSanitizer to watch.
#pragma once

#include <algorithm>
#include <barrier>
#include <cstdlib>
#include <deque>
#include <thread>

#include "block.h"

namespace emulation {

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

// Runs kernel() for the blocks in this order, one at a time, and for each of their threads.
template <class Kernel>
void run_blocks(const std::vector<unsigned>& order, int threads, Kernel& kernel) {
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
}

}  // namespace emulation
