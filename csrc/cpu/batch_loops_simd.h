// The loops of isa_batch_table.h for one instruction set; see simd.h.

namespace cwbr::CWBR_ISA {

template <size_t Bytes>
struct Words {
  typedef uint16_t Half __attribute__((vector_size(Bytes / 2)));
  typedef uint16_t Unaligned __attribute__((vector_size(Bytes / 2), aligned(2), may_alias));
  typedef uint32_t Full __attribute__((vector_size(Bytes)));
};
using Words16 = Words<kVectorBytes>::Half;
using Words32 = Words<kVectorBytes>::Full;

CWBR_INLINE Words32 broadcast_word(uint32_t x) { return x - Words32{}; }

CWBR_INLINE Words32 load_words(const void* x) {
  const Words16 words = *static_cast<const Words<kVectorBytes>::Unaligned*>(x);
  return __builtin_convertvector(words, Words32);
}

CWBR_INLINE Floats load_input(const float* x) { return load(x); }
CWBR_INLINE Doubles load_input(const double* x) { return load(x); }
CWBR_INLINE Floats load_input(const BFloat16* x) {
  return reinterpret_cast<Floats>(load_words(x) << 16);
}
CWBR_INLINE Floats load_input(const Half* x) {
  const Words32 half = load_words(x), magnitude = half & 0x7fff;
  // The product moves the exponent's bias: exact, and right for subnormals.
  const auto value =
      reinterpret_cast<Words32>(reinterpret_cast<Floats>(magnitude << 13) * 0x1p112f);
  const Words32 infinite = magnitude >= 0x7c00 ? broadcast_word(0x7f800000) : broadcast_word(0);
  return reinterpret_cast<Floats>(value | infinite | (half & 0x8000) << 16);
}

CWBR_INLINE void store_words(void* x, Words32 words) {
  *static_cast<Words<kVectorBytes>::Unaligned*>(x) = __builtin_convertvector(words, Words16);
}

// Rounded to nearest, ties to even.
CWBR_INLINE void store_output(float* x, Floats v) { store(x, v); }
CWBR_INLINE void store_output(double* x, Doubles v) { store(x, v); }
CWBR_INLINE void store_output(BFloat16* x, Floats v) {
  const Words32 bits = reinterpret_cast<Words32>(v);
  const Words32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  store_words(x, v == v ? rounded : broadcast_word(0x7fc0));
}
CWBR_INLINE void store_output(Half* x, Floats v) {
  const Words32 bits = reinterpret_cast<Words32>(v), magnitude = bits & 0x7fffffff;
  // Below 2^-14: the last place of 0.5 is that of a subnormal, so that adding 0.5 rounds.
  const auto shifted = reinterpret_cast<Words32>(reinterpret_cast<Floats>(magnitude) + 0.5f);
  const Words32 subnormal = shifted - 0x3f000000;
  const Words32 normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  Words32 half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x47800000 ? broadcast_word(0x7c00) : half;
  half = v == v ? half : broadcast_word(0x7e00);
  store_words(x, half | (bits >> 16 & 0x8000));
}

// x[index[l]] in lane l.
template <class In>
CWBR_INLINE auto gather(const In* x, const int64_t* index) {
  In lanes[kLanes<accumulate_t<In>>];
  for (int l = 0; l < kLanes<accumulate_t<In>>; ++l) lanes[l] = x[index[l]];
  return load_input(lanes);
}
#if defined(CWBR_AVX512)
CWBR_INLINE Floats gather(const float* x, const int64_t* index) {
  const __m512i low = _mm512_loadu_si512(index), high = _mm512_loadu_si512(index + 8);
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_i64gather_ps(low, x, 4)),
                            _mm512_i64gather_ps(high, x, 4), 1);
}
#endif

