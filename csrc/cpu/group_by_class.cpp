#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

#include "cpu/kernels.h"

namespace cwbr {
namespace {

struct Sample {
  uint64_t key;  // class, counted from the smallest one
  int64_t index;
};

// Stable least-significant-digit radix sort: as many passes as the largest key has bytes, so that
// the cost follows the range of the classes and the memory does not.
void sort_by_key(std::vector<Sample>& samples, uint64_t largest) {
  std::vector<Sample> target(samples.size());
  for (int shift = 0; shift < 64 && (largest >> shift) != 0; shift += 8) {
    std::array<int64_t, 257> start{};
    for (const Sample& s : samples) ++start[((s.key >> shift) & 255) + 1];
    std::partial_sum(start.begin(), start.end(), start.begin());
    for (const Sample& s : samples) target[start[(s.key >> shift) & 255]++] = s;
    samples.swap(target);
  }
}

}  // namespace

int64_t group_by_class(Cpu, const int64_t* targets, int64_t batch, int64_t min_count,
                       int64_t* order, int64_t* offsets, int64_t* classes) {
  const int64_t groups = batch / min_count;
  std::fill(classes, classes + groups, -1);
  offsets[0] = 0;
  if (batch == 0) return 0;

  const auto [low, high] = std::minmax_element(targets, targets + batch);
  const uint64_t smallest = static_cast<uint64_t>(*low);
  std::vector<Sample> samples(batch);
  for (int64_t b = 0; b < batch; ++b) {
    samples[b] = {static_cast<uint64_t>(targets[b]) - smallest, b};
  }
  sort_by_key(samples, static_cast<uint64_t>(*high) - smallest);

  std::vector<int64_t> leftover;
  int64_t used = 0, placed = 0;
  for (int64_t first = 0, last = 0; first < batch; first = last) {
    while (last < batch && samples[last].key == samples[first].key) ++last;
    const bool usable = last - first >= min_count;
    for (int64_t s = first; s < last; ++s) {
      if (usable) {
        order[placed++] = samples[s].index;
      } else {
        leftover.push_back(samples[s].index);
      }
    }
    if (!usable) continue;
    classes[used] = targets[samples[first].index];
    offsets[++used] = placed;
  }
  std::copy(leftover.begin(), leftover.end(), order + placed);
  std::fill(offsets + used, offsets + groups + 1, placed);
  return used;
}

}  // namespace cwbr
