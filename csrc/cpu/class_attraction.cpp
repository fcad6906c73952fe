#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/isa_batch_table.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace cwbr {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements of gathered means per thread

// The classes that act on one sample, and their distances to it at one layer.
template <class T>
class Actors {
 public:
  explicit Actors(const Acting<T>& acting) : acting_(acting) {
    for (auto* list : {&coefficient_, &distance_}) list->resize(acting.own + acting.others);
    index_.resize(acting.own + acting.others);
  }

  void find(int64_t sample) {
    const int64_t first_own = sample * acting_.own, first_other = sample * acting_.others;
    count_ = 0;
    has_main_ = acting_.own > 0 && acts(first_own);
    bool known = has_main_ || acting_.own == 0;
    for (int64_t at = first_own; at < first_own + acting_.own; ++at) {
      if (!acts(at)) continue;
      known = known && acting_.seen[acting_.labels[at]];
      add(acting_.labels[at], acting_.shares == nullptr ? T(1) : acting_.shares[at]);
    }
    rivals_from_ = count_;
    right_ = has_main_ && acting_.main_weight[sample] > 0;
    for (int64_t at = first_other; at < first_other + acting_.others; ++at) {
      const int64_t rival = acting_.rivals[at];
      const auto own = index_.begin(), end = own + rivals_from_;
      if (rival < 0 || std::find(own, end, rival) != end) continue;
      right_ = right_ && acting_.main_weight[sample] > acting_.weight[at];
      add(rival, -acting_.push * acting_.weight[at]);
    }
    if (!known) count_ = rivals_from_ = 0;
  }

  ActingRows<T> rows() { return {index_.data(), coefficient_.data(), distance_.data(), count_}; }

  T energy() const {
    T sum = 0;
    for (int64_t j = 0; j < count_; ++j) sum += coefficient_[j] * distance_[j];
    return sum / 2;
  }

  // Whether the main class weighs more than each rival.
  T right() const { return right_; }

  // Whether the mean of the main class is nearer than that of each rival.
  T nearest() const {
    if (!has_main_ || rivals_from_ == 0) return 0;
    T rival = std::numeric_limits<T>::infinity();
    for (int64_t j = rivals_from_; j < count_; ++j)
      if (!(distance_[j] >= rival)) rival = distance_[j];  // NaN stays
    return distance_[0] < rival && rival < std::numeric_limits<T>::infinity();
  }

 private:
  // Whether there is an own class.
  bool acts(int64_t at) const {
    return acting_.labels[at] >= 0 && (acting_.shares == nullptr || acting_.shares[at] > 0);
  }

  void add(int64_t index, T coefficient) {
    index_[count_] = index;
    coefficient_[count_++] = coefficient;
  }

  const Acting<T>& acting_;
  std::vector<int64_t> index_;
  std::vector<T> coefficient_, distance_;
  int64_t count_ = 0, rivals_from_ = 0;
  bool has_main_ = false, right_ = false;
};

}  // namespace

template <class In, class T>
void class_attraction(Cpu, Matrix<const In> z, const std::vector<Bank<const T>>& layers,
                      const T* var, const T* unit, Acting<T> acting, Attraction<T> result) {
  const auto& loops = batch_loops<In>();
  std::vector<T> inverse_var(z.cols);
  for (int64_t d = 0; d < z.cols; ++d) inverse_var[d] = 1 / var[d];
  const int64_t work = z.cols * (acting.own + acting.others + 1);
  parallel_for(0, z.rows, grain_of(kGrain, work), [&](int64_t first, int64_t last) {
    Actors<T> actors(acting);
    for (int64_t b = first; b < last; ++b) {
      actors.find(b);
      for (size_t l = 0; l < layers.size(); ++l) {
        const Bank<const T>& bank = layers[l];
        const int64_t at = l * z.rows + b;
        const T squares = loops.class_attraction(
            z.data + b * z.stride + bank.first, bank.mean, inverse_var.data() + bank.first,
            bank.dims, actors.rows(), unit[l], result.gradient + b * z.cols + bank.first);
        constexpr T tiny = std::numeric_limits<T>::min();
        result.squares[at] = squares < tiny ? tiny : squares;
        result.energy[at] = actors.energy() / std::max<int64_t>(bank.dims, 1);
        result.nearest[at] = actors.nearest();
        result.right[at] = actors.right();
      }
    }
  });
}

#define CWBR_INSTANTIATE(In, T)                                                            \
  template void class_attraction(Cpu, Matrix<const In>, const std::vector<Bank<const T>>&, \
                                 const T*, const T*, Acting<T>, Attraction<T>);
CWBR_FOR_EACH_INPUT(CWBR_INSTANTIATE)

}  // namespace cwbr