// The first `count` lanes from memory, `fill` in the others.
template <class In, class T>
CWBR_INLINE Vec<T> load_input_first(const In* x, int64_t count, T fill) {
  In lanes[kLanes<T>] = {};
  for (int l = 0; l < kLanes<T> && l < count; ++l) lanes[l] = x[l];
  T values[kLanes<T>];
  store(values, load_input(lanes));
  return load_first(values, count, fill);
}
template <class In, class V>
CWBR_INLINE void store_output_first(In* x, int64_t count, V v) {
  constexpr int lane_count = sizeof(V) / sizeof(v[0]);
  In lanes[lane_count];
  store_output(lanes, v);
  for (int l = 0; l < lane_count && l < count; ++l) x[l] = lanes[l];
}

template <class T>
CWBR_INLINE T max_lanes(Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  T max = lanes[0];
  for (int l = 1; l < kLanes<T>; ++l) max = lanes[l] > max ? lanes[l] : max;
  return max;
}

// 1 / k! for k < Count.
template <class T, int Count>
struct Factorials {
  T of[Count];

  constexpr Factorials() : of() {
    double inverse = 1;
    for (int k = 0; k < Count; ++k) {
      of[k] = inverse;
      inverse /= k + 1;
    }
  }
};

// exp(x) for x <= 0, within two units in the last place. Without `subnormal` the smallest result
// is near the smallest normal number, which is nothing in a sum that holds exp(0).
template <class T, bool subnormal>
CWBR_INLINE Vec<T> exp_negative(Vec<T> x) {
  constexpr bool single = sizeof(T) == 4;
  constexpr T lowest = subnormal ? (single ? -104 : -746) : (single ? -86 : -707);
  constexpr T rounder = single ? T(0x1.8p23) : T(0x1.8p52);  // adding it rounds to a whole number
  constexpr T log2_high = single ? 0x1.63p-1 : 0x1.62e4p-1;  // times a whole number: exact
  constexpr T log2_low = 0.693147180559945309417 - (single ? 0x1.63p-1 : 0x1.62e4p-1);
  x = x < lowest ? broadcast(lowest) : x;
  const Vec<T> shifted = fma(x, broadcast(T(1.44269504088896340736)), broadcast(rounder));
  const Vec<T> n = shifted - rounder;
  const Vec<T> r = fma(n, broadcast(-log2_low), fma(n, broadcast(-log2_high), x));
  constexpr int terms = single ? 8 : 14;  // of the series r^k / k!
  constexpr Factorials<T, terms> inverse;
  Vec<T> sum = broadcast(inverse.of[terms - 1]);
  for (int k = terms - 2; k >= 0; --k) sum = fma(sum, r, broadcast(inverse.of[k]));
  if constexpr (subnormal) {
    const Vec<T> half = n * T(0.5) + rounder - rounder;
    return sum * power_of_two<T>(half) * power_of_two<T>(n - half);
  } else {
    // n is in the low bits of `shifted`: 2^n has it, added to those of 1, as its exponent.
    using Integers = typename Types<T>::Integers;
    constexpr int mantissa_bits = single ? 23 : 52;
    const Integers exponent = reinterpret_cast<Integers>(shifted) << mantissa_bits;
    const Integers one = reinterpret_cast<Integers>(broadcast(T(1)));
    return sum * reinterpret_cast<Vec<T>>(exponent + one);
  }
}

// The columns of a row from `first` on: so many whole vectors, or the first `count` lanes of one.
template <class In, int Vectors, bool Whole>
struct Columns {
  using T = accumulate_t<In>;
  int64_t first, count;

  CWBR_INLINE Vec<T> input(const In* row, int v) const {
    const int64_t at = first + v * kLanes<T>;
    return Whole ? load_input(row + at) : load_input_first(row + at, count, T(0));
  }
  CWBR_INLINE Vec<T> values(const T* row, int v) const {
    const int64_t at = first + v * kLanes<T>;
    return Whole ? load(row + at) : load_first(row + at, count, T(0));
  }
  CWBR_INLINE void put(T* row, int v, Vec<T> value) const {
    const int64_t at = first + v * kLanes<T>;
    Whole ? store(row + at, value) : store_first(row + at, count, value);
  }
  CWBR_INLINE void output(In* row, int v, Vec<T> value) const {
    const int64_t at = first + v * kLanes<T>;
    Whole ? store_output(row + at, value) : store_output_first(row + at, count, value);
  }
};

