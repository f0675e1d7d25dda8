// y = x W^T + b and its gradients where W is made a tile at a time, in cache, and never stored.
// Included only under SOLERA_FRONT.
//
// A task of the forward owns a block of outputs and adds the products with its tiles in the order
// of the inputs; a task of the backward owns a block of inputs (and, where those are few, a part of
// the outputs) and goes through the outputs. Tiles and their order depend on the weight's shape
// alone, and rows come padded to a multiple of 16, for which a row's bits do not depend on the
// others (docs/performance/batch_ensemble.md): so the results depend neither on the threads nor on
// the batch.
#pragma once
#include <algorithm>

#include "../tile_product.h"

namespace solera {
namespace {

using tile_product::ceil_div;
using tile_product::Matrix;

struct WeightTile {
  int64_t row, rows, column, columns;
};

// More tasks than one, so that a single one too runs inside a parallel region, where the BLAS takes
// no threads of its own.
template <class F>
void linear_tasks(int64_t count, const F& body) {
  if (count == 0) return;
  parallel_for(0, count > 1 ? count : 2, 1, [&](int64_t begin, int64_t end) {
    if (begin < count) body(begin, std::min(end, count));
  });
}

class TileLinear {
 public:
  // chunk: where a row's tiles start counts in multiples of it, if the row itself is one.
  TileLinear(const Tensor& x, const Tensor& weight, int64_t chunk)
      : type_(accumulate_type(weight)),
        size_(type_ == ScalarType::Double ? 8 : 4),
        rows_(x.sizes()[0]),
        padded_(ceil_div(rows_, 16) * 16),
        out_(weight.sizes()[0]),
        in_(weight.sizes()[1]),
        like_(weight) {
    tile_columns_ = in_ % chunk == 0 || in_ > 2048 ? (in_ % chunk == 0 ? 512 : 2048) : in_;
    tile_columns_ = std::max<int64_t>(1, std::min(tile_columns_, in_));
    tile_rows_ = std::clamp<int64_t>(65536 / tile_columns_ / 8 * 8, 16, 128);
  }

  ScalarType type() const { return type_; }
  int64_t tile_elements() const { return tile_rows_ * tile_columns_; }
  Tensor scratch(int64_t elements) const {
    return empty_like(like_, std::vector<int64_t>{elements}, type_);
  }

  // Rows in the accumulator's type, zeros behind them up to a multiple of 16.
  Tensor padded(const Tensor& x_in, int64_t columns) const {
    const Tensor x = tile_product::widened(x_in, type_);
    if (rows_ == padded_) return x;
    Tensor out = empty_like(x, std::vector<int64_t>{padded_, columns}, type_);
    char* data = static_cast<char*>(out.mutable_data_ptr());
    const size_t bytes = size_t(rows_ * columns * size_);
    if (bytes > 0) std::memcpy(data, x.const_data_ptr(), bytes);
    const size_t rest = size_t((padded_ - rows_) * columns * size_);
    if (rest > 0) std::memset(data + bytes, 0, rest);
    return out;
  }

  // build(tile, memory) writes a tile of W, dense.
  template <class Build>
  Tensor forward(const Tensor& x_in, const OptTensor& bias, const Build& build) const {
    const Tensor x = padded(x_in, in_);
    Tensor y = empty_like(x, std::vector<int64_t>{padded_, out_}, type_);
    OptTensor wide;
    if (bias.has_value()) wide = tile_product::widened(*bias, type_);
    const int64_t block = 2 * tile_rows_;  // x is packed anew for each block of outputs
    linear_tasks(rows_ > 0 ? ceil_div(out_, block) : 0, [&](int64_t begin, int64_t end) {
      Tensor tile = scratch(block * tile_columns_);
      for (int64_t n = begin * block; n < std::min(end * block, out_); n += block) {
        const int64_t high = std::min(block, out_ - n);
        for (int64_t r = 0; wide.has_value() && r < padded_; ++r)
          std::memcpy(tile_product::at(y, r * out_ + n), tile_product::at(*wide, n),
                      size_t(high * size_));
        int64_t k = 0;
        do {
          const WeightTile at{n, high, k, std::min(tile_columns_, in_ - k)};
          build(at, tile.mutable_data_ptr());
          const Matrix w{tile.const_data_ptr(), at.columns, high, 1, at.columns};
          tile_product::multiply(tile_product::at(y, n), out_,
                                 {tile_product::at(x, k), padded_, at.columns, in_, 1}, w, type_,
                                 wide.has_value() || k > 0);
          k += at.columns;
        } while (k < in_);
      }
    });
    return narrowed(y, x_in, out_);
  }

