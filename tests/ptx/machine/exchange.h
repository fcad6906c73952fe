// Instructions that reach beyond a lane: memory, atomics, and what the lanes of a warp exchange.
#pragma once

#include "opcodes.h"

namespace machine {

inline const uint8_t* parameters;  // of the launch

// The operands of loads and stores: where the address is, then the access, then the registers.
enum Operand { kAddress, kCount, kBytes, kRegisterBytes, kSigned, kFirst };

inline uint64_t extended(uint64_t value, int bytes, bool is_signed) {
  const int unused = 64 - 8 * bytes;
  return is_signed ? uint64_t(int64_t(value << unused) >> unused) : value << unused >> unused;
}

inline void put(Warp& warp, const Instruction& in, int index, int lane, const uint8_t* from) {
  uint64_t value = 0;
  memcpy(&value, from, in.operand[kBytes]);
  value = extended(value, in.operand[kBytes], in.operand[kSigned]);
  const int bytes = in.operand[kRegisterBytes];
  memcpy(warp.registers<uint8_t>(in.operand[kFirst + index]) + lane * bytes, &value, bytes);
}

template <bool is_shared>
uint64_t address(Warp& warp, const Instruction& in, int place, int lane) {
  if (is_shared) return uint32_t(warp.registers<uint32_t>(place)[lane] + in.immediate);
  return warp.registers<uint64_t>(place)[lane] + in.immediate;
}

template <bool is_shared>
void load(Warp& warp, const Instruction& in, Lanes lanes) {
  const int count = in.operand[kCount], bytes = in.operand[kBytes];
  for_each(lanes, [&](int lane) {
    const uint64_t at = address<is_shared>(warp, in, in.operand[kAddress], lane);
    const Access from = access(warp, is_shared, at, count * bytes);
    note_reads(warp, lane, from);
    for (int i = 0; i < count; ++i) put(warp, in, i, lane, from.data + i * bytes);
  });
}

inline void load_parameter(Warp& warp, const Instruction& in, Lanes lanes) {
  for_each(lanes, [&](int lane) { put(warp, in, 0, lane, parameters + in.immediate); });
}

template <bool is_shared>
void store(Warp& warp, const Instruction& in, Lanes lanes) {
  const int count = in.operand[kCount], bytes = in.operand[kBytes];
  const int register_bytes = in.operand[kRegisterBytes];
  for_each(lanes, [&](int lane) {
    uint8_t value[64];
    for (int i = 0; i < count; ++i)
      memcpy(value + i * bytes,
             warp.registers<uint8_t>(in.operand[kFirst + i]) + lane * register_bytes, bytes);
    const uint64_t at = address<is_shared>(warp, in, in.operand[kAddress], lane);
    const Access to = access(warp, is_shared, at, count * bytes);
    note_writes(warp, lane, to, memcmp(to.data, value, count * bytes) != 0);
    memcpy(to.data, value, count * bytes);
  });
}

// Operands: result, address, value, whether it releases and acquires.
template <class T, bool is_shared, class Function>
void atomic(Warp& warp, const Instruction& in, Lanes lanes, Function f) {
  for_each(lanes, [&](int lane) {
    const uint64_t at = address<is_shared>(warp, in, in.operand[1], lane);
    const Access place = access(warp, is_shared, at, sizeof(T));
    note_writes(warp, lane, place, true, true);
    Block& block = *warp.block;
    const Order order{block.epoch, warp.first_thread + lane, ++now};
    if (in.operand[3]) block.releases.push_back(order), block.acquires.push_back(order);
    T before;
    memcpy(&before, place.data, sizeof(T));
    const T after = f(before, warp.registers<T>(in.operand[2])[lane]);
    memcpy(place.data, &after, sizeof(T));
    warp.registers<T>(in.operand[0])[lane] = before;
  });
}

// PTX's definition: operands are result, whether the source is in range, value, b and c.
template <char mode>
void shuffle(Warp& warp, const Instruction& in, Lanes lanes) {
  uint32_t value[kLanes];
  memcpy(value, warp.registers<uint32_t>(in.operand[2]), sizeof(value));
  const uint32_t* b = warp.registers<uint32_t>(in.operand[3]);
  const uint32_t* c = warp.registers<uint32_t>(in.operand[4]);
  for_each(lanes, [&](int lane) {
    const int by = b[lane] & 31, clamp = c[lane] & 31, segment = c[lane] >> 8 & 31;
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int from = mode == 'u'   ? lane - by
               : mode == 'd' ? lane + by
               : mode == 'b' ? lane ^ by
                             : first | (by & ~segment);
    const bool inside = mode == 'u' ? from >= last : from <= last;
    if (!inside) from = lane;
    if (!(lanes >> from & 1)) throw Fault("a shuffle from a lane that takes no part in it");
    warp.registers<uint32_t>(in.operand[0])[lane] = value[from];
    warp.registers<pred>(in.operand[1])[lane] = inside;
  });
}

template <class T, class Function>
void reduce(Warp& warp, const Instruction& in, Lanes lanes, Function f) {
  const T* value = warp.registers<T>(in.operand[1]);
  T result = value[__builtin_ctz(lanes)];
  for_each(lanes & (lanes - 1), [&](int lane) { result = f(result, value[lane]); });
  for_each(lanes, [&](int lane) { warp.registers<T>(in.operand[0])[lane] = result; });
}

inline Lanes votes(Warp& warp, const Instruction& in, Lanes lanes) {
  Lanes result = 0;
  for_each(lanes, [&](int lane) {
    result |= Lanes(warp.registers<pred>(in.operand[1])[lane] != 0) << lane;
  });
  return result;
}

// Matrices of 8 rows of 16 bytes, whose addresses are in eight lanes for each matrix: lane l has
// the 32 bits at row l / 4, column l % 4.
template <bool stores>
void matrices(Warp& warp, const Instruction& in, Lanes lanes) {
  if (lanes != ~Lanes{0}) throw Fault("a warp's matrix without all of its lanes");
  const int count = in.operand[kCount];
  for (int matrix = 0; matrix < count; ++matrix)
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = matrix * 8 + lane / 4;
      const uint64_t at = address<true>(warp, in, in.operand[kAddress], row);
      shared(*warp.block, at, 16);
      const Access place = shared(*warp.block, at + lane % 4 * 4, 4);
      uint32_t& value = warp.registers<uint32_t>(in.operand[kFirst + matrix])[lane];
      if (stores) {
        note_writes(warp, lane, place, memcmp(place.data, &value, 4) != 0);
        memcpy(place.data, &value, 4);
      } else {
        note_reads(warp, lane, place);
        memcpy(&value, place.data, 4);
      }
    }
}

