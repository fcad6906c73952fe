// Distances and gradients of listed pairs for one instruction set; see simd.h, and
// all_pair_distance_simd.h for the mathematics. Rows are read where they lie.

namespace cwbr::CWBR_ISA {

// The sums of one pair, and the products for L_i and L_j beside that for L_ij.
template <class T>
struct PairSums {
  Sums<T> both;
  Vec<T> product_i, product_j, exponents_alone;
  Vec<T> lowest, highest;  // exponents of any group's products

  static CWBR_INLINE PairSums zero() {
    const Vec<T> one = broadcast(T(1)), none = {};
    return {Sums<T>::zero(), one, one, none, none, none};
  }
  CWBR_INLINE void add(Vec<T> numerator, Vec<T> denominator, Vec<T> twice_i, Vec<T> twice_j) {
    const Vec<T> before = both.exponents;
    both.add(numerator, denominator);
    highest = larger(both.exponents - before, highest);
    const Vec<T> i = product_i * twice_i, j = product_j * twice_j;
    const Vec<T> exponent_i = exponent(i), exponent_j = exponent(j);
    product_i = mantissa(i);
    product_j = mantissa(j);
    exponents_alone += exponent_i + exponent_j;
    lowest = smaller(exponent_i, smaller(exponent_j, lowest));
  }

  CWBR_INLINE Vec<T> quadratic() const { return both.earlier + both.quadratic; }

