// What a warp of the machine is: 32 lanes, each with a program counter, and their registers.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace machine {

constexpr int kLanes = 32;
using Lanes = uint32_t;  // one bit for each lane

// A misuse of the GPU by the kernel that runs.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Operands are the places of registers, in bytes, within a warp's frame. Constants are registers
// as well, which nothing writes.
struct Instruction {
  int32_t opcode;
  int32_t guard;    // place of the predicate, or -1
  int32_t negated;  // whether the guard must not hold
  int32_t lanes;    // place of the register with the lanes that a warp-wide instruction waits for
  int64_t immediate;
  int32_t operand[14];
};

enum class State : uint8_t { running, at_warp_barrier, at_block_barrier, ended };

struct Block;

struct Warp {
  Block* block = nullptr;
  int first_thread = 0;
  Lanes present = 0;  // a block's last warp may have fewer than 32
  std::vector<uint8_t> frame;
  uint32_t pc[kLanes] = {};
  State state[kLanes] = {};
  uint32_t epoch = 0;  // how often its lanes have met

  // Register `place` of all lanes.
  template <class T>
  T* registers(int place) {
    return reinterpret_cast<T*>(frame.data() + place);
  }
};

template <class Function>
void for_each(Lanes lanes, Function function) {
  if (lanes == ~Lanes{0}) {
    for (int lane = 0; lane < kLanes; ++lane) function(lane);
  } else {
    for (; lanes; lanes &= lanes - 1) function(__builtin_ctz(lanes));
  }
}

// What a run draws at random depends on its seed alone.
inline uint64_t seed = 0;
inline uint64_t random_bits() {
  seed += 0x9e3779b97f4a7c15;
  uint64_t z = seed;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

template <class To, class From>
To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

}  // namespace machine
