// top_pairs: the M largest weights, exactly and deterministically, by radix selection.
//
// A pair's rank is one integer: the weight, mapped to an unsigned number of the same order, above
// the complement of the pair's number in the order of (i, j). Ranks differ, so the M largest are
// unique and ties fall to the smaller (i, j). Blocks select the best of their chunks, one block
// selects the best of those and sorts them.
#pragma once

#include "common.cuh"

namespace cwbr::cuda {

constexpr int kSelectThreads = 512;
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int64_t kMinChunk = 4096;
constexpr int64_t kSharedSortBytes = 40 << 10;

template <class A>
struct RankOf;

template <>
struct RankOf<float> {
  using type = uint64_t;
  __device__ static type make(float weight, uint32_t pair) {
    uint32_t bits = __float_as_uint(weight + 0.0f);  // -0 counts as 0
    bits = weight != weight ? ~0u : bits >> 31 ? ~bits : bits | 1u << 31;
    return static_cast<type>(bits) << 32 | static_cast<uint32_t>(~pair);
  }
  __device__ static float weight(type rank) {
    const uint32_t bits = static_cast<uint32_t>(rank >> 32);
    return __uint_as_float(bits >> 31 ? bits & ~(1u << 31) : ~bits);
  }
};

template <>
struct RankOf<double> {
  using type = unsigned __int128;
  __device__ static type make(double weight, uint32_t pair) {
    uint64_t bits = __double_as_longlong(weight + 0.0);
    bits = weight != weight ? ~uint64_t{0} : bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
    return static_cast<type>(bits) << 32 | static_cast<uint32_t>(~pair);
  }
  __device__ static double weight(type rank) {
    const uint64_t bits = static_cast<uint64_t>(rank >> 32);
    return __longlong_as_double(bits >> 63 ? bits & ~(uint64_t{1} << 63) : ~bits);
  }
};

template <class A>
using rank_t = typename RankOf<A>::type;

template <class A>
constexpr int kRankBits = 8 * sizeof(A) + 32;

template <class A>
struct AlphaWeights {
  const A* alpha;
  int64_t groups;
  __device__ A operator()(int64_t i, int64_t j) const { return alpha[i * groups + j]; }
};

struct SelectShared {
  int histogram[kDigits];
  int scratch[kMaxWarps];
  int digit, wanted, in_digit;
  int taken;
};

// Copies the `wanted` largest of `ranks` to `selected`, in any order. Needs count >= wanted >= 1.
template <int BITS, class Rank>
__device__ void select_largest(const Rank* ranks, int64_t count, int wanted, Rank* selected,
                               SelectShared& shared) {
  Rank prefix = 0;  // the digits found so far of the smallest rank wanted
  int shift = BITS;
  if (threadIdx.x == 0) shared.taken = 0;
  do {
    shift -= kDigitBits;
    for (int digit = threadIdx.x; digit < kDigits; digit += blockDim.x) shared.histogram[digit] = 0;
    __syncthreads();
    for (int64_t at = threadIdx.x; at < count; at += blockDim.x) {
      const Rank rank = ranks[at];
      if (shift + kDigitBits == BITS || rank >> (shift + kDigitBits) == prefix)
        atomicAdd(&shared.histogram[static_cast<int>(rank >> shift) & (kDigits - 1)], 1);
    }
    __syncthreads();
    // Thread t holds the t-th largest digit; one of them contains the smallest rank wanted.
    const int digit = kDigits - 1 - static_cast<int>(threadIdx.x);
    const int here = digit >= 0 ? shared.histogram[digit] : 0;
    const int above = block_scan(here, shared.scratch).before;
    if (above < wanted && wanted <= above + here) {
      shared.digit = digit;
      shared.wanted = wanted - above;
      shared.in_digit = here;
    }
    __syncthreads();
    prefix = prefix << kDigitBits | static_cast<Rank>(shared.digit);
    wanted = shared.wanted;
  } while (shared.in_digit != wanted);
  for (int64_t at = threadIdx.x; at < count; at += blockDim.x) {
    const Rank rank = ranks[at];
    if (rank >> shift >= prefix) selected[atomicAdd(&shared.taken, 1)] = rank;
  }
}

// Each block ranks its chunk of pairs and keeps the `keep` best of it; 0 stands for no pair.
template <class A, class Weights>
__global__ void __launch_bounds__(kSelectThreads)
    select_chunk_kernel(Weights weights, int64_t pairs, int64_t chunk, int keep, rank_t<A>* ranks,
                        rank_t<A>* best) {
  SelectShared& shared = shared_memory<SelectShared>();
  const int64_t first = blockIdx.x * chunk;
  const int64_t count = pairs - first < chunk ? pairs - first : chunk;
  for (int64_t at = threadIdx.x; at < count; at += blockDim.x) {
    const Pair pair = pair_of_number(first + at, weights.groups);
    ranks[first + at] = RankOf<A>::make(weights(pair.i, pair.j), static_cast<uint32_t>(first + at));
  }
  best += static_cast<int64_t>(blockIdx.x) * keep;
  const int present = count < keep ? count : keep;
  select_largest<kRankBits<A>>(ranks + first, count, present, best, shared);
  for (int slot = present + threadIdx.x; slot < keep; slot += blockDim.x)
    best[slot] = 0;  // neutral: no pair has rank 0
}

template <class A>
struct SortShared {
  SelectShared select;
  alignas(16) rank_t<A> ranks[1];  // as many as the launch has asked for
};

// One block: selects the best of the blocks' best and writes them by falling weight.
template <class A>
__global__ void __launch_bounds__(kSelectThreads)
    sort_selected_kernel(const rank_t<A>* best, int64_t count, int top_m, int padded,
                         rank_t<A>* spill, int64_t groups, int64_t* pairs, A* weights) {
  SortShared<A>& shared = shared_memory<SortShared<A>>();
  rank_t<A>* sorted = spill ? spill : shared.ranks;
  select_largest<kRankBits<A>>(best, count, top_m, sorted, shared.select);
  for (int slot = top_m + threadIdx.x; slot < padded; slot += blockDim.x)
    sorted[slot] = 0;  // neutral: padding sorts before every pair
  bitonic_sort(sorted, padded);
  for (int m = threadIdx.x; m < top_m; m += blockDim.x) {
    const rank_t<A> rank = sorted[padded - 1 - m];
    const Pair pair = pair_of_number(static_cast<uint32_t>(~rank), groups);
    pairs[2 * m] = pair.i;
    pairs[2 * m + 1] = pair.j;
    weights[m] = RankOf<A>::weight(rank);
  }
}

// The `top_m` best pairs i < j, by falling weight: pairs (top_m, 2), top_weights (top_m,).
// Needs top_m <= K (K - 1) / 2 < 2^32.
template <class A, class Weights, class Launcher>
void top_pairs_of(Launcher& launch, Weights weights, int64_t top_m, int64_t* pairs,
                  A* top_weights) {
  if (top_m == 0) return;
  const int64_t count = weights.groups * (weights.groups - 1) / 2;
  check(count >> 32 == 0, "alpha: expected pairs below 2^32, got ", weights.groups, " groups");
  // Both kernels then take about as long: one scans a chunk, the other all that is kept.
  int64_t chunk = kMinChunk;
  while (chunk * chunk < count * top_m) chunk *= 2;
  const int64_t blocks = ceil_div(count, chunk);
  const int keep = static_cast<int>(top_m < chunk ? top_m : chunk);
  rank_t<A>* ranks = launch.template scratch<rank_t<A>>(count);
  rank_t<A>* best = launch.template scratch<rank_t<A>>(blocks * keep);
  launch(select_chunk_kernel<A, Weights>, blocks, kSelectThreads, sizeof(SelectShared), weights,
         count, chunk, keep, ranks, best);

  const int padded = power_of_two_from(top_m);
  const int64_t bytes = padded * sizeof(rank_t<A>);
  const bool fits = bytes <= kSharedSortBytes;
  rank_t<A>* spill = fits ? nullptr : launch.template scratch<rank_t<A>>(padded);
  launch(sort_selected_kernel<A>, 1, kSelectThreads, sizeof(SortShared<A>) + (fits ? bytes : 0),
         static_cast<const rank_t<A>*>(best), blocks * keep, static_cast<int>(top_m), padded, spill,
         weights.groups, pairs, top_weights);
}

// alpha (K, K) -> pairs (top_m, 2), top_weights (top_m,).
template <class A, class Launcher>
void top_pairs(Launcher& launch, const A* alpha, int64_t groups, int64_t top_m, int64_t* pairs,
               A* top_weights) {
  top_pairs_of(launch, AlphaWeights<A>{alpha, groups}, top_m, pairs, top_weights);
}

}  // namespace cwbr::cuda
