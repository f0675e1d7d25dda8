// The product with a weight that all rows share, on fixed blocks of its columns, and what its
// results are summed in. Included under SOLERA_FRONT by adapters.cpp.
#pragma once
#include <algorithm>

#include "tiles.h"

namespace solera {
namespace ensemble {
namespace {

constexpr int64_t kBaseRows = 2048;

// Tasks outnumber one, so that a single task too runs inside a parallel region: outside, the BLAS
// may take threads of its own.
template <class F>
void tasks(int64_t count, const F& body) {
  if (count == 0) return;
  parallel_for(0, count > 1 ? count : 2, 1, [&](int64_t begin, int64_t end) {
    if (begin < count) body(begin, end < count ? end : count);
  });
}

int64_t column_block(int64_t columns) { return columns >= 2048 ? 1024 : 256; }

// The shared product on fixed blocks of columns: y (rows, to) = x (rows, from) times W^T, W being
// (to, from), or times W, W being (from, to). A W of another type is widened a block at a time.
struct SharedProduct {
  const Engine& e;
  const Tensor& like;
  int64_t rows, from, to;
  bool transposed;

  // add_bias(bias, y, rows, width, stride) adds a row of the accumulator's type, if bias is given.
  template <class AddBias>
  void operator()(const void* x, const Tensor& weight_in, const void* bias, void* y,
                  AddBias add_bias) const {
    const bool widen = weight_in.scalar_type() != e.tile && e.tile == ScalarType::Float &&
                       weight_in.element_size() == 2;
    const Tensor weight = widen ? dense(weight_in) : as(weight_in, e.tile);
    const EnsembleTable& wide = pick_ensemble_tables().of[dtype_of(weight)];
    const int64_t block = column_block(to), columns = ceil_div(to, block);
    const int64_t most = e.fixed ? e.max_rows : kBaseRows;
    const int64_t unit = e.fixed ? e.max_rows : kRowQuantum;
    tasks(rows > 0 ? columns : 0, [&](int64_t begin, int64_t end) {
      Tensor copy = e.scratch(like, widen ? from * block : 0),
             tile = e.scratch(like, unit * (from + block));
      for (int64_t t = begin; t < end; ++t) {
        const int64_t c = t * block, w = std::min(block, to - c);
        const void* data = weight.const_data_ptr();
        const int64_t first = transposed ? c * from : c;
        Matrix right{nullptr, from, w, transposed ? 1 : to, transposed ? from : 1};
        if (!widen) {
          right.data = e.at(const_cast<void*>(data), first);
        } else {
          right.data = copy.const_data_ptr();
          const char* half = static_cast<const char*>(data) + first * 2;
          if (transposed) {
            wide.widen(half, copy.mutable_data_ptr(), w * from);
          } else {
            for (int64_t i = 0; i < from; ++i)
              wide.widen(half + i * to * 2, e.at(copy.mutable_data_ptr(), i * w), w);
            right.row_step = w;
          }
        }
        for (int64_t row = 0; row < rows; row += most) {
          const int64_t count = std::min(most, rows - row), full = count / unit * unit;
          e.product({e.at(y, row * to + c), to},
                    {e.at(const_cast<void*>(x), row * from), full, from, from, 1}, right);
          if (full < count) rest(x, row + full, count - full, unit, right, c, w, tile, y);
          if (bias)
            add_bias(e.at_real(const_cast<void*>(bias), c), e.at(y, row * to + c), count, w, to);
        }
      }
    });
  }

 private:
  void rest(const void* x, int64_t row, int64_t count, int64_t unit, const Matrix& right, int64_t c,
            int64_t w, Tensor& scratch, void* y) const {
    void *tile = scratch.mutable_data_ptr(), *out = e.at(tile, unit * from);
    if (from > 0)
      std::memcpy(tile, e.at(const_cast<void*>(x), row * from), size_t(count * from * e.tile_size));
    std::memset(e.at(tile, count * from), 0, size_t((unit - count) * from * e.tile_size));
    e.product({out, w}, {tile, unit, from, from, 1}, right);
    for (int64_t j = 0; j < count; ++j)
      std::memcpy(e.at(y, (row + j) * to + c), e.at(out, j * w), size_t(w * e.tile_size));
  }
};

constexpr int64_t kSpan = 1 << 16;  // elements per task of a pass without a product
template <class F>
void spans(int64_t n, const F& body) {
  parallel_for(0, ceil_div(n, kSpan), 1,
               [&](int64_t begin, int64_t end) { body(begin * kSpan, std::min(end * kSpan, n)); });
}

// What a result is summed in: itself, or a copy in the tile's type that is rounded at the end.
struct Result {
  const Engine& e;
  Tensor out, sums;
  Result(const Engine& engine, const Tensor& like, Sizes sizes)
      : e(engine),
        out(empty_like(like, sizes)),
        sums(e.stored_as_tile ? out : e.scratch(like, out.numel())) {}
  void* data() { return sums.mutable_data_ptr(); }
  void start(const void* from) {
    spans(out.numel(), [&](int64_t begin, int64_t end) {
      const size_t bytes = size_t((end - begin) * e.tile_size);
      if (from)
        std::memcpy(e.at(data(), begin), e.at(const_cast<void*>(from), begin), bytes);
      else
        std::memset(e.at(data(), begin), 0, bytes);
    });
  }
  const Tensor& finish() {
    if (!e.stored_as_tile)
      spans(out.numel(), [&](int64_t begin, int64_t end) {
        e.run.round(e.at(data(), begin),
                    static_cast<char*>(out.mutable_data_ptr()) + begin * e.size, end - begin);
      });
    return out;
  }
};

// dW (to, from) = dy^T x, in fixed blocks, each one sum over all rows.
void shared_weight(const Engine& e, const Tensor& like, const void* dy, const void* x, int64_t rows,
                   int64_t to, int64_t from, Tensor& dweight) {
  const int64_t high = column_block(to), wide = column_block(from);
  const int64_t across = ceil_div(from, wide);
  const bool direct = dweight.scalar_type() == e.tile;
  const EnsembleTable& store = pick_ensemble_tables().of[dtype_of(dweight)];
  tasks(ceil_div(to, high) * across, [&](int64_t begin, int64_t end) {
    Tensor part = e.scratch(like, direct ? 0 : high * wide),
           sum = e.scratch(like, direct ? 0 : wide, true);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t o = t / across * high, i = t % across * wide;
      const int64_t h = std::min(high, to - o), w = std::min(wide, from - i);
      const EnsembleMatrix block{
          direct ? e.at(dweight.mutable_data_ptr(), o * from + i) : part.mutable_data_ptr(),
          direct ? from : w};
      e.product(block, {e.at(const_cast<void*>(dy), o), h, rows, 1, to},
                {e.at(const_cast<void*>(x), i), rows, w, from, 1});
      for (int64_t j = 0; !direct && j < h; ++j) {
        std::memset(sum.mutable_data_ptr(), 0, size_t(w * e.real_size));
        e.run.add(e.at(block.data, j * w), sum.mutable_data_ptr(), w);
        store.round(sum.const_data_ptr(),
                    static_cast<char*>(dweight.mutable_data_ptr()) +
                        ((o + j) * from + i) * dweight.element_size(),
                    w);
      }
    }
  });
}

}  // namespace
}  // namespace ensemble
}  // namespace solera
