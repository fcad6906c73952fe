// Rows of means and variances, scaled and laid out for the tiles of all pairs, and their
// arithmetic.
//
// Divisions and logarithms are the expensive part, so eight dimensions share one of each: fractions
// are added as n/d + q/s = (n s + q d) / (d s), and the common denominator d is at the same time
// the product whose logarithm is wanted: 4 D = sum q/S + 2 log prod S - log prod u_i - log prod u_j
// with q = (m_i - m_j)^2 and S = u_i + u_j. A packing kernel divides each dimension by a power of
// two (4^e for the variances, 2^e for the means; D does not change) so that the products stay near
// one, finds the stages of dimensions where they still might leave the range of the number format
// (those go one dimension at a time), and sums the logarithms of each row over a stage by the same
// arithmetic, so that equal rows have exactly D = 0.
#pragma once

#include "common.cuh"

namespace cwbr::cuda {

constexpr int kTileSide = 16;  // threads along each side of a tile
constexpr int kTileThreads = kTileSide * kTileSide;
constexpr int kStage = 16;  // dimensions that are in shared memory at once
constexpr int kShare = 8;   // dimensions that share a denominator
constexpr double kTwoLog2 = 1.38629436111989061883;

// Pairs per thread and side: registers hold 4x4 floats or 2x2 doubles with all they need.
template <class A>
constexpr int kMicro = 16 / sizeof(A);
template <class A>
constexpr int kTileRows = kTileSide * kMicro<A>;

// A row's scaled mean and variance (eps included) in one dimension.
template <class A>
struct alignas(2 * sizeof(A)) Moment {
  A mean, u;
};
template <class A>
struct alignas(16) TwoMoments {
  Moment<A> first, second;
};

// Padding: two such rows are at distance zero and contribute nothing to a product.
template <class A>
constexpr __device__ Moment<A> neutral_moment() {
  return {A{0}, A{0.5}};
}

// One row over one stage. The logarithms also serve as padding: eight threads that read the same
// place of eight rows touch all banks of shared memory once.
template <class A>
struct alignas(16) RowStage {
  Moment<A> moments[kStage];
  A logs;  // 4 D of the row to itself, halved, without its logarithms subtracted
};

template <class A>
struct TileInput {
  int rows, padded_rows;  // K, and rounded up to whole tiles
  int64_t dims;           // D
  int stages;             // how many stages cover D
  RowStage<A>* packed;    // (stages, padded_rows)
  int* wide;              // (stages,): products might leave the range
  int* exponent;          // (stages * kStage,): variances were divided by 2^exponent
  int* most;              // (stages * kStage,): exponent of the largest variance, so divided
  __device__ const Moment<A>* moment(int row, int64_t dim) const {
    return &packed[dim / kStage * padded_rows + row].moments[dim % kStage];
  }
};

__device__ inline int exponent_of(float x) {
  return static_cast<int>(__float_as_uint(x) >> 23 & 255) - 127;
}
__device__ inline int exponent_of(double x) {
  return static_cast<int>(__double_as_longlong(x) >> 52 & 2047) - 1023;
}
template <class A>
__device__ A power_of_two(int exponent) {
  if constexpr (std::is_same_v<A, double>)
    return __longlong_as_double(static_cast<long long>(exponent + 1023) << 52);
  else
    return __uint_as_float(static_cast<unsigned>(exponent + 127) << 23);
}

// The range in which a product of kShare sums and its numerator surely stay.
template <class A>
constexpr int kMaxExponent = std::is_same_v<A, double> ? 1000 : 120;

// Adds 4 D of MICRO x MICRO pairs over one stage, without the logarithms of the rows alone. The
// rows, and the columns, are kTileSide apart.
template <int MICRO, bool WIDE, class A>
__device__ void add_stage(const RowStage<A>* rows, const RowStage<A>* columns,
                          A (&sum)[MICRO][MICRO]) {
#pragma unroll 1
  for (int share = 0; share < kStage; share += kShare) {
    A n[MICRO][MICRO], d[MICRO][MICRO];
#pragma unroll(WIDE ? 1 : kShare / 2)
    for (int two = 0; two < kShare; two += 2) {
      TwoMoments<A> row[MICRO], column[MICRO];
#pragma unroll
      for (int a = 0; a < MICRO; ++a) {
        row[a] = *reinterpret_cast<const TwoMoments<A>*>(rows[a * kTileSide].moments + share + two);
        column[a] =
            *reinterpret_cast<const TwoMoments<A>*>(columns[a * kTileSide].moments + share + two);
      }
#pragma unroll
      for (int a = 0; a < MICRO; ++a) {
#pragma unroll
        for (int b = 0; b < MICRO; ++b) {
          const A apart_0 = row[a].first.mean - column[b].first.mean;
          const A apart_1 = row[a].second.mean - column[b].second.mean;
          const A s_0 = row[a].first.u + column[b].first.u;
          const A s_1 = row[a].second.u + column[b].second.u;
          if constexpr (WIDE) {
            sum[a][b] = fused_multiply_add(apart_0 * reciprocal(s_0), apart_0, sum[a][b]);
            sum[a][b] = fused_multiply_add(apart_1 * reciprocal(s_1), apart_1, sum[a][b]);
            sum[a][b] = fused_multiply_add(fast_log2(s_0), A(kTwoLog2), sum[a][b]);
            sum[a][b] = fused_multiply_add(fast_log2(s_1), A(kTwoLog2), sum[a][b]);
          } else {
            const A q_0 = apart_0 * apart_0, q_1 = apart_1 * apart_1;
            const A both_n = fused_multiply_add(q_1, s_0, q_0 * s_1), both_d = s_0 * s_1;
            n[a][b] = two == 0 ? both_n : fused_multiply_add(n[a][b], both_d, both_n * d[a][b]);
            d[a][b] = two == 0 ? both_d : d[a][b] * both_d;
          }
        }
      }
    }
    if constexpr (!WIDE) {
#pragma unroll
      for (int a = 0; a < MICRO; ++a) {
#pragma unroll
        for (int b = 0; b < MICRO; ++b) {
          sum[a][b] = fused_multiply_add(n[a][b], reciprocal(d[a][b]), sum[a][b]);
          sum[a][b] = fused_multiply_add(fast_log2(d[a][b]), A(kTwoLog2), sum[a][b]);
        }
      }
    }
  }
}

template <class A>
struct PackShared {
  int least[kTileSide][kStage], most[kTileSide][kStage], total[kTileSide][kStage];
  A low[kTileSide][kStage], high[kTileSide][kStage];
  int up[kStage], down[kStage], apart[kStage], exponent[kStage];
  A scratch[kMaxWarps];
};

// Each dimension's exponent, and whether the products of this stage might leave the range.
template <class A>
__device__ bool scale_stage(const A* mean, const A* var, const TileInput<A>& in, int stage, A eps,
                            PackShared<A>& shared) {
  const int lane = threadIdx.x / kStage, d = threadIdx.x % kStage;
  const int64_t dim = int64_t{stage} * kStage + d;
  int least = 1 << 20, most = -(1 << 20), total = 0;
  A low = kInfinity<A>, high = -low;
  if (dim < in.dims) {  // mask: the last stage is ragged
    for (int row = lane; row < in.rows; row += kTileSide) {
      const int exponent = exponent_of(var[row * in.dims + dim] + eps);
      least = exponent < least ? exponent : least;
      most = exponent > most ? exponent : most;
      total += exponent;
      low = -larger(-low, -mean[row * in.dims + dim]);
      high = larger(high, mean[row * in.dims + dim]);
    }
  }
  shared.least[lane][d] = least;
  shared.most[lane][d] = most;
  shared.total[lane][d] = total;
  shared.low[lane][d] = low;
  shared.high[lane][d] = high;
  __syncthreads();
  if (threadIdx.x < kStage) {
    for (int other = 1; other < kTileSide; ++other) {
      least = shared.least[other][d] < least ? shared.least[other][d] : least;
      most = shared.most[other][d] > most ? shared.most[other][d] : most;
      total += shared.total[other][d];
      low = -larger(-low, -shared.low[other][d]);
      high = larger(high, shared.high[other][d]);
    }
    const bool used = dim < in.dims && in.rows > 0;
    constexpr int64_t kOffset = 2000;  // makes the division round down
    int exponent = 0;
    if (used) exponent = static_cast<int>((total + kOffset * in.rows) / in.rows - kOffset + 2) & ~1;
    const int limit = kMaxExponent<A>;
    exponent = exponent < -limit ? -limit : exponent > limit ? limit : exponent;
    // Whatever the mean exponent, the largest variance stays in the number format.
    if (used && most - exponent > limit) exponent = (most - limit + 1) & ~1;
    shared.exponent[d] = exponent;
    in.exponent[dim] = exponent;
    in.most[dim] = used ? most - exponent : 0;
    // Bounds on the exponents of S above and below, and of the largest (m_i - m_j)^2.
    shared.up[d] = used && most - exponent + 2 > 0 ? most - exponent + 2 : 0;
    shared.down[d] = used && exponent - least - 1 > 0 ? exponent - least - 1 : 0;
    shared.apart[d] = used ? 2 * (exponent_of(high - low) + 1) - exponent : -limit;
  }
  __syncthreads();
  bool wide = false;
  for (int first = 0; first < kStage; first += kShare) {
    int up = 0, down = 0, apart = 0;
    for (int k = first; k < first + kShare; ++k) {
      up += shared.up[k];
      down += shared.down[k];
      apart = shared.apart[k] + 3 > apart ? shared.apart[k] + 3 : apart;
    }
    wide = wide || up + apart > kMaxExponent<A> || down > kMaxExponent<A>;
  }
  return wide;
}

// Sum of a row of weights right of the diagonal.
template <class A>
__device__ void weigh_row(const A* alpha, int rows, int row, A (&scratch)[kMaxWarps],
                          A* row_weight) {
  A sum = 0;
  alpha += int64_t{row} * rows;
  for (int j = row + 1 + threadIdx.x; j < rows; j += blockDim.x) sum += alpha[j];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) row_weight[row] = sum;
}

