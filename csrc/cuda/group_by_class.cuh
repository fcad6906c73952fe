// group_by_class: one block sorts (class, sample) keys and lays the usable runs out first.
#pragma once

#include "common.cuh"

namespace cwbr::cuda {

constexpr int kGroupThreads = 1024;
constexpr int kSampleBits = 24;
constexpr int64_t kMaxSamples = int64_t{1} << kSampleBits;
constexpr int64_t kMaxClasses = int64_t{1} << (63 - kSampleBits);
constexpr int64_t kSharedKeys = 4096;  // 32 KiB; longer batches are sorted in global memory

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

// One sorted position: its run of equal classes, and whether that run is a group.
struct Run {
  int64_t target;
  bool usable, leader;
};

__device__ inline Run run_at(const uint64_t* keys, int batch, int position, int64_t min_count) {
  const uint64_t target = keys[position] >> kSampleBits;
  const int begin = lower_bound(keys, batch, target << kSampleBits);
  const int end = lower_bound(keys, batch, (target + 1) << kSampleBits);
  return {static_cast<int64_t>(target), end - begin >= min_count, position == begin};
}

// Keys are sorted in `spill` where it is given, else in shared memory.
static __global__ void __launch_bounds__(kGroupThreads)
    group_by_class_kernel(const int64_t* targets, int batch, int64_t min_count, int64_t num_classes,
                          int padded, uint64_t* spill, int64_t* order, int64_t* offsets,
                          int64_t* classes) {
  GroupShared& shared = shared_memory<GroupShared>();
  uint64_t* keys = spill ? spill : shared.keys;
  for (int sample = threadIdx.x; sample < padded; sample += blockDim.x) {
    uint64_t key = ~uint64_t{0};  // neutral: padding sorts behind every sample
    if (sample < batch) {
      const int64_t target = targets[sample];
      device_check(target >= 0 && target < num_classes);
      key = static_cast<uint64_t>(target) << kSampleBits | sample;
    }
    keys[sample] = key;
  }
  bitonic_sort(keys, padded);

  const int per_thread = ceil_div<int>(batch, blockDim.x);
  const int first = threadIdx.x * per_thread;
  const int last = first + per_thread < batch ? first + per_thread : batch;
  int usable = 0, groups = 0;
  for (int position = first; position < last; ++position) {
    const Run run = run_at(keys, batch, position, min_count);
    usable += run.usable;
    groups += run.usable && run.leader;
  }
  const Scan usable_scan = block_scan(usable, shared.scratch);
  const Scan group_scan = block_scan(groups, shared.scratch);

  int in_groups = usable_scan.before, group = group_scan.before;
  for (int position = first; position < last; ++position) {
    const Run run = run_at(keys, batch, position, min_count);
    if (run.usable && run.leader) {
      offsets[group] = in_groups;
      classes[group] = run.target;
      ++group;
    }
    const int place = run.usable ? in_groups++ : usable_scan.total + position - in_groups;
    order[place] = keys[position] & (kMaxSamples - 1);
  }
  const int64_t capacity = batch / min_count;
  for (int64_t k = group_scan.total + threadIdx.x; k <= capacity; k += blockDim.x) {
    offsets[k] = usable_scan.total;
    if (k < capacity) classes[k] = -1;  // mask: there is one offset more than there are groups
  }
}

// targets (B,) in [0, num_classes) -> order (B,), offsets (B / min_count + 1,), classes.
template <class Launcher>
void group_by_class(Launcher& launch, const int64_t* targets, int64_t batch, int64_t min_count,
                    int64_t* order, int64_t* offsets, int64_t* classes,
                    int64_t num_classes = kMaxClasses) {
  check(batch <= kMaxSamples, "targets: expected at most ", kMaxSamples, " samples, got ", batch);
  const int padded = power_of_two_from(batch);
  const bool fits = padded <= kSharedKeys;
  uint64_t* spill = fits ? nullptr : launch.template scratch<uint64_t>(padded);
  launch(group_by_class_kernel, 1, threads_for(batch, kGroupThreads),
         sizeof(GroupShared) + (fits ? padded * sizeof(uint64_t) : 0), targets,
         static_cast<int>(batch), min_count, num_classes, padded, spill, order, offsets, classes);
}

}  // namespace cwbr::cuda
