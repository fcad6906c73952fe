// All pairs of K rows, block of rows by block of rows, in bounded memory.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <new>

#include "pair_kernels.h"

namespace cwbr {

// Uninitialized memory, aligned to a cache line.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<T*>(::operator new(size * sizeof(T), kLine))) {}
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Delete {
    void operator()(T* data) const { ::operator delete(data, kLine); }
  };
  std::unique_ptr<T, Delete> data_;
};

// distance (kTile, kTile) of rows i, i + 1, ... with rows j, j + 1, ...; where i == j, only the
// part above the diagonal is specified.
template <class T>
struct Tile {
  int64_t index;  // among the tiles of its two blocks
  int64_t i, j, rows_i, rows_j;
  const T* distance;
};

// Gradient of the distances of two blocks, in the layout that the kernels read.
template <class T>
class BlockGradient {
 public:
  explicit BlockGradient(int64_t rows);

  // Starts the block of rows_i x rows_j pairs from (first_i, first_j) on, all zero.
  void reset(int64_t first_i, int64_t rows_i, int64_t first_j, int64_t rows_j);

  // Takes grad(i, j) for the pairs i < j of rows i, i + 1, ... and j, j + 1, ..., up to kTile each.
  // Different tiles may be written at the same time.
  template <class Grad>
  void write_tile(int64_t i, int64_t j, int64_t rows_i, int64_t rows_j, const Grad& grad) {
    for (int64_t r = i; r < i + rows_i; ++r)
      for (int64_t c = j; c < j + rows_j; ++c) {
        const T g = r < c ? grad(r, c) : T(0);
        const int64_t part = (r - block_.rows.first_i) / kGradientRows,
                      local_j = c - block_.rows.first_j;
        const int64_t lane = (r - block_.rows.first_i) % kGradientRows;
        grad_[(part * block_.rows.count_j + local_j) * kGradientRows + lane] = g;
        if (g != 0) nonzero_[part * tiles_j() + local_j / kTile] = 1;
      }
  }

  const GradientBlock<T>& block() const { return block_; }

 private:
  int64_t tiles_j() const { return (block_.rows.count_j + kTile - 1) / kTile; }

  Buffer<T> grad_;
  Buffer<uint8_t> nonzero_;
  GradientBlock<T> block_;
};

template <class T>
class PairBlocks {
 public:
  PairBlocks(const T* mean, const T* var, int64_t k, int64_t d, double eps);

  int64_t count() const { return count_; }
  int64_t first(int64_t block) const { return block * rows_per_block_; }
  int64_t rows(int64_t block) const;
  int64_t max_rows() const { return rows_per_block_; }

  // Number of tiles of blocks a <= b.
  int64_t tiles(int64_t a, int64_t b) const;

  // Calls visit for every tile of blocks a <= b, possibly at the same time on several threads.
  // Distances proven to exceed `limit`, where that is not negative, may be infinity instead.
  void distances(int64_t a, int64_t b, T limit, const std::function<void(const Tile<T>&)>& visit);

  // Calls visit(index, i, j, rows_i, rows_j) for the same tiles, without their distances.
  void for_tiles(
      int64_t a, int64_t b, int64_t grain,
      const std::function<void(int64_t, int64_t, int64_t, int64_t, int64_t)>& visit) const;

  // Adds the gradients of one pair of blocks to grad_mean and grad_var (K, D).
  void add_gradient(const BlockGradient<T>& gradient, T* grad_mean, T* grad_var) const;

 private:
  void pack(int64_t slot, int64_t block);

  const PairKernels<T>& kernels_;
  Rows<T> rows_;
  int64_t vectors_, rows_per_block_, count_;
  Buffer<T> mean_scale_, var_scale_;
  Buffer<uint8_t> safe_;
  Scaling<T> scaling_;
  std::unique_ptr<Buffer<T>> values_[2];
  Panel<T> panels_[2] = {};
  int64_t packed_[2] = {-1, -1};
};

}  // namespace cwbr
