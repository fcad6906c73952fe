#include "cpu/kernels.h"
#include "harness.h"

using namespace cwbr;

namespace {

constexpr double kEps = 1e-6;

template <class T>
struct PairResults {
  Array<T> listed, all, value, grad_mean, grad_var;
};

template <class T>
PairResults<T> run(int64_t k, int64_t d, const Array<T>& mean, const Array<T>& var,
                   const Array<T>& alpha, const Array<int64_t>& pairs) {
  const Moments<T> of{mean.data(), var.data(), k, d};
  const Pairs listed{pairs.data(), static_cast<int64_t>(pairs.size()) / 2};
  PairResults<T> r;
  r.listed.resize(listed.count);
  r.all.resize(k * k);
  pair_distance(Cpu(), of, listed, kEps, r.listed.data());
  all_pair_distance(Cpu(), of, kEps, r.all.data());
  Array<T> grad_mean(k * d), grad_var(k * d);
  const auto keep = [&] {
    r.grad_mean.insert(r.grad_mean.end(), grad_mean.begin(), grad_mean.end());
    r.grad_var.insert(r.grad_var.end(), grad_var.begin(), grad_var.end());
  };
  pair_distance_backward(Cpu(), r.listed.data(), of, listed, kEps, grad_mean.data(),
                         grad_var.data());
  keep();
  all_pair_distance_backward(Cpu(), alpha.data(), of, kEps, grad_mean.data(), grad_var.data());
  keep();
  const T one = 1;
  for (const bool log : {false, true}) {
    T alone, joint;
    weighted_overlap(Cpu(), of, alpha.data(), kEps, log, &alone);
    weighted_overlap_with_gradient(Cpu(), &one, of, alpha.data(), kEps, log, &joint,
                                   grad_mean.data(), grad_var.data());
    r.value.insert(r.value.end(), {alone, joint});
    keep();
  }
  return r;
}

template <class T>
void test_shape(int64_t k, int64_t d, double tolerance) {
  const Array<T> mean = random_normal<T>(k * d, 1);
  Array<T> var = random_normal<T>(k * d, 2);
  for (T& v : var) v = v * v + T(1e-6);
  Array<T> alpha = random_normal<T>(k * k, 3);
  for (T& a : alpha) a = std::abs(a);
  Array<int64_t> pairs;
  Array<double> truth(k * k), listed;
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      for (int64_t x = 0; x < d; ++x) {
        const double u = var[i * d + x] + kEps, w = var[j * d + x] + kEps, s = (u + w) / 2;
        truth[i * k + j] +=
            std::pow(static_cast<double>(mean[i * d + x]) - mean[j * d + x], 2) / (8 * s) +
            std::log(s) / 2 - std::log(u) / 4 - std::log(w) / 4;
      }
      if (i != j && (i + 2 * j) % 3 == 0) {
        pairs.insert(pairs.end(), {i, j});
        listed.push_back(truth[i * k + j]);
      }
    }
  }
  thread_count = 1;
  const PairResults<T> expected = run(k, d, mean, var, alpha, pairs);
  expect_near("pair_distance", expected.listed, listed, tolerance);
  expect_near("all_pair_distance", expected.all, truth, tolerance);
  for (thread_count = 2; thread_count <= 5; thread_count += 3) {
    const PairResults<T> actual = run(k, d, mean, var, alpha, pairs);
    for (auto field : {&PairResults<T>::listed, &PairResults<T>::all, &PairResults<T>::value,
                       &PairResults<T>::grad_mean, &PairResults<T>::grad_var}) {
      expect_same_bits("pair kernels", actual.*field, expected.*field);
    }
  }
}

}  // namespace

void test_pair_kernels() {
  for (const int64_t k : {0, 1, 2, 7, 8, 19}) {
    for (const int64_t d : {0, 1, 5, 16, 129, 300}) {
      test_shape<float>(k, d, 1e-5);
      test_shape<double>(k, d, 1e-12);
    }
  }
  test_shape<float>(70, 700, 1e-5);
}