  // visit(tile, memory for W, its gradient or null) for each tile, with dW = dy^T x of the tile
  // there if `need_weight`; it writes W if `need_x`.
  template <class Visit>
  Tensor backward(const Tensor& dy_in, const Tensor& x_in, bool need_x, bool need_weight,
                  const Visit& visit) const {
    const Tensor dy = padded(dy_in, out_);
    const Tensor x = need_weight ? padded(x_in, in_) : x_in;
    const int64_t across = ceil_div(in_, tile_columns_), down = ceil_div(out_, tile_rows_);
    const int64_t parts = std::clamp<int64_t>(ceil_div(8, across > 0 ? across : 1), 1, 4);
    const int64_t span = std::max<int64_t>(1, ceil_div(down, parts));
    Tensor dx = empty_like(dy, std::vector<int64_t>{need_x ? parts : 0, padded_, in_}, type_);
    linear_tasks(across * parts, [&](int64_t begin, int64_t end) {
      Tensor tile = scratch(need_x ? tile_elements() : 0),
             grad = scratch(need_weight ? tile_elements() : 0);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t k = task % across * tile_columns_, part = task / across;
        const int64_t wide = std::min(tile_columns_, in_ - k);
        for (int64_t t = part * span;
             t < std::max(part * span + 1, std::min(down, part * span + span)); ++t) {
          const int64_t n = t * tile_rows_;
          const WeightTile at{n, std::clamp<int64_t>(out_ - n, 0, tile_rows_), k, wide};
          const Matrix dy_rows{tile_product::at(dy, std::min(n, out_)), padded_, at.rows, out_, 1};
          if (need_weight)
            tile_product::multiply(grad.mutable_data_ptr(), wide, dy_rows.transposed(),
                                   {tile_product::at(x, k), padded_, wide, in_, 1}, type_, false);
          visit(at, need_x ? tile.mutable_data_ptr() : nullptr,
                need_weight ? grad.const_data_ptr() : nullptr);
          if (need_x)
            tile_product::multiply(tile_product::at(dx, part * padded_ * in_ + k), in_, dy_rows,
                                   {tile.const_data_ptr(), at.rows, wide, wide, 1}, type_,
                                   t > part * span);
        }
      }
    });
    if (!need_x) return gradient_like(x_in, false);
    if (parts > 1) add_parts(dx, parts);
    return narrowed(dx, x_in, in_);
  }

  // The sums of dy's columns, in double, in the accumulator's type.
  Tensor column_sums(const Tensor& dy_in, bool needed) const {
    Tensor sums = empty_like(dy_in, std::vector<int64_t>{needed ? out_ : 0}, type_);
    if (!needed) return sums;
    const Tensor dy = tile_product::widened(dy_in, type_);
    const auto run = pick_reparam_table().column_sums[type_ == ScalarType::Double];
    parallel_for(0, out_, grain_for(rows_ * size_), [&](int64_t begin, int64_t end) {
      run(dy.const_data_ptr(), sums.mutable_data_ptr(), rows_, out_, begin, end);
    });
    return sums;
  }

 private:
  void add_parts(Tensor& dx, int64_t parts) const {
    const auto run = pick_reparam_table().add[type_ == ScalarType::Double];
    const int64_t n = padded_ * in_;
    parallel_for(0, n, grain_for(size_ * parts), [&](int64_t begin, int64_t end) {
      for (int64_t part = 1; part < parts; ++part)
        run(tile_product::at(dx, part * n + begin), tile_product::at(dx, begin), end - begin);
    });
  }

  // The first rows_ rows, in the dtype of x.
  Tensor narrowed(Tensor& full, const Tensor& x, int64_t columns) const {
    Tensor out = full;
    if (padded_ != rows_ || full.dim() != 2) {
      out = empty_like(full, std::vector<int64_t>{rows_, columns}, type_);
      if (out.numel() > 0)
        std::memcpy(out.mutable_data_ptr(), full.const_data_ptr(),
                    size_t(out.numel()) * size_t(size_));
    }
    return x.scalar_type() == type_ ? out : torch::stable::to(out, x.scalar_type());
  }

  ScalarType type_;
  int64_t size_, rows_, padded_, out_, in_, tile_rows_, tile_columns_;
  Tensor like_;
};

}  // namespace
}  // namespace solera