template <class In, int Vectors, bool Whole, class T>
CWBR_INLINE void column_moments(const GroupRows<In>& rows, Columns<In, Vectors, Whole> columns,
                                T eps, T* mean, T* var) {
  const T inverse = T(1) / (rows.count > 0 ? rows.count : 1);
  Vec<T> center[Vectors] = {}, deviations[Vectors] = {}, squares[Vectors] = {};
  for (int64_t s = 0; s < rows.count; ++s) {
    const In* row = rows.z + rows.samples[s] * rows.stride;
    for (int v = 0; v < Vectors; ++v) center[v] += columns.input(row, v);
  }
  for (int v = 0; v < Vectors; ++v) center[v] *= inverse;
  for (int64_t s = 0; s < rows.count; ++s) {
    const In* row = rows.z + rows.samples[s] * rows.stride;
    for (int v = 0; v < Vectors; ++v) {
      const Vec<T> deviation = columns.input(row, v) - center[v];
      deviations[v] += deviation;
      squares[v] = fma(deviation, deviation, squares[v]);
    }
  }
  for (int v = 0; v < Vectors; ++v) {
    // What rounding `center` left over: it corrects the mean, and the squares are about it.
    const Vec<T> left = deviations[v] * inverse;
    const Vec<T> variance = (squares[v] - deviations[v] * left) * inverse;
    columns.put(mean, v, left == left ? center[v] + left : center[v]);  // keeps infinity
    columns.put(var, v, variance < eps ? broadcast(eps) : variance);
  }
}

template <class In, int Vectors, bool Whole, class T>
CWBR_INLINE void column_gradient(const GroupRows<In>& rows, Columns<In, Vectors, Whole> columns,
                                 T eps, const T* mean, const T* var, const T* grad_mean,
                                 const T* grad_var, In* grad_z, int64_t grad_stride) {
  const T inverse = T(1) / (rows.count > 0 ? rows.count : 1);
  Vec<T> center[Vectors], constant[Vectors], slope[Vectors];
  for (int v = 0; v < Vectors; ++v) {
    center[v] = columns.values(mean, v);
    constant[v] = columns.values(grad_mean, v) * inverse;
    const Vec<T> through_var = columns.values(grad_var, v) * (2 * inverse);
    slope[v] = columns.values(var, v) > eps ? through_var : broadcast(T(0));
  }
  for (int64_t s = 0; s < rows.count; ++s) {
    const In* row = rows.z + rows.samples[s] * rows.stride;
    In* grad = grad_z + rows.samples[s] * grad_stride;
    for (int v = 0; v < Vectors; ++v) {
      columns.output(grad, v, fma(slope[v], columns.input(row, v) - center[v], constant[v]));
    }
  }
}

// Calls body on blocks of whole vectors of columns, several at a time, and on what is left.
template <class In, class Body>
CWBR_INLINE void for_each_column(int64_t width, Body body) {
  constexpr int unroll = 4, lanes = kLanes<accumulate_t<In>>;
  int64_t c = 0;
  for (; c + unroll * lanes <= width; c += unroll * lanes) body(Columns<In, unroll, true>{c, 0});
  for (; c + lanes <= width; c += lanes) body(Columns<In, 1, true>{c, 0});
  if (c < width) body(Columns<In, 1, false>{c, width - c});
}

template <class In, class T>
void moments(const GroupRows<In>& rows, T eps, T* mean, T* var) {
  for_each_column<In>(rows.width, [&](auto columns) CWBR_LAMBDA_INLINE {
    column_moments(rows, columns, eps, mean, var);
  });
}

