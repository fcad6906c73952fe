// Global and shared memory with bounds and alignment, and the races of threads that did not meet.
//
// Two accesses of one place, at least one of which stores another value, race unless something
// orders them: a barrier of the block, one of the warp for its lanes, or, between blocks, an atomic
// with release after the first and one with acquire before the second.
#pragma once

#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <unordered_map>

#include "warp.h"

namespace machine {

// Who has touched a place, and when: in which epoch between barriers of the block and of the warp.
struct Touch {
  uint32_t block = 0;  // 0: nobody in this launch
  uint32_t epoch = 0, warp_epoch = 0;
  int32_t thread = 0;
  uint64_t time = 0;
};

struct Place {
  Touch writer, reader;
  bool atomic = false;        // the last write was one
  bool agreed = false;        // other blocks have written what the writer had: see `agreeing`
  bool many_readers = false;  // of one block and epoch
  bool many_warps = false;
};

// An atomic that orders: by a thread of a block.
struct Order {
  uint32_t epoch;
  int32_t thread;
  uint64_t time;
};

struct Block {
  uint32_t serial = 0;  // from 1 on
  uint32_t index[3] = {};
  std::vector<uint8_t> shared;
  std::vector<Place> shared_places;
  std::vector<Warp> warps;
  uint32_t epoch = 0;
  int arrived = 0, left = 0;
  std::vector<Order> releases, acquires;
};

// A tensor's memory: what the kernel may touch, in places of the size of an element.
struct Span {
  uint64_t begin, end;
  int64_t granule;
  Place* places;
};

inline std::vector<Span> spans;     // in the order of their addresses
inline std::vector<Block*> blocks;  // by serial
inline uint64_t now = 0;            // counts atomics and accesses
inline bool watch_races = true;
// The last write of each other block that left a place as it was: a block that waits for its own
// need not wait for the one that came first.
inline std::unordered_map<const Place*, std::map<uint32_t, Touch>> agreeing;

[[noreturn]] inline void fault(const char* format, uint64_t a, uint64_t b = 0) {
  char text[256];
  snprintf(text, sizeof(text), format, static_cast<unsigned long long>(a),
           static_cast<unsigned long long>(b));
  throw Fault(text);
}

inline bool ordered_between_blocks(const Touch& before, const Touch& after) {
  for (const Order& release : blocks[before.block]->releases) {
    const bool includes = release.epoch > before.epoch ||
                          (release.thread == before.thread && release.time > before.time);
    if (!includes) continue;
    for (const Order& acquire : blocks[after.block]->acquires)
      if (acquire.time > release.time &&
          (acquire.epoch < after.epoch || acquire.thread == after.thread))
        return true;
  }
  return false;
}

inline bool ordered(const Touch& before, const Touch& after) {
  if (before.block == 0) return true;
  if (before.block != after.block) return ordered_between_blocks(before, after);
  if (before.thread == after.thread || before.epoch < after.epoch) return true;
  return before.thread / kLanes == after.thread / kLanes && before.warp_epoch < after.warp_epoch;
}

inline bool has_own_write_before(const Place& place, const Touch& me) {
  if (!place.agreed) return false;
  const auto& touches = agreeing[&place];
  const auto mine = touches.find(me.block);
  return mine != touches.end() && ordered(mine->second, me);
}

inline void note_read(Place& place, const Touch& me) {
  if (place.writer.block && !ordered(place.writer, me) && !has_own_write_before(place, me))
    throw Fault("race: a thread reads what another has written, and nothing orders the two");
  const Touch& last = place.reader;
  const bool beside = last.block == me.block && last.epoch == me.epoch;
  const bool other_warp = beside && last.thread / kLanes != me.thread / kLanes;
  place.many_warps = beside && (place.many_warps || other_warp);
  place.many_readers = beside && (place.many_readers || last.thread != me.thread);
  place.reader = me;
}

inline void note_write(Place& place, const Touch& me, bool changes, bool atomic) {
  const bool both_atomic = atomic && place.atomic;
  if (!changes && place.writer.block && place.writer.block != me.block) {
    place.agreed = true;
    agreeing[&place][me.block] = me;
    return;
  }
  if (place.agreed && changes) {
    for (const auto& [block, touch] : agreeing[&place])
      if (!ordered(touch, me))
        throw Fault("race: two threads write different values, and nothing orders the two");
    place.agreed = false;
    agreeing.erase(&place);
  }
  if (changes && !both_atomic && place.writer.block && !ordered(place.writer, me))
    throw Fault("race: two threads write different values, and nothing orders the two");
  if (changes && !both_atomic && place.reader.block) {
    Touch before = place.reader;
    // Of several readers one is not this thread; of several warps one is not this warp.
    if (place.many_readers && before.block == me.block && before.thread == me.thread)
      before.thread ^= 1;
    if (place.many_warps && before.thread / kLanes == me.thread / kLanes) before.thread ^= kLanes;
    if (!ordered(before, me))
      throw Fault("race: a thread overwrites what another has read, and nothing orders the two");
  }
  place.writer = me;
  place.atomic = atomic;
}

inline Touch touch(const Warp& warp, int lane) {
  const Block& block = *warp.block;
  return {block.serial, block.epoch, warp.epoch, warp.first_thread + lane, ++now};
}

struct Access {
  uint8_t* data;
  Place* places;
  int64_t count;  // places that it spans
};

inline Access global(uint64_t address, int bytes) {
  if (address % bytes) fault("global memory: %llu bytes at %#llx are misaligned", bytes, address);
  static size_t last = 0;
  if (last >= spans.size() || address < spans[last].begin || address >= spans[last].end) {
    const auto after = std::upper_bound(spans.begin(), spans.end(), address,
                                        [](uint64_t a, const Span& s) { return a < s.begin; });
    if (after == spans.begin()) fault("global memory: %#llx is in no tensor", address);
    last = after - spans.begin() - 1;
  }
  const Span& span = spans[last];
  if (address + bytes > span.end)
    fault("global memory: access of %#llx, %llu bytes beyond the nearest tensor", address,
          address + bytes - span.end);
  Place* places = span.places + (address - span.begin) / span.granule;
  return {reinterpret_cast<uint8_t*>(address), places, std::max<int64_t>(1, bytes / span.granule)};
}

inline Access shared(Block& block, uint64_t address, int bytes) {
  if (address % bytes) fault("shared memory: %llu bytes at %#llx are misaligned", bytes, address);
  if (address + bytes > block.shared.size())
    fault("shared memory: access of %#llx in %llu bytes", address, block.shared.size());
  return {block.shared.data() + address, block.shared_places.data() + address, bytes};
}

inline Access access(Warp& warp, bool is_shared, uint64_t address, int bytes) {
  return is_shared ? shared(*warp.block, address, bytes) : global(address, bytes);
}

inline void note_reads(Warp& warp, int lane, const Access& from) {
  if (!watch_races) return;
  const Touch me = touch(warp, lane);
  for (int64_t i = 0; i < from.count; ++i) note_read(from.places[i], me);
}

inline void note_writes(Warp& warp, int lane, const Access& to, bool changes, bool atomic = false) {
  if (!watch_races) return;
  const Touch me = touch(warp, lane);
  for (int64_t i = 0; i < to.count; ++i) note_write(to.places[i], me, changes, atomic);
}

}  // namespace machine
