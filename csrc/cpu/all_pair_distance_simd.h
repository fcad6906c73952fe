// Tiles of distances for one instruction set; see simd.h.
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

// One vector of a row of d numbers; where not `Whole`, it may reach beyond the row, padded with
// fill.
template <bool Whole, class T>
CWBR_INLINE Vec<T> load_vector(const T* row, int64_t vector, int64_t d, T fill) {
  const int64_t first = vector * kLanes<T>, left = d - first;
  return Whole || left >= kLanes<T> ? load(row + first) : load_first(row + first, left, fill);
}

template <bool Whole, class T>
CWBR_INLINE Vec<T> load_mean(const Rows<T>& rows, int64_t row, int64_t vector) {
  return load_vector<Whole>(rows.mean + row * rows.d, vector, rows.d, T(0));
}

template <bool Whole, class T>
CWBR_INLINE Vec<T> load_variance(const Rows<T>& rows, int64_t row, int64_t vector) {
  return load_vector<Whole>(rows.var + row * rows.d, vector, rows.d, T(1) - rows.eps) + rows.eps;
}

template <class T>
struct Bounds {
  Vec<T> mean_low, mean_high, var_low, var_high;
};

// Smallest and largest over all rows, for `Count` vectors of dimensions.
template <int Count, bool Whole, class T>
CWBR_INLINE void find_bounds(const Rows<T>& rows, int64_t vector, Bounds<T>* bounds) {
  const Vec<T> infinity = broadcast(std::numeric_limits<T>::infinity());
  Bounds<T> found[Count];
  CWBR_UNROLL(4)
  for (int x = 0; x < Count; ++x) found[x] = {infinity, -infinity, infinity, -infinity};
  for (int64_t row = 0; row < rows.k; ++row) {
    CWBR_UNROLL(4)
    for (int x = 0; x < Count; ++x) {
      const Vec<T> mean = load_mean<Whole>(rows, row, vector + x);
      const Vec<T> var = load_variance<Whole>(rows, row, vector + x);
      found[x].mean_low = smaller(mean, found[x].mean_low);
      found[x].mean_high = larger(mean, found[x].mean_high);
      found[x].var_low = smaller(var, found[x].var_low);
      found[x].var_high = larger(var, found[x].var_high);
    }
  }
  for (int x = 0; x < Count; ++x) bounds[x] = found[x];
}

// Writes the scaling of one group, `bounds` being those of its `count` vectors.
template <class T>
void scale_group(const Bounds<T>* bounds, int64_t begin, int count, const Scaling<T>& scaling) {
  // Exponents that bound every product of denominators, and every numerator over it.
  Vec<T> lowest = {}, highest = {}, quadratic = {};
  for (int x = 0; x < count; ++x) {
    const auto& [mean_low, mean_high, var_low, var_high] = bounds[x];
    Vec<T> k = (exponent(var_low) + exponent(var_high)) * T(-0.25);
    constexpr T most = 62;  // twice that is a normal exponent
    const auto usable = (k > -most - 2) & (k < most + 2) & (var_low > T(0));
    k = usable ? larger(smaller(k, broadcast(most)), broadcast(-most)) : Vec<T>{};
    // Rounds to a whole number: adding 1.5 * 2^p leaves no fraction bits.
    constexpr T whole = sizeof(T) == 4 ? T(0x1.8p23) : T(0x1.8p52);
    k = (k + whole) - whole;
    store(scaling.mean + (begin + x) * kLanes<T>, power_of_two<T>(k));
    store(scaling.var + (begin + x) * kLanes<T>, power_of_two<T>(k + k));
    const Vec<T> spread = mean_high - mean_low;
    lowest += exponent(var_low) + (k + k) + T(1);
    highest += larger(exponent(var_high) + (k + k) + T(2), Vec<T>{});
    quadratic = larger(exponent(spread * spread) + (k + k) + T(1), quadratic);
  }
  constexpr T range = kExponentRange<T>;
  scaling.safe[begin / kGroup] =
      all((lowest > -range) & (highest + quadratic + T(3) < range + T(20)) & (highest < range));
}

