// group_by_class: (class, sample) keys are sorted, and the usable runs laid out first.
#pragma once

#include "common.cuh"

namespace cwbr::cuda {

constexpr int kGroupThreads = 1024;
constexpr int kSampleBits = 24;
constexpr int64_t kMaxSamples = int64_t{1} << kSampleBits;
constexpr int64_t kMaxClasses = int64_t{1} << (63 - kSampleBits);
constexpr int kSharedKeys = 4096;  // 32 KiB; longer batches are sorted in chunks of this
constexpr uint64_t kPadding = ~uint64_t{0};

struct GroupShared {
  int scratch[kMaxWarps];
  uint64_t keys[1];  // as many as the launch has asked for
};

// The first position whose key is at least `key`.
__device__ inline int lower_bound(const uint64_t* keys, int count, uint64_t key) {
  int first = 0;
  while (count > 0) {
    const int half = count / 2;
    if (keys[first + half] < key) {
      first += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return first;
}

// What one sorted position is: of no group, in one, or the first of one.
enum class Run : uint8_t { kNone, kMember, kLeader };

__device__ inline Run run_at(int position, int begin, int end, int64_t min_count) {
  if (end - begin < min_count) return Run::kNone;
  return position == begin ? Run::kLeader : Run::kMember;
}

__device__ inline uint64_t key_of(const int64_t* targets, int sample, int batch,
                                  int64_t num_classes) {
  if (sample >= batch) return kPadding;  // mask: sorts behind every sample
  const int64_t target = targets[sample];
  device_check(target >= 0 && target < num_classes);
  return static_cast<uint64_t>(target) << kSampleBits | sample;
}

struct Grouping {
  int64_t* order;
  int64_t* offsets;
  int64_t* classes;
};

// Lays the groups out, first of all their `usable` samples, then the others, from sorted keys;
// `run_of(position)` says what a position is. By one block.
template <class RunOf>
__device__ void lay_out(const uint64_t* keys, int batch, int64_t min_count, int usable,
                        RunOf run_of, const Grouping& result, int (&scratch)[kMaxWarps]) {
  int in_groups = 0, groups = 0;
  for (int first = 0; first < batch; first += blockDim.x) {
    const int position = first + static_cast<int>(threadIdx.x);
    Run run = Run::kNone;
    if (position < batch) run = run_of(position);  // mask: the last round is short
    const Scan samples = block_scan(run != Run::kNone, scratch);
    const Scan leaders = block_scan(run == Run::kLeader, scratch);
    if (position < batch) {  // mask: the last round is short
      const int place = in_groups + samples.before;
      if (run == Run::kLeader) {
        result.offsets[groups + leaders.before] = place;
        result.classes[groups + leaders.before] = keys[position] >> kSampleBits;
      }
      result.order[run == Run::kNone ? usable + position - place : place] =
          keys[position] & (kMaxSamples - 1);
    }
    in_groups += samples.total;
    groups += leaders.total;
  }
  const int64_t capacity = batch / min_count;
  for (int64_t k = groups + static_cast<int>(threadIdx.x); k <= capacity; k += blockDim.x) {
    result.offsets[k] = in_groups;
    if (k < capacity) result.classes[k] = -1;  // mask: there is one offset more than groups
  }
}

// All at once, where one block can sort.
static __global__ void __launch_bounds__(kGroupThreads)
    group_by_class_kernel(const int64_t* targets, int batch, int64_t min_count, int64_t num_classes,
                          int padded, Grouping result) {
  GroupShared& shared = shared_memory<GroupShared>();
  for (int sample = threadIdx.x; sample < padded; sample += blockDim.x)
    shared.keys[sample] = key_of(targets, sample, batch, num_classes);
  bitonic_sort(shared.keys, padded);
  const auto run_of = [&](int position) {
    const uint64_t target = shared.keys[position] >> kSampleBits;
    const int begin = lower_bound(shared.keys, batch, target << kSampleBits);
    const int end = lower_bound(shared.keys, batch, (target + 1) << kSampleBits);
    return run_at(position, begin, end, min_count);
  };
  int mine = 0;
  for (int position = threadIdx.x; position < batch; position += blockDim.x)
    mine += run_of(position) != Run::kNone;
  const int usable = block_scan(mine, shared.scratch).total;
  lay_out(shared.keys, batch, min_count, usable, run_of, result, shared.scratch);
}

// Else, first: each block sorts a chunk of the samples.
static __global__ void __launch_bounds__(kGroupThreads)
    sort_chunk_kernel(const int64_t* targets, int batch, int64_t num_classes, uint64_t* chunks,
                      int* usable) {
  GroupShared& shared = shared_memory<GroupShared>();
  if (blockIdx.x == 0 && threadIdx.x == 0) *usable = 0;
  const int first = blockIdx.x * kSharedKeys;
  for (int k = threadIdx.x; k < kSharedKeys; k += blockDim.x)
    shared.keys[k] = key_of(targets, first + k, batch, num_classes);
  bitonic_sort(shared.keys, kSharedKeys);
  for (int k = threadIdx.x; k < kSharedKeys; k += blockDim.x) chunks[first + k] = shared.keys[k];
}

// Second: a thread finds the place of its key, and of its class's run, from those in every chunk.
static __global__ void __launch_bounds__(kGroupThreads)
    merge_chunks_kernel(const uint64_t* chunks, int count, int64_t min_count, uint64_t* sorted,
                        Run* runs, int* usable) {
  const uint64_t key = chunks[blockIdx.x * blockDim.x + threadIdx.x], target = key >> kSampleBits;
  if (key == kPadding) return;  // mask: no sample
  int place = 0, begin = 0, end = 0;
  for (int c = 0; c < count; ++c, chunks += kSharedKeys) {
    place += lower_bound(chunks, kSharedKeys, key);
    begin += lower_bound(chunks, kSharedKeys, target << kSampleBits);
    end += lower_bound(chunks, kSharedKeys, (target + 1) << kSampleBits);
  }
  sorted[place] = key;
  runs[place] = run_at(place, begin, end, min_count);
  if (runs[place] != Run::kNone) atomicAdd(usable, 1);
}

// Third.
static __global__ void __launch_bounds__(kGroupThreads)
    lay_out_kernel(const uint64_t* sorted, const Run* runs, int batch, int64_t min_count,
                   const int* usable, Grouping result) {
  lay_out(
      sorted, batch, min_count, *usable, [&](int position) { return runs[position]; }, result,
      shared_memory<ScanShared>().scratch);
}

// targets (B,) in [0, num_classes) -> order (B,), offsets (B / min_count + 1,), classes.
template <class Launcher>
void group_by_class(Launcher& launch, const int64_t* targets, int64_t batch, int64_t min_count,
                    int64_t* order, int64_t* offsets, int64_t* classes,
                    int64_t num_classes = kMaxClasses) {
  check(batch <= kMaxSamples, "targets: expected at most ", kMaxSamples, " samples, got ", batch);
  const Grouping result{order, offsets, classes};
  const int size = static_cast<int>(batch);
  if (batch <= kSharedKeys) {
    const int padded = power_of_two_from(batch);
    launch(group_by_class_kernel, 1, threads_for(batch, kGroupThreads),
           sizeof(GroupShared) + padded * sizeof(uint64_t), targets, size, min_count, num_classes,
           padded, result);
    return;
  }
  const int chunks = ceil_div(size, kSharedKeys);
  uint64_t* keys = launch.template scratch<uint64_t>(int64_t{chunks} * kSharedKeys);
  uint64_t* sorted = launch.template scratch<uint64_t>(batch);
  Run* runs = launch.template scratch<Run>(batch);
  int* usable = launch.template scratch<int>(1);
  launch(sort_chunk_kernel, chunks, kGroupThreads,
         sizeof(GroupShared) + kSharedKeys * sizeof(uint64_t), targets, size, num_classes, keys,
         usable);
  launch(merge_chunks_kernel, int64_t{chunks} * (kSharedKeys / kGroupThreads), kGroupThreads, 0,
         static_cast<const uint64_t*>(keys), chunks, min_count, sorted, runs, usable);
  launch(lay_out_kernel, 1, kGroupThreads, sizeof(ScanShared), static_cast<const uint64_t*>(sorted),
         static_cast<const Run*>(runs), size, min_count, static_cast<const int*>(usable), result);
}

}  // namespace cwbr::cuda