// One block per stage packs all rows; where there are weights, one more per row sums them.
template <class A>
__global__ void __launch_bounds__(kTileThreads, 1)
    pack_kernel(const A* mean, const A* var, TileInput<A> in, A eps, const A* alpha, A* row_weight,
                int* tickets, int num_tickets) {
  PackShared<A>& shared = shared_memory<PackShared<A>>();
  if (blockIdx.x == 0)
    for (int t = threadIdx.x; t < num_tickets; t += blockDim.x) tickets[t] = 0;
  const int stage = blockIdx.x;
  if (stage >= in.stages) {
    weigh_row(alpha, in.rows, stage - in.stages, shared.scratch, row_weight);
    return;
  }
  const bool wide = scale_stage(mean, var, in, stage, eps, shared);
  if (threadIdx.x == 0) in.wide[stage] = wide;

  const int d = threadIdx.x % kStage;
  const int64_t dim = int64_t{stage} * kStage + d;
  const A down = power_of_two<A>(-shared.exponent[d]);
  const A mean_down = power_of_two<A>(-shared.exponent[d] / 2);
  RowStage<A>* packed = in.packed + int64_t{stage} * in.padded_rows;
  for (int row = threadIdx.x / kStage; row < in.padded_rows; row += kTileSide) {
    Moment<A> moment = neutral_moment<A>();  // neutral: equal rows are at distance zero
    if (row < in.rows && dim < in.dims)      // mask: rows and dimensions are padded
      moment = {mean[row * in.dims + dim] * mean_down, (var[row * in.dims + dim] + eps) * down};
    packed[row].moments[d] = moment;
  }
  __syncthreads();
  for (int row = threadIdx.x; row < in.padded_rows; row += blockDim.x) {
    A twice[1][1] = {};
    if (wide)
      add_stage<1, true>(packed + row, packed + row, twice);
    else
      add_stage<1, false>(packed + row, packed + row, twice);
    packed[row].logs = twice[0][0] / 2;
  }
}

}  // namespace cwbr::cuda
