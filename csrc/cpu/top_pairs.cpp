#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/kernels.h"

namespace cwbr {
namespace {

template <class T>
struct Candidate {
  T weight;
  int64_t i, j;
};

// The order of the result: falling weight, NaN first, ties by rising (i, j).
template <class T>
bool before(const Candidate<T>& a, const Candidate<T>& b) {
  const bool a_nan = std::isnan(a.weight), b_nan = std::isnan(b.weight);
  if (a_nan != b_nan) return a_nan;
  if (!a_nan && a.weight != b.weight) return a.weight > b.weight;
  return a.i != b.i ? a.i < b.i : a.j < b.j;
}

// Keeps the best m of a stream that comes in rising (i, j): whoever only ties with the m-th best
// so far is too late. Up to 2m candidates are buffered between selections, which makes the cost
// of a candidate O(1).
template <class T>
class Selection {
 public:
  Selection(int64_t m, int64_t offers) : m_(m) { buffer_.reserve(std::min(2 * m, offers)); }

  bool beats(T weight) const { return !full_ || (!std::isnan(bar_) && !(weight <= bar_)); }

  // Whether any of the weights could: a loop without branches, hence on vectors.
  bool any_beats(const T* begin, const T* end) const {
    if (!full_) return true;
    int any = 0;
    for (; begin != end; ++begin) any |= !(*begin <= bar_);
    return any != 0;
  }

  void add(T weight, int64_t i, int64_t j) {
    buffer_.push_back({weight, i, j});
    if (static_cast<int64_t>(buffer_.size()) == 2 * m_) shrink();
  }

  const std::vector<Candidate<T>>& sorted() {
    if (static_cast<int64_t>(buffer_.size()) > m_) shrink();
    std::sort(buffer_.begin(), buffer_.end(), before<T>);
    return buffer_;
  }

 private:
  void shrink() {
    std::nth_element(buffer_.begin(), buffer_.begin() + (m_ - 1), buffer_.end(), before<T>);
    buffer_.resize(m_);
    bar_ = buffer_.back().weight;
    full_ = true;
  }

  int64_t m_;
  std::vector<Candidate<T>> buffer_;
  T bar_ = 0;
  bool full_ = false;
};

// Offers row[begin:end] as the weights of (i, begin), (i, begin + 1), ... in blocks, almost all of
// which hold no candidate.
template <class T>
void offer(Selection<T>& selection, const T* row, int64_t i, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 64;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t last = std::min(end, first + kBlock);
    if (!selection.any_beats(row + first, row + last)) continue;
    for (int64_t j = first; j < last; ++j) {
      if (selection.beats(row[j])) selection.add(row[j], i, j);
    }
  }
}

}  // namespace

template <class T>
void top_pairs_of_used(const T* alpha, int64_t used, int64_t groups, int64_t m, int64_t* pairs,
                       T* weights) {
  if (m == 0) return;
  Selection<T> selection(m, groups * (groups - 1) / 2);
  for (int64_t i = 0; i < groups; ++i) {
    if (i < used) offer(selection, alpha + i * used, i, i + 1, used);
    for (int64_t j = std::max(i + 1, used); j < groups && selection.beats(0); ++j) {
      selection.add(0, i, j);
    }
  }
  for (const Candidate<T>& c : selection.sorted()) {
    *pairs++ = c.i;
    *pairs++ = c.j;
    *weights++ = c.weight;
  }
}

template void top_pairs_of_used(const float*, int64_t, int64_t, int64_t, int64_t*, float*);
template void top_pairs_of_used(const double*, int64_t, int64_t, int64_t, int64_t*, double*);

}  // namespace cwbr