  CWBR_INLINE bool in_range() const {
    constexpr T range = kExponentRange<T>;
    return all((lowest > -range) & (highest < range) & (quadratic() - quadratic() == T(0)));
  }
};

// Adds `count` vectors of dimensions, of d numbers in all.
template <bool Whole, class T>
CWBR_INLINE void add_pair(const T* mean_i, const T* var_i, const T* mean_j, const T* var_j,
                          int count, int64_t d, T scale, T eps, PairSums<T>& sums) {
  const auto at = [&](const T* x, int vector, T fill)
                      CWBR_LAMBDA_INLINE { return load_vector<Whole>(x, vector, d, fill); };
  const Vec<T> scales = broadcast(scale), scaled_eps = broadcast(scale * eps);
  Vec<T> numerator = {}, denominator = {}, twice_i = {}, twice_j = {};
  CWBR_UNROLL(8)
  for (int x = 0; x < count; ++x) {
    const Vec<T> w_i = fma(at(var_i, x, T(1)), scales, scaled_eps);
    const Vec<T> w_j = fma(at(var_j, x, T(1)), scales, scaled_eps);
    const Vec<T> difference = at(mean_i, x, T(0)) - at(mean_j, x, T(0));
    const Vec<T> s = w_i + w_j, square = difference * difference;
    numerator = x == 0 ? square : fma(numerator, s, square * denominator);
    denominator = x == 0 ? s : denominator * s;
    // Twice w_i is what s is for equal rows: their products then round alike, to the last bit.
    twice_i = x == 0 ? w_i + w_i : twice_i * (w_i + w_i);
    twice_j = x == 0 ? w_j + w_j : twice_j * (w_j + w_j);
  }
  sums.add(numerator, denominator, twice_i, twice_j);
}

// Adds all dimensions.
template <class T>
CWBR_INLINE void add_pairs(const Rows<T>& rows, int64_t i, int64_t j, T scale, PairSums<T>& sums) {
  const T *mean_i = rows.mean + i * rows.d, *mean_j = rows.mean + j * rows.d;
  const T *var_i = rows.var + i * rows.d, *var_j = rows.var + j * rows.d;
  constexpr int64_t step = kGroup * kLanes<T>;
  int64_t x = 0;
  for (int64_t groups = 1; x + step <= rows.d; x += step, ++groups) {
    add_pair<true>(mean_i + x, var_i + x, mean_j + x, var_j + x, kGroup, step, scale, rows.eps,
                   sums);
    if (groups % kFlush == 0) sums.both.flush();
  }
  if (x < rows.d) {
    const int64_t left = rows.d - x;
    const int count = int((left + kLanes<T> - 1) / kLanes<T>);
    add_pair<false>(mean_i + x, var_i + x, mean_j + x, var_j + x, count, left, scale, rows.eps,
                    sums);
  }
}

// The same for all the variances that T has: none is multiplied, or added to another, before its
// exponent is split off, or it is halved.
template <class T>
CWBR_NOINLINE PairSums<T> wide_pair_sums(const Rows<T>& rows, int64_t i, int64_t j) {
  auto sums = PairSums<T>::zero();
  const auto multiply = [](Vec<T>& product, Vec<T>& exponents, Vec<T> x) CWBR_LAMBDA_INLINE {
    const Vec<T> p = product * mantissa(x);
    exponents += exponent(x) + exponent(p);
    product = mantissa(p);
  };
  const Vec<T> smallest = broadcast(std::numeric_limits<T>::min());
  const Vec<T> largest = broadcast(std::numeric_limits<T>::max());
  auto valid = smallest == smallest;
  for (int64_t x = 0; x * kLanes<T> < rows.d; ++x) {
    const Vec<T> w_i = load_variance<false>(rows, i, x), w_j = load_variance<false>(rows, j, x);
    const Vec<T> half = w_i * T(0.5) + w_j * T(0.5);
    const Vec<T> difference = load_mean<false>(rows, i, x) - load_mean<false>(rows, j, x);
    sums.both.quadratic += difference / half * (difference * T(0.5));
    multiply(sums.both.product, sums.both.exponents, half);
    multiply(sums.product_i, sums.exponents_alone, w_i);
    multiply(sums.product_j, sums.exponents_alone, w_j);
    valid &= (w_i >= smallest) & (w_j >= smallest) & (w_i <= largest) & (w_j <= largest);
    if ((x + 1) % kFlush == 0) sums.both.flush();
  }
  if (!all(valid)) sums.both.quadratic = broadcast(std::numeric_limits<T>::quiet_NaN());
  return sums;
}

template <class T>
CWBR_INLINE PairSums<T> pair_sums(const Rows<T>& rows, int64_t i, int64_t j, T scale) {
  auto sums = PairSums<T>::zero();
  add_pairs(rows, i, j, scale, sums);
  if (!sums.in_range()) return wide_pair_sums(rows, i, j);
  sums.both.earlier *= scale;
  sums.both.quadratic *= scale;
  return sums;
}

template <class T>
void pair_distance(const Rows<T>& rows, const int64_t* pairs, int64_t first, int64_t last,
                   T var_scale, T* distance) {
  constexpr int N = kLanes<T>;
  for (int64_t begin = first; begin < last; begin += N) {
    const int batch = int(begin + N < last ? N : last - begin);
    Vec<T> quadratics[N], ratios[N], exponents[N], exponent_sum;
    for (int p = 0; p < N; ++p) {
      quadratics[p] = exponents[p] = Vec<T>{};
      ratios[p] = broadcast(T(1));
    }
    for (int p = 0; p < batch; ++p) {
      const int64_t* pair = pairs + 2 * (begin + p);
      const auto sums = pair_sums(rows, pair[0], pair[1], var_scale);
      const Vec<T> product = sums.both.product;
      quadratics[p] = sums.quadratic();
      ratios[p] = product * product / (sums.product_i * sums.product_j);
      exponents[p] = sums.both.exponents * T(2) - sums.exponents_alone;
    }
    const Vec<T> log = log_products<T>(ratios, exponents, exponent_sum);
    const Vec<T> log_term = fma(exponent_sum, broadcast(T(kLog2)), log);
    const Vec<T> sum = (sum_each<T>(quadratics) + log_term) * T(0.25);
    store_first(distance + begin, batch, sum < T(0) ? Vec<T>{} : sum);
  }
}

// The logarithms are those of 1 + x, with x = (w_i - w_j)^2 / (4 w_i w_j). Of their product its
// excess over 1 is kept, lane by lane: no term is negative, so no rounding is larger than that of a
// term.
template <class T>
T near_distance(const Rows<T>& rows, int64_t i, int64_t j) {
  Vec<T> quadratic = {}, excess = {}, earlier_quadratic = {}, earlier_excess = {};
  for (int64_t x = 0; x * kLanes<T> < rows.d; ++x) {
    const Vec<T> w_i = load_variance<false>(rows, i, x), w_j = load_variance<false>(rows, j, x);
    const Vec<T> mean = load_mean<false>(rows, i, x) - load_mean<false>(rows, j, x);
    const Vec<T> half = w_i * T(0.5) + w_j * T(0.5), w = w_i - w_j;
    const Vec<T> spread = w / w_i * (w / w_j * T(0.25));
    quadratic += mean / half * (mean * T(0.5));
    excess += fma(spread, excess, spread);
    if ((x + 1) % kFlush == 0) {
      earlier_quadratic += quadratic;
      earlier_excess += fma(earlier_excess, excess, excess);
      quadratic = excess = Vec<T>{};
    }
  }
  T lanes[2 * kLanes<T>], product = 0;
  store(lanes, earlier_excess);
  store(lanes + kLanes<T>, excess);
  for (const T lane : lanes) product += lane + product * lane;
  return (sum_lanes<T>(earlier_quadratic + quadratic) + std::log1p(product)) / 4;
}

// Means are multiplied by this and variances by its square, which leaves room for the sum of the
// two largest that T has, and for its reciprocal.
template <class T>
constexpr T kGradientScale = T(0x1p-4);

// One vector of dimensions of one row, and the sums of pair_gradients_simd.h over its pairs.
template <class T>
struct RowVector {
  Vec<T> mean, w;
  RowGradient<T> sums;
};

template <bool Whole, class T>
CWBR_INLINE void load_rows(const Rows<T>& rows, const int64_t* used, int64_t n, int64_t first,
                           int64_t count, int64_t vectors, RowVector<T>* work) {
  for (int64_t r = 0; r < n; ++r)
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = used[r] * rows.d + first;
      constexpr T scale = kGradientScale<T>;
      const Vec<T> w = load_vector<Whole>(rows.var + at, v, count, T(1)) + rows.eps;
      const Vec<T> mean = load_vector<Whole>(rows.mean + at, v, count, T(0));
      work[r * vectors + v] = {mean * scale, w * (scale * scale), {Vec<T>{}, Vec<T>{}}};
    }
}