// The values of operands 1 and 2 of a 64-bit register, or of the halves of a 32-bit one.
template <class Whole, class Half>
void unpack(Warp& warp, const Instruction& in, Lanes lanes) {
  for_each(lanes, [&](int lane) {
    const Whole whole = warp.registers<Whole>(in.operand[2])[lane];
    warp.registers<Half>(in.operand[0])[lane] = static_cast<Half>(whole);
    warp.registers<Half>(in.operand[1])[lane] = static_cast<Half>(whole >> (8 * sizeof(Half)));
  });
}

#define ATOMIC(space, is_shared, name, T, expression)                                        \
  {"atom." space "." name "." #T, LANES{atomic<T, is_shared>(warp, in, lanes, [](T a, T b) { \
     return static_cast<T>(expression);                                                      \
   });                                                                                       \
  }                                                                                          \
  }
#define ATOMICS(space, is_shared, T)                    \
  ATOMIC(space, is_shared, "add", T, u64(a) + u64(b)),  \
      ATOMIC(space, is_shared, "max", T, larger(a, b)), \
      ATOMIC(space, is_shared, "min", T, smaller(a, b)), ATOMIC(space, is_shared, "exch", T, b)
#define REDUCE(name, T, expression)                                            \
  {"redux." name "." #T,                                                       \
   LANES{reduce<T>(warp, in, lanes, [](T a, T b) -> T { return expression; }); \
  }                                                                            \
  }
#define VOTE(name, T, expression)                                                          \
  {"vote." name, LANES{const Lanes ballot = votes(warp, in, lanes);                        \
  for_each(lanes, [&](int lane) { warp.registers<T>(in.operand[0])[lane] = expression; }); \
  }                                                                                        \
  }

inline const Opcode kExchange[] = {
    {"ld.global", load<false>}, {"ld.shared", load<true>}, {"ld.param", load_parameter},
    {"st.global", store<false>}, {"st.shared", store<true>}, ATOMICS("global", false, u32),
    ATOMICS("global", false, s32), ATOMICS("global", false, u64), ATOMICS("shared", true, u32),
    ATOMICS("shared", true, s32), ATOMICS("shared", true, u64), {"shfl.up.b32", shuffle<'u'>},
    {"shfl.down.b32", shuffle<'d'>}, {"shfl.bfly.b32", shuffle<'b'>},
    {"shfl.idx.b32", shuffle<'i'>}, REDUCE("add", u32, a + b),
    REDUCE("add", s32, s32(u32(a) + u32(b))), REDUCE("min", u32, smaller(a, b)),
    REDUCE("min", s32, smaller(a, b)), REDUCE("max", u32, larger(a, b)),
    REDUCE("max", s32, larger(a, b)), REDUCE("and", b32, a& b), REDUCE("or", b32, a | b),
    REDUCE("xor", b32, a ^ b), VOTE("ballot.b32", u32, ballot), VOTE("any.pred", pred, ballot != 0),
    VOTE("all.pred", pred, ballot == lanes), {"bar.warp", LANES{++warp.epoch;
}  // namespace machine
}
, {"ldmatrix", matrices<false>}, {"stmatrix", matrices<true>}, {"unpack.b32.2", unpack<u32, u16>},
    {"unpack.b64.2", unpack<u64, u32>},
}
;

}  // namespace machine
