// All pairs of K rows, block of rows by block of rows, in bounded memory.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <new>
#include <vector>

#include "cpu/isa_pair_table.h"

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

// Up to kTile rows i, i + 1, ... and j, j + 1, ...
struct TileRows {
  int64_t i, j, count_i, count_j;
};

// distance (kTile, kTile) of a tile's rows; where i == j, only the part above the diagonal is
// specified.
template <class T>
struct Tile {
  int64_t index;  // among the tiles of its two blocks
  TileRows rows;
  const T* distance;
};

// Gradient of the distances of two blocks, in the layout that the kernels read.
template <class T>
class BlockGradient {
 public:
  explicit BlockGradient(int64_t rows);

  // Starts a block, all zero, of gradients that count in `unit`, a power of two.
  void reset(const BlockRows& rows, T unit);

  // Takes grad(i, j) for a tile's pairs i < j. Different tiles may be written at the same time.
  template <class Grad>
  void write_tile(const TileRows& tile, const Grad& grad) {
    for (int64_t i = tile.i; i < tile.i + tile.count_i; ++i)
      for (int64_t j = tile.j; j < tile.j + tile.count_j; ++j) {
        const T g = i < j ? grad(i, j) : T(0);
        at(i, j) = g;
        const int64_t local_i = i - block_.rows.first_i, local_j = j - block_.rows.first_j;
        if (g != 0) nonzero_[local_i / kGradientRows * tiles_j() + local_j / kTile] = 1;
      }
  }

  // What was last written for a pair.
  T& at(int64_t i, int64_t j) const {
    const int64_t local_i = i - block_.rows.first_i, local_j = j - block_.rows.first_j;
    const int64_t part = local_i / kGradientRows, lane = local_i % kGradientRows;
    return grad_[(part * block_.rows.count_j + local_j) * kGradientRows + lane];
  }

  const GradientBlock<T>& block() const { return block_; }

 private:
  int64_t tiles_j() const { return (block_.rows.count_j + kTile - 1) / kTile; }

  Buffer<T> grad_;
  Buffer<uint8_t> nonzero_;
  GradientBlock<T> block_;
};

// Calls visit(a, b) for all blocks a <= b, those with a == b first.
template <class Visit>
void for_blocks(int64_t count, const Visit& visit) {
  for (int64_t a = 0; a < count; ++a) visit(a, a);
  for (int64_t a = 0; a < count; ++a)
    for (int64_t b = a + 1; b < count; ++b) visit(a, b);
}

template <class T>
class PairBlocks {
 public:
  PairBlocks(const Moments<T>& of, double eps);

  int64_t count() const { return count_; }
  int64_t first(int64_t block) const { return block * rows_per_block_; }
  int64_t rows(int64_t block) const;
  int64_t max_rows() const { return rows_per_block_; }

  BlockRows block(int64_t a, int64_t b) const { return {first(a), rows(a), first(b), rows(b)}; }

  // The tiles of blocks a <= b, in the order in which they are best computed.
  std::vector<TileRows> tiles(int64_t a, int64_t b) const;

  // Calls visit for every tile of blocks a <= b, possibly at the same time on several threads.
  // Distances proven to exceed `limit`, where that is not negative, may be infinity instead.
  void distances(int64_t a, int64_t b, T limit, const std::function<void(const Tile<T>&)>& visit);

  // Writes the gradients of a block of pairs of the same rows to grad_mean and grad_var (K, D), or
  // adds those of a block of pairs of different rows.
  void gradients(const BlockGradient<T>& gradient, T* grad_mean, T* grad_var) const;

 private:
  void pack(int64_t slot, int64_t block);
  // Measures pairs of a tile again that are near.
  void measure_near(const TileRows& tile, T* distance) const;
  Panel<T> rows_from(const Panel<T>& panel, int64_t row) const;

  const PairKernels<T>& kernels_;
  Rows<T> rows_;
  T near_;
  int64_t vectors_, rows_per_block_, count_;
  Buffer<T> mean_scale_, var_scale_;
  Buffer<uint8_t> safe_;
  Scaling<T> scaling_;
  std::unique_ptr<Buffer<T>> values_[2];
  Panel<T> panels_[2] = {};
  int64_t packed_[2] = {-1, -1};
};

}  // namespace cwbr