template <class In, class T>
void moments_gradient(const GroupRows<In>& rows, T eps, const T* mean, const T* var,
                      const T* grad_mean, const T* grad_var, In* grad_z, int64_t grad_stride) {
  for_each_column<In>(rows.width, [&](auto columns) CWBR_LAMBDA_INLINE {
    column_gradient(rows, columns, eps, mean, var, grad_mean, grad_var, grad_z, grad_stride);
  });
}

// One pass over memory: a block is read twice, the second time from the nearest cache, and the
// sum so far is rescaled where a block raises the maximum. `visit(first, last, maximum)` is called
// for each block while that cache holds it.
template <class In, class T, class Visit>
CWBR_INLINE SoftmaxStatistics<T> visit_softmax(const In* logits, int64_t n, Visit visit) {
  constexpr int lanes = kLanes<T>, unroll = 4;
  constexpr int64_t block = 1024;
  constexpr T none = -std::numeric_limits<T>::infinity();
  T max = none;
  Vec<T> sums[unroll] = {};
  for (int64_t first = 0; first < n; first += block) {
    const int64_t last = first + block < n ? first + block : n;
    const int64_t bulk = first + (last - first) / (unroll * lanes) * (unroll * lanes);
    Vec<T> largest[unroll];
    for (int u = 0; u < unroll; ++u) largest[u] = broadcast(none);
    for (int64_t c = first; c < bulk; c += unroll * lanes)
      for (int u = 0; u < unroll; ++u)
        largest[u] = larger(load_input(logits + c + u * lanes), largest[u]);
    for (int64_t c = bulk; c < last; c += lanes)
      largest[0] = larger(load_input_first(logits + c, last - c, none), largest[0]);

    const T block_max =
        max_lanes<T>(larger(larger(largest[0], largest[1]), larger(largest[2], largest[3])));
    visit(first, last, block_max);
    const T before = max;
    max = block_max > max ? block_max : max;
    // Where all logits so far are -inf, exp(-inf - 0) is the 0 that they count for.
    const T shift = max == none ? T(0) : max;
    if (before != max) {
      const T scale = std::exp(before - shift);
      for (int u = 0; u < unroll; ++u) sums[u] *= scale;
    }
    for (int64_t c = first; c < bulk; c += unroll * lanes)
      for (int u = 0; u < unroll; ++u) {
        // While this block's exponentials are computed, the next one comes from memory.
        if (u % (64 / kVectorBytes) == 0) __builtin_prefetch(logits + c + u * lanes + block);
        sums[u] += exp_negative<T, false>(load_input(logits + c + u * lanes) - shift);
      }
    for (int64_t c = bulk; c < last; c += lanes)
      sums[0] += exp_negative<T, false>(load_input_first(logits + c, last - c, none) - shift);
  }
  return {max, sum_lanes<T>(sums[0] + sums[1] + (sums[2] + sums[3]))};
}

template <class In, class T = accumulate_t<In>>
SoftmaxStatistics<T> softmax_statistics(const In* logits, int64_t n) {
  return visit_softmax<In, T>(logits, n, [](int64_t, int64_t, T) CWBR_LAMBDA_INLINE {});
}

template <class In, class T>
void add_probabilities(const In* logits, SoftmaxStatistics<T> statistics, const int64_t* columns,
                       int64_t n, T* total) {
  const T scale = T(1) / statistics.sum;
  int64_t j = 0;
  for (; j + kLanes<T> <= n; j += kLanes<T>) {
    const Vec<T> e = exp_negative<T, true>(gather(logits, columns + j) - statistics.max);
    store(total + j, fma(e, broadcast(scale), load(total + j)));
  }
  if (j == n) return;
  int64_t last[kLanes<T>] = {};
  for (int l = 0; l < n - j; ++l) last[l] = columns[j + l];
  const Vec<T> e = exp_negative<T, true>(gather(logits, last) - statistics.max);
  store_first(total + j, n - j, fma(e, broadcast(scale), load_first(total + j, n - j, T(0))));
}

}  // namespace cwbr::CWBR_ISA