template <class T>
void scale(const Rows<T>& rows, int64_t first, int64_t last, const Scaling<T>& scaling) {
  const int64_t whole_vectors = rows.d / kLanes<T>;
  for (int64_t group = first; group < last; ++group) {
    const int64_t begin = group * kGroup;
    const int count = int(begin + kGroup < scaling.vectors ? kGroup : scaling.vectors - begin);
    Bounds<T> bounds[kGroup];
    int x = 0;
    for (; x + 4 <= count && begin + x + 4 <= whole_vectors; x += 4)
      find_bounds<4, true>(rows, begin + x, bounds + x);
    for (; x < count; ++x) find_bounds<1, false>(rows, begin + x, bounds + x);
    scale_group(bounds, begin, count, scaling);
  }
}

// What packing finds out about a row beside its product.
template <class T>
struct RowCheck {
  Vec<T> low;   // the smallest variance, or 1
  Vec<T> zero;  // NaN where a variance is infinite or NaN
};

// Packs `count` vectors of a row to `out` and multiplies twice their variances into its product, in
// the order in which `add_vectors` multiplies those of two rows.
template <bool Whole, class T>
CWBR_INLINE void pack_group(const Rows<T>& rows, const Scaling<T>& scaling, int64_t row,
                            int64_t begin, int count, T* out, Sums<T>& sums, RowCheck<T>& check) {
  constexpr int N = kLanes<T>;
  Vec<T> denominator = {};
  CWBR_UNROLL(8)
  for (int x = 0; x < count; ++x) {
    const int64_t vector = begin + x;
    const Vec<T> var = load_variance<Whole>(rows, row, vector);
    const Vec<T> w = var * load(scaling.var + N * vector), twice = w + w;
    store(out + 2 * N * x, load_mean<Whole>(rows, row, vector) * load(scaling.mean + N * vector));
    store(out + 2 * N * x + N, w);
    check.low = smaller(var, check.low);
    check.zero += var - var;
    denominator = x == 0 ? twice : denominator * twice;
  }
  if (scaling.safe[begin / kGroup]) {
    sums.multiply(denominator);
    return;
  }
  for (int x = 0; x < count; ++x) sums.multiply(load(out + 2 * N * x + N) * T(2));
}

// What a panel holds of one row and one group.
template <class T>
constexpr int64_t kChunk = kGroup * 2 * kLanes<T>;

template <class T>
CWBR_INLINE void pack_row(const Rows<T>& rows, const Scaling<T>& scaling, int64_t row, T* out,
                          T* marks, Sums<T>& sums, RowCheck<T>& check) {
  const int64_t whole_vectors = rows.d / kLanes<T>;
  for (int64_t x = 0; x < scaling.vectors; x += kGroup, out += kTile * kChunk<T>) {
    if (x + kGroup <= whole_vectors)
      pack_group<true>(rows, scaling, row, x, kGroup, out, sums, check);
    else
      pack_group<false>(rows, scaling, row, x,
                        int(x + kGroup < scaling.vectors ? kGroup : scaling.vectors - x), out, sums,
                        check);
    const int64_t groups = x / kGroup + 1;
    if (groups % kCheckpoint == 0 && groups / kCheckpoint <= checkpoints(scaling.vectors))
      marks[groups / kCheckpoint - 1] = sum_lanes<T>(sums.exponents);
  }
}

