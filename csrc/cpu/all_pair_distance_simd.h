// Tiles of distances and blocks of gradients for one instruction set; see simd.h.
//
// With w = var + eps and S = w_i + w_j, a distance is
//     sum_d (mean_i - mean_j)^2 / (4 S) + (L_ij - (L_i + L_j) / 2) / 2,   L_ij = sum_d log(S),
// and L_i = L_ii. A running sum of fractions is kept as one fraction, n/d + a/S = (n S + a d)/(d
// S), whose denominator is also the product whose logarithm is L_ij: a group of vectors costs one
// reciprocal and one split into exponent and mantissa. L_i is computed by the same products, so
// that equal rows cancel exactly.

namespace cwbr::CWBR_ISA {

constexpr double kLog2 = 0.693147180559945309417;

constexpr int kFlush = 16;  // groups

// A sum of fractions, and the product of their denominators as mantissa * 2^exponent, lane by lane.
template <class T>
struct Sums {
  Vec<T> quadratic, product, exponents;
  Vec<T> earlier;  // quadratic up to the last flush

  // Not a default constructor: GCC compiles those it writes itself for the wrong instruction set.
  static CWBR_INLINE Sums zero() { return {Vec<T>{}, broadcast(T(1)), Vec<T>{}, Vec<T>{}}; }
  // Sums in two levels round off less than one long sum.
  CWBR_INLINE void flush() {
    earlier += quadratic;
    quadratic = Vec<T>{};
  }
  CWBR_INLINE void multiply(Vec<T> denominator) {
    const Vec<T> p = product * denominator;
    exponents += exponent(p);
    product = mantissa(p);
  }
  CWBR_INLINE void add(Vec<T> numerator, Vec<T> denominator) {
    quadratic = fma(numerator, reciprocal(denominator), quadratic);
    multiply(denominator);
  }
};

// log(product) of each of kLanes sums, as exponent * log(2) + result.
template <class T>
CWBR_INLINE Vec<T> log_products(const Vec<T>* products, const Vec<T>* exponents,
                                Vec<T>& exponent_sum) {
  const Vec<T> product = product_each<T>(products);
  Vec<T> halvings;
  const Vec<T> log = log_mantissa<T>(mantissa(product), halvings);
  exponent_sum = sum_each<T>(exponents) + exponent(product) + halvings;
  return log;
}

template <class T>
CWBR_INLINE Vec<T> load_vector(const T* row, int64_t vector, int64_t d, T fill) {
  const int64_t first = vector * kLanes<T>, left = d - first;
  return left >= kLanes<T> ? load(row + first) : load_first(row + first, left, fill);
}

template <class T>
CWBR_INLINE Vec<T> load_variance(const Rows<T>& rows, int64_t row, int64_t vector) {
  return load_vector(rows.var + row * rows.d, vector, rows.d, T(1) - rows.eps) + rows.eps;
}

template <class T>
void scale(const Rows<T>& rows, int64_t first, int64_t last, const Scaling<T>& scaling) {
  constexpr int N = kLanes<T>;
  constexpr T infinity = std::numeric_limits<T>::infinity();
  for (int64_t group = first; group < last; ++group) {
    const int64_t begin = group * kGroup;
    const int count = int(begin + kGroup < scaling.vectors ? kGroup : scaling.vectors - begin);
    Vec<T> var_low[kGroup], var_high[kGroup], mean_low[kGroup], mean_high[kGroup];
    for (int x = 0; x < count; ++x) {
      var_low[x] = mean_low[x] = broadcast(infinity);
      var_high[x] = mean_high[x] = broadcast(-infinity);
    }
    for (int64_t row = 0; row < rows.k; ++row)
      for (int x = 0; x < count; ++x) {
        const Vec<T> mean = load_vector(rows.mean + row * rows.d, begin + x, rows.d, T(0));
        const Vec<T> var = load_variance(rows, row, begin + x);
        mean_low[x] = smaller(mean, mean_low[x]);
        mean_high[x] = larger(mean, mean_high[x]);
        var_low[x] = smaller(var, var_low[x]);
        var_high[x] = larger(var, var_high[x]);
      }
    // Exponents that bound every product of denominators, and every numerator over it.
    Vec<T> lowest = {}, highest = {}, quadratic = {};
    for (int x = 0; x < count; ++x) {
      Vec<T> k = (exponent(var_low[x]) + exponent(var_high[x])) * T(-0.25);
      const auto usable = (k > T(-32)) & (k < T(32)) & (var_low[x] > T(0));
      k = usable ? k : Vec<T>{};
      // Rounds to a whole number: adding 1.5 * 2^p leaves no fraction bits.
      constexpr T whole = sizeof(T) == 4 ? T(0x1.8p23) : T(0x1.8p52);
      k = (k + whole) - whole;
      store(scaling.mean + (begin + x) * N, power_of_two<T>(k));
      store(scaling.var + (begin + x) * N, power_of_two<T>(k + k));
      const Vec<T> spread = mean_high[x] - mean_low[x];
      lowest += exponent(var_low[x]) + (k + k) + T(1);
      highest += larger(exponent(var_high[x]) + (k + k) + T(2), Vec<T>{});
      quadratic = larger(exponent(spread * spread) + (k + k) + T(1), quadratic);
    }
    constexpr T range = kExponentRange<T>;
    scaling.safe[group] =
        all((lowest > -range) & (highest + quadratic + T(3) < range + T(20)) & (highest < range));
  }
}

// Multiplies twice the variances of `count` vectors into the row's product, as `add_group` does for
// two rows.
template <class T>
CWBR_INLINE void add_self(const T* row, int count, Sums<T>& sums) {
  constexpr int N = kLanes<T>;
  Vec<T> denominator = load(row + N) + load(row + N);
  for (int x = 1; x < count; ++x) {
    const Vec<T> w = load(row + 2 * N * x + N);
    denominator *= w + w;
  }
  sums.multiply(denominator);
}

template <class T>
void pack(const Rows<T>& rows, const Scaling<T>& scaling, int64_t first, int64_t count,
          const Panel<T>& panel) {
  constexpr int N = kLanes<T>;
  const int64_t marks = checkpoints(scaling.vectors);
  for (int64_t begin = 0; begin < count; begin += N) {
    Vec<T> products[N], exponents[N];
    T valid[N];
    const int batch = int(begin + N < count ? N : count - begin);
    for (int r = 0; r < N; ++r) {
      products[r] = broadcast(T(1));
      exponents[r] = Vec<T>{};
    }
    for (int r = 0; r < batch; ++r) {
      const int64_t row = first + begin + r < rows.k ? first + begin + r : rows.k - 1;
      T* out = panel.values + (begin + r) * panel.stride;
      Vec<T> low = broadcast(T(1)), zero = {};
      for (int64_t x = 0; x < scaling.vectors; ++x) {
        const Vec<T> mean = load_vector(rows.mean + row * rows.d, x, rows.d, T(0));
        const Vec<T> var = load_variance(rows, row, x);
        store(out + 2 * N * x, mean * load(scaling.mean + N * x));
        store(out + 2 * N * x + N, var * load(scaling.var + N * x));
        low = smaller(var, low);
        zero += var - var;  // NaN where var is infinite or NaN
      }
      valid[r] = all((low > T(0)) & (zero == T(0))) ? T(0) : T(NAN);
      auto sums = Sums<T>::zero();
      for (int64_t x = 0, mark = 0; x < scaling.vectors; x += kGroup) {
        const int in_group = int(x + kGroup < scaling.vectors ? kGroup : scaling.vectors - x);
        const bool safe = scaling.safe[x / kGroup];
        for (int y = 0; y < in_group; y += safe ? in_group : 1)
          add_self(out + 2 * N * (x + y), safe ? in_group : 1, sums);
        if ((x / kGroup + 1) % kCheckpoint == 0 && mark < marks)
          panel.checkpoints[(begin + r) * marks + mark++] = sum_lanes<T>(sums.exponents);
      }
      products[r] = sums.product;
      exponents[r] = sums.exponents;
    }
    Vec<T> exponent_sum;
    const Vec<T> log =
        log_products<T>(products, exponents, exponent_sum) + load_first(valid, batch, T(0));
    store_first(panel.log + begin, batch, log);
    store_first(panel.exponent + begin, batch, exponent_sum);
  }
}

// Adds the fractions of `count` vectors of dimensions to the sums of R x C pairs.
template <int R, int C, class T>
CWBR_INLINE void add_group(const T* i, int64_t stride_i, const T* j, int64_t stride_j, int count,
                           Sums<T>* sums) {
  constexpr int N = kLanes<T>;
  Vec<T> numerator[R][C] = {}, denominator[R][C] = {};
  CWBR_UNROLL(8)
  for (int x = 0; x < count; ++x) {
    Vec<T> mean_j[C], var_j[C];
    CWBR_UNROLL(4)
    for (int c = 0; c < C; ++c) {
      mean_j[c] = load(j + c * stride_j + 2 * N * x);
      var_j[c] = load(j + c * stride_j + 2 * N * x + N);
    }
    CWBR_UNROLL(4)
    for (int r = 0; r < R; ++r) {
      const Vec<T> mean_i = load(i + r * stride_i + 2 * N * x);
      const Vec<T> var_i = load(i + r * stride_i + 2 * N * x + N);
      CWBR_UNROLL(4)
      for (int c = 0; c < C; ++c) {
        const Vec<T> difference = mean_i - mean_j[c], s = var_i + var_j[c];
        const Vec<T> square = difference * difference;
        numerator[r][c] = x == 0 ? square : fma(numerator[r][c], s, square * denominator[r][c]);
        denominator[r][c] = x == 0 ? s : denominator[r][c] * s;
      }
    }
  }
  CWBR_UNROLL(4)
  for (int r = 0; r < R; ++r) {
    CWBR_UNROLL(4)
    for (int c = 0; c < C; ++c) sums[r * kTile + c].add(numerator[r][c], denominator[r][c]);
  }
}

// Whether every distance of the tile already exceeds `limit` after the groups up to a checkpoint:
// no later term is negative, and an exponent misses less than 1 of each lane's logarithm.
template <class T>
bool tile_exceeds(const Sums<T>* sums, const T* self_i, const T* self_j, int64_t marks,
                  int64_t rows_i, int64_t rows_j, T limit) {
  for (int64_t r = 0; r < rows_i; ++r)
    for (int64_t c = 0; c < rows_j; ++c) {
      const Sums<T>& pair = sums[r * kTile + c];
      const T log = sum_lanes<T>(pair.exponents) - (self_i[r * marks] + self_j[c * marks]) / 2;
      const T bound =
          sum_lanes<T>(pair.earlier + pair.quadratic) / 4 + T(kLog2) / 2 * (log - kLanes<T>);
      if (!(bound > limit)) return false;
    }
  return true;
}

template <class T>
void tile(const Panel<T>& panel_i, const Panel<T>& panel_j, const Scaling<T>& scaling,
          int64_t rows_i, int64_t rows_j, bool upper, T limit, T* distance) {
  constexpr int N = kLanes<T>, R = 2, C = 2;
  const int64_t marks = checkpoints(scaling.vectors);
  Sums<T> sums[kTile * kTile];
  for (auto& pair : sums) pair = Sums<T>::zero();
  for (int64_t x = 0; x < scaling.vectors; x += kGroup) {
    const int64_t left = scaling.vectors - x;
    const bool safe = scaling.safe[x / kGroup];
    for (int64_t r = 0; r < rows_i; r += R)
      for (int64_t c = upper ? r : 0; c < rows_j; c += C) {
        const T* i = panel_i.values + r * panel_i.stride + 2 * N * x;
        const T* j = panel_j.values + c * panel_j.stride + 2 * N * x;
        Sums<T>* pairs = sums + r * kTile + c;
        if (safe && left >= kGroup)
          add_group<R, C>(i, panel_i.stride, j, panel_j.stride, kGroup, pairs);
        else if (safe)
          add_group<R, C>(i, panel_i.stride, j, panel_j.stride, int(left), pairs);
        else
          for (int64_t y = 0; y < left && y < kGroup; ++y)
            add_group<R, C>(i + 2 * N * y, panel_i.stride, j + 2 * N * y, panel_j.stride, 1, pairs);
      }
    const int64_t groups = x / kGroup + 1;
    if (groups % kFlush == 0)
      for (auto& pair : sums) pair.flush();
    if (limit >= 0 && !upper && groups % kCheckpoint == 0 && left > kGroup) {
      const int64_t mark = groups / kCheckpoint - 1;
      if (tile_exceeds(sums, panel_i.checkpoints + mark, panel_j.checkpoints + mark, marks, rows_i,
                       rows_j, limit)) {
        for (int p = 0; p < kTile * kTile; ++p) distance[p] = std::numeric_limits<T>::infinity();
        return;
      }
    }
  }
  T self_exponent[kTile * kTile] = {}, self_log[kTile * kTile] = {};
  for (int64_t r = 0; r < rows_i; ++r)
    for (int64_t c = 0; c < rows_j; ++c) {
      self_exponent[r * kTile + c] = (panel_i.exponent[r] + panel_j.exponent[c]) / 2;
      self_log[r * kTile + c] = (panel_i.log[r] + panel_j.log[c]) / 2;
    }
  for (int p = 0; p < kTile * kTile; p += N) {
    Vec<T> quadratics[N], products[N], exponents[N], exponent_sum;
    for (int l = 0; l < N; ++l) {
      quadratics[l] = sums[p + l].earlier + sums[p + l].quadratic;
      products[l] = sums[p + l].product;
      exponents[l] = sums[p + l].exponents;
    }
    const Vec<T> log = log_products<T>(products, exponents, exponent_sum) - load(self_log + p);
    const Vec<T> log_term = fma(exponent_sum - load(self_exponent + p), broadcast(T(kLog2)), log);
    const Vec<T> sum = fma(sum_each<T>(quadratics), broadcast(T(0.25)), log_term * T(0.5));
    store(distance + p, sum < T(0) ? Vec<T>{} : sum);
  }
}

// Sums over pairs, of one row and one vector of dimensions, each times the pair's gradient, with
// t = (mean_other - mean) / S and z = (w_other - w) / S.
template <class T>
struct RowGradient {
  Vec<T> t, z, t2;
};

// 1 / s[r] for each r; shared, by one reciprocal of the product of all four.
template <bool Shared, class T>
CWBR_INLINE void reciprocals(Vec<T>* s) {
  static_assert(kGradientRows == 4);
  if (Shared) {
    const Vec<T> first = s[0] * s[1], second = s[2] * s[3], all = reciprocal(first * second);
    const Vec<T> by_first = all * second, by_second = all * first;
    const Vec<T> r0 = by_first * s[1], r1 = by_first * s[0];
    const Vec<T> r2 = by_second * s[3], r3 = by_second * s[2];
    s[0] = r0, s[1] = r1, s[2] = r2, s[3] = r3;
  } else {
    CWBR_UNROLL(4)
    for (int r = 0; r < kGradientRows; ++r) s[r] = reciprocal(s[r]);
  }
}

// The pairs of kGradientRows rows i with rows j in [first, last). moments holds mean and w of each
// row; grad is (j, kGradientRows).
template <bool Shared, class T>
CWBR_INLINE void gradient_rows(const Vec<T>* moments_i, RowGradient<T>* sums_i,
                               const Vec<T>* moments_j, RowGradient<T>* sums_j, const T* grad,
                               int64_t first, int64_t last) {
  RowGradient<T> i[kGradientRows];
  CWBR_UNROLL(4)
  for (int r = 0; r < kGradientRows; ++r) i[r] = sums_i[r];
  for (int64_t j = first; j < last; ++j) {
    const Vec<T> mean = moments_j[2 * j], w = moments_j[2 * j + 1];
    RowGradient<T> sum = sums_j[j];
    Vec<T> r[kGradientRows];
    CWBR_UNROLL(4)
    for (int k = 0; k < kGradientRows; ++k) r[k] = w + moments_i[2 * k + 1];
    reciprocals<Shared, T>(r);
    CWBR_UNROLL(4)
    for (int k = 0; k < kGradientRows; ++k) {
      const Vec<T> g = broadcast(grad[j * kGradientRows + k]);
      const Vec<T> t = (mean - moments_i[2 * k]) * r[k], z = (w - moments_i[2 * k + 1]) * r[k];
      const Vec<T> t2 = t * t;
      i[k].t = fma(g, t, i[k].t);
      i[k].z = fma(g, z, i[k].z);
      i[k].t2 = fma(g, t2, i[k].t2);
      sum.t = fma(-g, t, sum.t);
      sum.z = fma(-g, z, sum.z);
      sum.t2 = fma(g, t2, sum.t2);
    }
    sums_j[j] = sum;
  }
  CWBR_UNROLL(4)
  for (int r = 0; r < kGradientRows; ++r) sums_i[r] = i[r];
}

// Reads one vector of dimensions of rows [first, first + count), padded with copies of the last to
// a multiple of kGradientRows. Returns whether four sums of them can share a reciprocal.
template <class T>
bool load_moments(const Rows<T>& rows, const Scaling<T>& scaling, int64_t first, int64_t count,
                  int64_t vector, Vec<T>* moments) {
  const Vec<T> mean_scale = load(scaling.mean + vector * kLanes<T>);
  const Vec<T> var_scale = load(scaling.var + vector * kLanes<T>);
  Vec<T> low = broadcast(T(1)), high = low;
  const int64_t padded = (count + kGradientRows - 1) / kGradientRows * kGradientRows;
  for (int64_t r = 0; r < padded; ++r) {
    const int64_t row = first + (r < count ? r : count - 1);
    moments[2 * r] = load_vector(rows.mean + row * rows.d, vector, rows.d, T(0)) * mean_scale;
    moments[2 * r + 1] = load_variance(rows, row, vector) * var_scale;
    low = smaller(moments[2 * r + 1], low);
    high = larger(moments[2 * r + 1], high);
  }
  constexpr T bound = sizeof(T) == 4 ? T(0x1p-24) : T(0x1p-250);
  return all((low > bound) & (high < 1 / bound));
}

// Adds the sums of rows [first, first + count) to the gradients:
// dD/dmean = -t/2 and dD/dw = -(z/w + t^2)/4, scaled back.
template <class T>
void store_gradients(const Rows<T>& rows, const Scaling<T>& scaling, int64_t first, int64_t count,
                     int64_t vector, const Vec<T>* moments, const RowGradient<T>* sums,
                     T* grad_mean, T* grad_var) {
  const Vec<T> mean_scale = load(scaling.mean + vector * kLanes<T>) * T(-0.5);
  const Vec<T> var_scale = load(scaling.var + vector * kLanes<T>) * T(-0.25);
  const int64_t left = rows.d - vector * kLanes<T>;
  for (int64_t r = 0; r < count; ++r) {
    const Vec<T> by_mean = sums[r].t * mean_scale;
    const Vec<T> by_var = (sums[r].z / moments[2 * r + 1] + sums[r].t2) * var_scale;
    T* mean = grad_mean + (first + r) * rows.d + vector * kLanes<T>;
    T* var = grad_var + (first + r) * rows.d + vector * kLanes<T>;
    if (left >= kLanes<T>) {
      store(mean, load(mean) + by_mean);
      store(var, load(var) + by_var);
    } else {
      store_first(mean, left, load_first(mean, left, T(0)) + by_mean);
      store_first(var, left, load_first(var, left, T(0)) + by_var);
    }
  }
}

template <class T>
CWBR_INLINE bool any_nonzero(const GradientBlock<T>& block, int64_t i, int64_t first_j,
                             int64_t last_j) {
  const int64_t tiles = (block.rows_j + kTile - 1) / kTile;
  const uint8_t* nonzero = block.nonzero + i / kGradientRows * tiles;
  bool any = false;
  for (int64_t tile = first_j / kTile; tile * kTile < last_j; ++tile) any |= nonzero[tile] != 0;
  return any;
}

template <class T>
void gradient(const Rows<T>& rows, const Scaling<T>& scaling, const GradientBlock<T>& block,
              int64_t first, int64_t last, T* work, T* grad_mean, T* grad_var) {
  constexpr int64_t block_j = 64;  // rows j whose moments and sums stay in the first-level cache
  const bool diagonal = block.first_i == block.first_j;
  const int64_t padded_i = (block.rows_i + kGradientRows - 1) / kGradientRows * kGradientRows;
  const int64_t padded_j = (block.rows_j + kGradientRows - 1) / kGradientRows * kGradientRows;
  auto* moments_i = reinterpret_cast<Vec<T>*>(work);
  auto* sums_i = reinterpret_cast<RowGradient<T>*>(moments_i + 2 * padded_i);
  auto* own_moments_j = reinterpret_cast<Vec<T>*>(sums_i + padded_i);
  auto* sums_j = reinterpret_cast<RowGradient<T>*>(own_moments_j + 2 * padded_j);
  auto* moments_j = diagonal ? moments_i : own_moments_j;
  for (int64_t vector = first; vector < last; ++vector) {
    bool shared = load_moments(rows, scaling, block.first_i, block.rows_i, vector, moments_i);
    if (!diagonal)
      shared &= load_moments(rows, scaling, block.first_j, block.rows_j, vector, moments_j);
    for (int64_t r = 0; r < padded_i; ++r) sums_i[r] = {Vec<T>{}, Vec<T>{}, Vec<T>{}};
    for (int64_t r = 0; r < padded_j; ++r) sums_j[r] = {Vec<T>{}, Vec<T>{}, Vec<T>{}};
    for (int64_t j = 0; j < block.rows_j; j += block_j) {
      const int64_t last_j = j + block_j < block.rows_j ? j + block_j : block.rows_j;
      for (int64_t i = 0; i < padded_i && (!diagonal || i < last_j); i += kGradientRows) {
        if (!any_nonzero(block, i, j, last_j)) continue;
        const T* grad = block.grad + i * block.rows_j;
        const int64_t first_j = diagonal && i > j ? i : j;
        const auto add = shared ? gradient_rows<true, T> : gradient_rows<false, T>;
        add(moments_i + 2 * i, sums_i + i, moments_j, sums_j, grad, first_j, last_j);
      }
    }
    store_gradients(rows, scaling, block.first_i, block.rows_i, vector, moments_i, sums_i,
                    grad_mean, grad_var);
    store_gradients(rows, scaling, block.first_j, block.rows_j, vector, moments_j, sums_j,
                    grad_mean, grad_var);
  }
}

}  // namespace cwbr::CWBR_ISA
