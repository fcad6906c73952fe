// Every thread of a block is a fiber, which runs until its next barrier.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>

#include "block.h"

namespace emulation {

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

inline void run_fibers() {
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

// Runs kernel() for the blocks in this order, a few at a time, and for each of their threads.
template <class Kernel>
void run_blocks(const std::vector<unsigned>& order, int threads, Kernel& kernel) {
  blocks_to_come = order;
  priority.clear();
  if (uneven)
    for (int warp = 0; warp < kBlocksUnderWay * (threads + 31) / 32; ++warp)
      priority.push_back(random_bits());
  body = [](void* k) { (*static_cast<Kernel*>(k))(); };
  body_argument = &kernel;
  run_fibers();
}

}  // namespace emulation