template <bool Whole, class T>
CWBR_INLINE void store_rows(const Rows<T>& rows, const int64_t* used, int64_t n, int64_t first,
                            int64_t count, int64_t vectors, const RowVector<T>* work, T* grad_mean,
                            T* grad_var) {
  for (int64_t r = 0; r < n; ++r)
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = used[r] * rows.d + first + v * kLanes<T>, left = count - v * kLanes<T>;
      constexpr T scale = kGradientScale<T>;
      const RowVector<T>& row = work[r * vectors + v];
      const Vec<T> by_mean = row.sums.t * (T(-0.5) * scale);
      const Vec<T> by_var = row.sums.q / row.w * (T(-0.25) * scale * scale);
      if (Whole || left >= kLanes<T>) {
        store(grad_mean + at, by_mean);
        store(grad_var + at, by_var);
      } else {
        store_first(grad_mean + at, left, by_mean);
        store_first(grad_var + at, left, by_var);
      }
    }
}

template <class T>
void pair_distance_backward(const Rows<T>& rows, const T* grad, const int64_t* pairs, int64_t m,
                            const int64_t* used, int64_t n, int64_t first, int64_t count, T* work,
                            T* grad_mean, T* grad_var) {
  const int64_t vectors = (count + kLanes<T> - 1) / kLanes<T>;
  const bool whole = count % kLanes<T> == 0;
  auto* kept = reinterpret_cast<RowVector<T>*>(work);
  const auto load_all = whole ? load_rows<true, T> : load_rows<false, T>;
  load_all(rows, used, n, first, count, vectors, kept);
  for (int64_t p = 0; p < m; ++p) {
    RowVector<T>*i = kept + pairs[2 * p] * vectors, *j = kept + pairs[2 * p + 1] * vectors;
    const Vec<T> g = broadcast(grad[p]);
    for (int64_t v = 0; v < vectors; ++v) {
      const Vec<T> r = reciprocal(i[v].w + j[v].w);
      const Vec<T> t = (j[v].mean - i[v].mean) * r, z = (j[v].w - i[v].w) * r, t2 = t * t;
      i[v].sums.t = fma(g, t, i[v].sums.t);
      i[v].sums.q = fma(g, fma(t2, i[v].w, z), i[v].sums.q);
      j[v].sums.t = fnma(g, t, j[v].sums.t);
      j[v].sums.q = fnma(g, fnma(t2, j[v].w, z), j[v].sums.q);
    }
  }
  const auto store_all = whole ? store_rows<true, T> : store_rows<false, T>;
  store_all(rows, used, n, first, count, vectors, kept, grad_mean, grad_var);
}

}  // namespace cwbr::CWBR_ISA
