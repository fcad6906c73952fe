#include "cpu/pair_blocks.h"

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace cwbr {

namespace {

constexpr int64_t kPanelBytes = 4 << 20;
constexpr int64_t kMaxRows = 512;
// Work is counted in (pair, vector of dimensions)s. Below this much, some 20 microseconds, it is
// not worth a second thread, which costs 3 to 5 to wake and to wait for.
constexpr int64_t kGrain = 20000;
// What reading a row's vector costs, to scale and to pack it: it comes from memory. And what the
// end of a pair costs: its sums over lanes, its logarithm, and its use.
constexpr int64_t kScaleWork = 4, kPackWork = 8, kPairWork = 8;

// While it lives, this thread takes numbers below the normal range for zero. Gradients of far pairs
// are full of them, and the processor spends a hundred cycles on each.
class FlushSubnormals {
#if defined(__x86_64__)
 public:
  FlushSubnormals() { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;

 private:
  unsigned before_ = _mm_getcsr();
#else
 public:
  FlushSubnormals() {}
#endif
};

int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Numbers that a panel holds of each row.
int64_t panel_row(int64_t vectors, int64_t lanes) {
  return std::max<int64_t>(1, groups(vectors)) * kGroup * 2 * lanes;
}

int64_t rows_per_block(int64_t k, int64_t row_bytes) {
  const int64_t most =
      std::clamp<int64_t>(kPanelBytes / row_bytes / kTile * kTile, kTile, kMaxRows);
  const int64_t blocks = std::max<int64_t>(1, (k + most - 1) / most);
  return std::max<int64_t>(kTile, round_up((k + blocks - 1) / blocks, kTile));
}

}  // namespace

template <class T>
BlockGradient<T>::BlockGradient(int64_t rows)
    : grad_(rows * rows), nonzero_(rows / kGradientRows * (rows / kTile)), block_{} {}

template <class T>
void BlockGradient<T>::reset(const BlockRows& rows, T unit) {
  block_ = {grad_.get(), nonzero_.get(), rows, unit};
  const int64_t parts = (rows.count_i + kGradientRows - 1) / kGradientRows;
  std::fill_n(nonzero_.get(), parts * tiles_j(), uint8_t(0));
  std::fill_n(grad_.get(), parts * rows.count_j * kGradientRows, T(0));
}

template <class T>
PairBlocks<T>::PairBlocks(const Moments<T>& of, double eps)
    : kernels_(pair_kernels<T>()),
      rows_(of, eps),
      near_(near_limit<T>(of.dims)),
      vectors_((of.dims + kernels_.lanes - 1) / kernels_.lanes),
      rows_per_block_(
          rows_per_block(of.rows, panel_row(vectors_, kernels_.lanes) * int64_t(sizeof(T)))),
      count_((of.rows + rows_per_block_ - 1) / rows_per_block_),
      mean_scale_(vectors_ * kernels_.lanes),
      var_scale_(vectors_ * kernels_.lanes),
      safe_(groups(vectors_)),
      scaling_{vectors_, mean_scale_.get(), var_scale_.get(), safe_.get()} {
  parallel_for(0, groups(vectors_), grain_of(kGrain, of.rows * kGroup * kScaleWork),
               [&](int64_t first, int64_t last) { kernels_.scale(rows_, first, last, scaling_); });
}

template <class T>
int64_t PairBlocks<T>::rows(int64_t block) const {
  return std::min(rows_per_block_, rows_.k - first(block));
}

template <class T>
std::vector<TileRows> PairBlocks<T>::tiles(int64_t a, int64_t b) const {
  // Some tiles' rows i, which the second-level cache holds, meet each tile's rows j in turn.
  constexpr int64_t cache_bytes = 1 << 19;
  const int64_t row_bytes = panel_row(vectors_, kernels_.lanes) * sizeof(T);
  const int64_t band = std::max<int64_t>(1, cache_bytes / (row_bytes * kTile)) * kTile;
  std::vector<TileRows> result;
  for (int64_t top = 0; top < rows(a); top += band)
    for (int64_t j = a == b ? top : 0; j < rows(b); j += kTile)
      for (int64_t i = top; i < std::min(top + band, rows(a)) && (a != b || i <= j); i += kTile)
        result.push_back({first(a) + i, first(b) + j, std::min<int64_t>(kTile, rows(a) - i),
                          std::min<int64_t>(kTile, rows(b) - j)});
  return result;
}

// The panel from row `row` on, a multiple of kTile.
template <class T>
Panel<T> PairBlocks<T>::rows_from(const Panel<T>& panel, int64_t row) const {
  return {panel.values + row * panel_row(vectors_, kernels_.lanes), panel.exponent + row,
          panel.log + row, panel.checkpoints + row * checkpoints(vectors_)};
}

template <class T>
void PairBlocks<T>::pack(int64_t slot, int64_t block) {
  if (packed_[slot] == block) return;
  packed_[slot] = block;
  if (!values_[slot]) {
    const int64_t size = panel_row(vectors_, kernels_.lanes);
    values_[slot] =
        std::make_unique<Buffer<T>>(rows_per_block_ * (size + 2 + checkpoints(vectors_)));
    T* at = values_[slot]->get();
    T* after = at + rows_per_block_ * size;
    panels_[slot] = {at, after, after + rows_per_block_, after + 2 * rows_per_block_};
  }
  const Panel<T>& panel = panels_[slot];
  const int64_t count = round_up(rows(block), kTileRows);
  // Rows are packed by vectors of rows, and by whole tiles.
  const int64_t batch = std::max(kernels_.lanes, kTile), batches = (count + batch - 1) / batch;
  parallel_for(0, batches, grain_of(kGrain, batch * vectors_ * kPackWork),
               [&](int64_t begin, int64_t end) {
                 const int64_t row = begin * batch, rows = std::min(count, end * batch) - row;
                 kernels_.pack(rows_, scaling_, first(block) + row, rows, rows_from(panel, row));
               });
}

template <class T>
void PairBlocks<T>::measure_near(const TileRows& tile, T* distance) const {
  int any = 0;  // without branches, hence on vectors
  for (int p = 0; p < kTile * kTile; ++p) any |= distance[p] < near_;
  if (!any) return;
  for (int64_t r = 0; r < tile.count_i; ++r)
    for (int64_t c = tile.i == tile.j ? r + 1 : 0; c < tile.count_j; ++c)
      if (T& value = distance[r * kTile + c]; value < near_)
        value = kernels_.near_distance(rows_, tile.i + r, tile.j + c);
}

template <class T>
void PairBlocks<T>::distances(int64_t a, int64_t b, T limit,
                              const std::function<void(const Tile<T>&)>& visit) {
  pack(0, a);
  if (a != b) pack(1, b);
  const Panel<T>&panel_a = panels_[0], &panel_b = panels_[a != b];
  const std::vector<TileRows> tiles = this->tiles(a, b);
  const int64_t tile_work = kTile * kTile * (vectors_ + kPairWork);
  for_each(tiles.size(), grain_of(kGrain, tile_work), [&](int64_t index) {
    alignas(64) T distance[kTile * kTile];
    const TileRows& rows = tiles[index];
    kernels_.tile(rows_from(panel_a, rows.i - first(a)), rows_from(panel_b, rows.j - first(b)),
                  scaling_, rows.count_i, rows.count_j, rows.i == rows.j, limit, distance);
    measure_near(rows, distance);
    visit({index, rows, distance});
  });
}

template <class T>
void PairBlocks<T>::gradients(const BlockGradient<T>& gradient, T* grad_mean, T* grad_var) const {
  const GradientBlock<T>& block = gradient.block();
  const BlockRows& rows = block.rows;
  const int64_t work_rows =
      round_up(rows.count_i, kGradientRows) + round_up(rows.count_j, kGradientRows);
  const int64_t pairs = rows.count_i * rows.count_j / (rows.first_i == rows.first_j ? 2 : 1);
  // Threads share out the dimensions, so that every sum over pairs has one order.
  const int64_t unit = std::clamp<int64_t>(vectors_ / num_threads(), 1, kGradientVectors);
  parallel_for(0, (vectors_ + unit - 1) / unit, grain_of(kGrain, unit * 2 * pairs),
               [&](int64_t begin, int64_t end) {
                 const FlushSubnormals flush;
                 const Buffer<T> work(work_rows * 4 * kGradientVectors * kernels_.lanes);
                 kernels_.gradient(rows_, scaling_, block, begin * unit,
                                   std::min(vectors_, end * unit), work.get(), grad_mean, grad_var);
               });
}

template class BlockGradient<float>;
template class BlockGradient<double>;
template class PairBlocks<float>;
template class PairBlocks<double>;

}  // namespace cwbr