template <class T>
void pack(const Rows<T>& rows, const Scaling<T>& scaling, int64_t first, int64_t count,
          const Panel<T>& panel) {
  constexpr int N = kLanes<T>;
  const int64_t tile_size = groups(scaling.vectors) * kTile * kChunk<T>;
  for (int64_t begin = 0; begin < count; begin += N) {
    Vec<T> products[N], exponents[N];
    T valid[N];
    for (int r = 0; r < N; ++r) {
      products[r] = broadcast(T(1));
      exponents[r] = Vec<T>{};
    }
    const int batch = int(begin + N < count ? N : count - begin);
    for (int r = 0; r < batch; ++r) {
      const int64_t at = begin + r, row = first + at < rows.k ? first + at : rows.k - 1;
      auto sums = Sums<T>::zero();
      RowCheck<T> check = {broadcast(T(1)), Vec<T>{}};
      pack_row(rows, scaling, row, panel.values + at / kTile * tile_size + at % kTile * kChunk<T>,
               panel.checkpoints + at * checkpoints(scaling.vectors), sums, check);
      valid[r] = all((check.low > T(0)) & (check.zero == T(0))) ? T(0) : T(NAN);
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

// Adds the fractions of `count` vectors of dimensions to the sums of kTileRows rows i with row j.
template <class T>
CWBR_INLINE void add_vectors(const T* i, const T* j, int count, Sums<T>* sums) {
  constexpr int N = kLanes<T>;
  Vec<T> numerator[kTileRows] = {}, denominator[kTileRows] = {};
  CWBR_UNROLL(8)
  for (int x = 0; x < count; ++x) {
    const Vec<T> mean_j = load(j + 2 * N * x), w_j = load(j + 2 * N * x + N);
    CWBR_UNROLL(4)
    for (int r = 0; r < kTileRows; ++r) {
      const Vec<T> difference = load(i + r * kChunk<T> + 2 * N * x) - mean_j;
      const Vec<T> s = load(i + r * kChunk<T> + 2 * N * x + N) + w_j;
      const Vec<T> square = difference * difference;
      numerator[r] = x == 0 ? square : fma(numerator[r], s, square * denominator[r]);
      denominator[r] = x == 0 ? s : denominator[r] * s;
    }
  }
  CWBR_UNROLL(4)
  for (int r = 0; r < kTileRows; ++r) sums[r * kTile].add(numerator[r], denominator[r]);
}

// A whole group, unrolled. Not inlined: in a loop, the compiler would rather keep all addresses in
// registers than the fractions.
template <class T>
CWBR_NOINLINE void add_group(const T* i, const T* j, Sums<T>* sums) {
  add_vectors(i, j, kGroup, sums);
}

template <class T>
CWBR_NOINLINE void add_part(const T* i, const T* j, int count, Sums<T>* sums) {
  add_vectors(i, j, count, sums);
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

// Adds one group of vectors, from x on, to the sums of a tile.
template <class T>
CWBR_INLINE void add_tile(const Panel<T>& panel_i, const Panel<T>& panel_j,
                          const Scaling<T>& scaling, int64_t x, int64_t rows_i, int64_t rows_j,
                          bool upper, Sums<T>* sums) {
  constexpr int N = kLanes<T>;
  const int64_t left = scaling.vectors - x;
  const bool safe = scaling.safe[x / kGroup];
  for (int64_t r = 0; r < rows_i; r += kTileRows)
    for (int64_t c = upper ? r + 1 : 0; c < rows_j; ++c) {
      const T* i = panel_i.values + (x / kGroup * kTile + r) * kChunk<T>;
      const T* j = panel_j.values + (x / kGroup * kTile + c) * kChunk<T>;
      Sums<T>* pairs = sums + r * kTile + c;
      if (safe && left >= kGroup)
        add_group(i, j, pairs);
      else if (safe)
        add_part(i, j, int(left), pairs);
      else
        for (int64_t y = 0; y < left && y < kGroup; ++y)
          add_part(i + 2 * N * y, j + 2 * N * y, 1, pairs);
    }
}

// The distances that a tile's sums amount to.
template <class T>
CWBR_INLINE void finish_tile(const Sums<T>* sums, const Panel<T>& panel_i, const Panel<T>& panel_j,
                             int64_t rows_i, int64_t rows_j, T* distance) {
  constexpr int N = kLanes<T>;
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

template <class T>
void tile(const Panel<T>& panel_i, const Panel<T>& panel_j, const Scaling<T>& scaling,
          int64_t rows_i, int64_t rows_j, bool upper, T limit, T* distance) {
  const int64_t marks = checkpoints(scaling.vectors);
  Sums<T> sums[kTile * kTile];
  for (auto& pair : sums) pair = Sums<T>::zero();
  for (int64_t x = 0; x < scaling.vectors; x += kGroup) {
    add_tile(panel_i, panel_j, scaling, x, rows_i, rows_j, upper, sums);
    const int64_t groups = x / kGroup + 1;
    if (groups % kFlush == 0)
      for (auto& pair : sums) pair.flush();
    if (limit >= 0 && !upper && groups % kCheckpoint == 0 && groups / kCheckpoint <= marks) {
      const int64_t mark = groups / kCheckpoint - 1;
      if (tile_exceeds(sums, panel_i.checkpoints + mark, panel_j.checkpoints + mark, marks, rows_i,
                       rows_j, limit)) {
        for (int p = 0; p < kTile * kTile; ++p) distance[p] = std::numeric_limits<T>::infinity();
        return;
      }
    }
  }
  finish_tile(sums, panel_i, panel_j, rows_i, rows_j, distance);
}

}  // namespace cwbr::CWBR_ISA
