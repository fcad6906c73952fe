// Vectors of T for one instruction set. The file that includes this names the namespace CWBR_ISA
// and one of CWBR_AVX512, CWBR_AVX2, or neither for portable code; no include guard, because each
// instruction set needs its own copy, compiled for it.

namespace cwbr::CWBR_ISA {

#if defined(CWBR_AVX512)
constexpr int kVectorBytes = 64;
#elif defined(CWBR_AVX2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Types {
  using Integer = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
  typedef Integer Integers __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vec = typename Types<T>::Vector;
using Floats = Vec<float>;
using Doubles = Vec<double>;

template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

// Whether a vector of divisions, among other work, costs no more than two multiplications, and
// registers are too few to keep reciprocals for later.
#if defined(CWBR_AVX2)
constexpr bool kDivideAtOnce = true;
#else
constexpr bool kDivideAtOnce = false;
#endif

// Sums of exponents between these bounds are products that neither overflow nor lose bits.
template <class T>
constexpr T kExponentRange = sizeof(T) == 4 ? 100 : 1000;

template <class T>
CWBR_INLINE Vec<T> load(const T* x) {
  return *reinterpret_cast<const typename Types<T>::Unaligned*>(x);
}

template <class T>
CWBR_INLINE void store(T* x, Vec<T> v) {
  *reinterpret_cast<typename Types<T>::Unaligned*>(x) = v;
}

template <class T>
CWBR_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

// The first `count` lanes from memory, `fill` in the others.
template <class T>
CWBR_INLINE Vec<T> load_first(const T* x, int64_t count, T fill) {
  T lanes[kLanes<T>];
  for (int l = 0; l < kLanes<T>; ++l) lanes[l] = l < count ? x[l] : fill;
  return load(lanes);
}

template <class T>
CWBR_INLINE void store_first(T* x, int64_t count, Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int l = 0; l < kLanes<T> && l < count; ++l) x[l] = lanes[l];
}

// The smaller and the larger; b where one of them is NaN.
template <class V>
CWBR_INLINE V smaller(V a, V b) {
  return a < b ? a : b;
}
template <class V>
CWBR_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}

// Whether a condition, as vector comparisons give it, holds in every lane.
template <class Mask>
CWBR_INLINE bool all(Mask mask) {
  bool result = true;
  for (size_t l = 0; l < sizeof(mask) / sizeof(mask[0]); ++l) result &= mask[l] != 0;
  return result;
}

// 2^k for whole k in the exponent range.
template <class T>
CWBR_INLINE Vec<T> power_of_two(Vec<T> k) {
  using Integers = typename Types<T>::Integers;
  constexpr int bits = sizeof(T) == 4 ? 23 : 52, bias = sizeof(T) == 4 ? 127 : 1023;
  return reinterpret_cast<Vec<T>>((__builtin_convertvector(k, Integers) + bias) << bits);
}

// fma: a b + c; fnma: c - a b. x = mantissa(x) * 2^exponent(x) with 1 <= mantissa < 2, for positive
// normal x. reciprocal(x) is 1 / x within two units in the last place.
#if defined(CWBR_AVX512)
CWBR_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
CWBR_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) { return _mm512_fmadd_pd(a, b, c); }
CWBR_INLINE Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
CWBR_INLINE Doubles fnma(Doubles a, Doubles b, Doubles c) { return _mm512_fnmadd_pd(a, b, c); }
CWBR_INLINE Floats exponent(Floats x) { return _mm512_getexp_ps(x); }
CWBR_INLINE Doubles exponent(Doubles x) { return _mm512_getexp_pd(x); }
CWBR_INLINE Floats mantissa(Floats x) {
  return _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
}
CWBR_INLINE Doubles mantissa(Doubles x) {
  return _mm512_getmant_pd(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
}
CWBR_INLINE Floats reciprocal(Floats x) {
  const Floats r = _mm512_rcp14_ps(x);
  return fma(r, fnma(x, r, broadcast(1.0f)), r);
}
CWBR_INLINE Doubles reciprocal(Doubles x) {
  Doubles r = _mm512_rcp14_pd(x);
  r = fma(r, fnma(x, r, broadcast(1.0)), r);
  return fma(r, fnma(x, r, broadcast(1.0)), r);
}
#else
#if defined(CWBR_AVX2)
CWBR_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
CWBR_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) { return _mm256_fmadd_pd(a, b, c); }
CWBR_INLINE Floats fnma(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
CWBR_INLINE Doubles fnma(Doubles a, Doubles b, Doubles c) { return _mm256_fnmadd_pd(a, b, c); }
#else
CWBR_INLINE Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
CWBR_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) { return a * b + c; }
CWBR_INLINE Floats fnma(Floats a, Floats b, Floats c) { return c - a * b; }
CWBR_INLINE Doubles fnma(Doubles a, Doubles b, Doubles c) { return c - a * b; }
#endif
CWBR_INLINE Floats reciprocal(Floats x) { return 1.0f / x; }
CWBR_INLINE Doubles reciprocal(Doubles x) { return 1.0 / x; }
CWBR_INLINE Floats exponent(Floats x) {
  const auto bits = reinterpret_cast<Types<float>::Integers>(x);
  return __builtin_convertvector((bits >> 23) - 127, Floats);
}
CWBR_INLINE Floats mantissa(Floats x) {
  const auto bits = reinterpret_cast<Types<float>::Integers>(x);
  return reinterpret_cast<Floats>((bits & 0x007fffff) | 0x3f800000);
}
CWBR_INLINE Doubles exponent(Doubles x) {
  // The biased exponent becomes the low bits of 2^52, which converts it without AVX-512's help.
  const auto bits = reinterpret_cast<Types<double>::Integers>(x);
  const auto shifted = ((bits >> 52) & 0x7ff) | 0x4330000000000000;
  return reinterpret_cast<Doubles>(shifted) - (0x1p52 + 1023);
}
CWBR_INLINE Doubles mantissa(Doubles x) {
  const auto bits = reinterpret_cast<Types<double>::Integers>(x);
  return reinterpret_cast<Doubles>((bits & 0x000fffffffffffff) | 0x3ff0000000000000);
}
#endif

// Natural logarithm of 1 <= m < 2, in [-log(2)/2, log(2)/2] after adding `halvings` * log(2), by
// the series of 2 atanh((m - 1) / (m + 1)).
template <class T>
CWBR_INLINE Vec<T> log_mantissa(Vec<T> m, Vec<T>& halvings) {
  constexpr int terms = sizeof(T) == 4 ? 5 : 11;
  const auto high = m > T(1.41421356237309505);
  halvings = high ? broadcast(T(1)) : broadcast(T(0));
  m = high ? m * T(0.5) : m;
  const Vec<T> s = (m - T(1)) / (m + T(1)), s2 = s * s;
  Vec<T> sum = broadcast(T(2) / (2 * terms - 1));
  for (int n = terms - 2; n >= 1; --n) sum = fma(sum, s2, broadcast(T(2) / (2 * n + 1)));
  return fma(sum * s2, s, s + s);
}

template <class V, size_t... L>
CWBR_INLINE V evens(V a, V b, std::index_sequence<L...>) {
  return __builtin_shufflevector(a, b, (2 * L)...);
}
template <class V, size_t... L>
CWBR_INLINE V odds(V a, V b, std::index_sequence<L...>) {
  return __builtin_shufflevector(a, b, (2 * L + 1)...);
}

// Lane l of the result combines all lanes of v[l], neighbours first.
template <class T, class Combine>
CWBR_INLINE Vec<T> reduce_each(const Vec<T>* v, Combine combine) {
  constexpr auto lanes = std::make_index_sequence<kLanes<T>>();
  Vec<T> work[kLanes<T>];
  for (int l = 0; l < kLanes<T>; ++l) work[l] = v[l];
  for (int width = kLanes<T> / 2; width >= 1; width /= 2)
    for (int l = 0; l < width; ++l) {
      const Vec<T> a = work[2 * l], b = work[2 * l + 1];
      work[l] = combine(evens(a, b, lanes), odds(a, b, lanes));
    }
  return work[0];
}

template <class T>
CWBR_INLINE Vec<T> sum_each(const Vec<T>* v) {
  return reduce_each<T>(v, [](Vec<T> a, Vec<T> b) CWBR_LAMBDA_INLINE { return a + b; });
}
template <class T>
CWBR_INLINE Vec<T> product_each(const Vec<T>* v) {
  return reduce_each<T>(v, [](Vec<T> a, Vec<T> b) CWBR_LAMBDA_INLINE { return a * b; });
}

template <class T>
CWBR_INLINE T sum_lanes(Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int width = kLanes<T> / 2; width >= 1; width /= 2)
    for (int l = 0; l < width; ++l) lanes[l] = lanes[2 * l] + lanes[2 * l + 1];
  return lanes[0];
}
template <class T>
CWBR_INLINE T product_lanes(Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int width = kLanes<T> / 2; width >= 1; width /= 2)
    for (int l = 0; l < width; ++l) lanes[l] = lanes[2 * l] * lanes[2 * l + 1];
  return lanes[0];
}

}  // namespace cwbr::CWBR_ISA
