// Column log-sum-exps and activation sets of a bank's similarities, and what is done with them.
//
//   L_j = log sum_m exp(beta B_mj)      A = columns among the k largest of some row
//   out_ij = c_i S_ij - [row i uses it] L_j - [...] L2_j,  c_i = the betas it uses, or 1
//
// Bytes: given similarities are read once for L (16 rows of a vector of columns are held in
// registers between their maximum and their sum) and once more for A; of embeddings the product's
// tile stays in L2, so memory sees bank and gallery once for every kStep or kTile rows of the
// other. Operations beside the product: one exponential and a dozen instructions an element of B.
//
// Tiles have one shape whatever the thread count, and a column's sum takes its rows in order: same
// bits for any number of threads.
#include "bank_passes.h"

#ifdef SOLERA_FRONT
#include <algorithm>
#include <cmath>

#include "../tile_product.h"

namespace solera {

SOLERA_PICK(BankTable, bank_table)

namespace {

using tile_product::at;
using tile_product::ceil_div;
using tile_product::widened;

constexpr int64_t kTileRows = 256,
                  kTileColumns = 512;  // half a MiB of float32: L2 with its operands
constexpr int64_t kStep = 2048;        // bank rows between two merges of their top k
constexpr int64_t kQueries = 512;      // queries whose scores wait for their row's best item

// Running maxima and sums of n columns, and L of them.
struct Columns {
  ScalarType real;
  bool is_double;
  Tensor maximum, total;
  Columns(const Tensor& like, int64_t n)
      : real(accumulate_type(like)),
        is_double(real == ScalarType::Double),
        maximum(empty_like(like, {n}, real)),
        total(empty_like(like, {n}, real)) {
    torch::stable::fill_(maximum, -INFINITY);
    torch::stable::fill_(total, 0.0);
  }
  Tensor finish(double beta) {
    const int64_t n = maximum.numel();
    Tensor lse = empty_like(maximum, {n});
    pick_bank_table().finish[is_double](maximum.const_data_ptr(), total.const_data_ptr(),
                                        lse.mutable_data_ptr(), n, beta);
    return lse;
  }
};

// The k largest of `rows` rows, empty at first.
struct Largest {
  Tensor values;
  std::vector<int64_t> indices;
  int64_t k;
  Largest(const Tensor& like, int64_t rows, int64_t k)
      : values(empty_like(like, {rows * k}, accumulate_type(like))), k(k) {
    clear();
  }
  void clear() {
    torch::stable::fill_(values, -INFINITY);
    indices.assign(size_t(values.numel()), -1);
  }
  BankTop from_row(int64_t row) {
    BankTop p{};
    p.k = k;
    p.values = at(values, row * k);
    p.indices = indices.data() + row * k;
    return p;
  }
};

struct Flags {
  Tensor owner;
  Flags(const Tensor& like, int64_t n) : owner(empty_like(like, {n}, ScalarType::Bool)) {
    if (n > 0) std::memset(owner.mutable_data_ptr(), 0, size_t(n));
  }
  void mark(const Largest& top) {
    char* flag = static_cast<char*>(owner.mutable_data_ptr());
    for (const int64_t j : top.indices)
      if (j >= 0) flag[j] = 1;
  }
};

std::tuple<Tensor, Tensor> bank_columns(const Tensor& s_in, double beta, int64_t top_k) {
  const Tensor s = dense(s_in);
  const int64_t rows = s.size(0), columns = s.size(1), size = s.element_size();
  const auto& table = pick_bank_table();
  const Dtype dtype = dtype_of(s);
  Columns state(s, columns);
  const int64_t stripes = ceil_div(columns, kTileColumns);
  parallel_for(0, stripes, grain_for(rows * kTileColumns * size), [&](int64_t begin, int64_t end) {
    BankFold p{s.const_data_ptr(),
               columns,
               rows,
               begin * kTileColumns,
               std::min(end * kTileColumns, columns),
               state.maximum.mutable_data_ptr(),
               state.total.mutable_data_ptr(),
               beta};
    table.fold[dtype](p);
  });
  Flags flags(s, top_k > 0 ? columns : 0);
  const int64_t k = std::min(top_k, columns);
  if (k > 0) {
    Largest found(s, rows, k);
    parallel_for(0, rows, grain_for(columns * size), [&](int64_t begin, int64_t end) {
      BankTop p = found.from_row(0);
      p.tile = s.const_data_ptr();
      p.stride = p.columns = columns;
      table.top[dtype](p, begin, end);
    });
    flags.mark(found);
  }
  return {state.finish(beta), flags.owner};
}

Tensor bank_columns_backward(const Tensor& dlse_in, const Tensor& lse_in, const Tensor& s_in,
                             double beta) {
  const Tensor s = dense(s_in);
  const ScalarType real = accumulate_type(s);
  const Tensor dlse = widened(dlse_in, real), lse = widened(lse_in, real);
  const int64_t columns = s.size(1);
  Tensor out = empty_like(s, s.sizes());
  const auto kernel = pick_bank_table().weights[dtype_of(s)];
  parallel_for(0, s.size(0), grain_for(columns * s.element_size()),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i)
                   kernel(at(s, i * columns), lse.const_data_ptr(), dlse.const_data_ptr(),
                          at(out, i * columns), columns, beta);
               });
  return out;
}

// The product of two sets of rows, a tile at a time.
struct RowsOf {
  Tensor owner;
  int64_t rows, inner;
  RowsOf(const Tensor& t, ScalarType real)
      : owner(widened(t, real)), rows(t.size(0)), inner(t.size(1)) {}
  tile_product::Matrix part(int64_t first, int64_t count) const {
    return {at(owner, first * inner), count, inner, inner, 1};
  }
};

// Calls body(stripe, first column, columns, tile) for each stripe of columns, in parallel; a tile
// holds kTileRows rows of it.
template <class F>
void for_stripes(const Tensor& like, ScalarType real, int64_t columns, const F& body) {
  parallel_for(0, ceil_div(columns, kTileColumns), 1, [&](int64_t begin, int64_t end) {
    Tensor tile = empty_like(like, {kTileRows * kTileColumns}, real);
    for (int64_t stripe = begin; stripe < end; ++stripe) {
      const int64_t first = stripe * kTileColumns;
      body(stripe, first, std::min(kTileColumns, columns - first), tile.mutable_data_ptr());
    }
  });
}

std::tuple<Tensor, Tensor> bank_stream(const Tensor& bank_in, const Tensor& gallery_in, double beta,
                                       int64_t top_k) {
  const ScalarType real = accumulate_type(bank_in);
  const RowsOf bank(bank_in, real), gallery(gallery_in, real);
  const int64_t columns = gallery.rows, stripes = ceil_div(columns, kTileColumns);
  const int64_t k = std::min(top_k, columns);
  const auto& table = pick_bank_table();
  Columns state(bank_in, columns);
  const Dtype code = state.is_double ? kFloat64 : kFloat32;
  Flags flags(bank_in, top_k > 0 ? columns : 0);
  const int64_t step = std::min(bank.rows, kStep);
  Largest part(bank_in, k > 0 ? stripes * step : 0, k), found(bank_in, k > 0 ? step : 0, k);
  for (int64_t start = 0; start < bank.rows; start += kStep) {
    const int64_t count = std::min(step, bank.rows - start);
    if (k > 0) part.clear(), found.clear();
    for_stripes(
        bank_in, real, columns, [&](int64_t stripe, int64_t first, int64_t width, void* tile) {
          for (int64_t row = 0; row < count; row += kTileRows) {
            const int64_t rows = std::min(kTileRows, count - row);
            tile_product::multiply(tile, width, bank.part(start + row, rows),
                                   gallery.part(first, width).transposed(), real, false);
            BankFold p{
                tile, width, rows, 0, width, at(state.maximum, first), at(state.total, first),
                beta};
            table.fold[code](p);
            if (k > 0) {
              BankTop t = part.from_row(stripe * step + row);
              t.tile = tile;
              t.stride = t.columns = width;
              t.offset = first;
              table.top[code](t, 0, rows);
            }
          }
        });
    if (k == 0) continue;
    for (int64_t row = 0; row < count; ++row)
      for (int64_t stripe = 0; stripe < stripes; ++stripe) {
        const int64_t from = (stripe * step + row) * k;
        table.merge[state.is_double](found.from_row(row), at(part.values, from),
                                     part.indices.data() + from);
      }
    flags.mark(found);
  }
  return {state.finish(beta), flags.owner};
}

std::tuple<Tensor, Tensor> bank_stream_backward(const Tensor& dlse_in, const Tensor& lse_in,
                                                const Tensor& bank_in, const Tensor& gallery_in,
                                                double beta, bool need_bank, bool need_gallery) {
  const ScalarType real = accumulate_type(bank_in);
  const RowsOf bank(bank_in, real), gallery(gallery_in, real);
  const Tensor dlse = widened(dlse_in, real), lse = widened(lse_in, real);
  const int64_t inner = bank.inner, columns = gallery.rows;
  const int64_t stripes = ceil_div(columns, kTileColumns);
  const Dtype code = real == ScalarType::Double ? kFloat64 : kFloat32;
  const auto kernel = pick_bank_table().weights[code];
  Tensor dbank = empty_like(bank_in, {need_bank ? bank.rows : 0, inner}, real);
  Tensor dgallery = empty_like(bank_in, {need_gallery ? columns : 0, inner}, real);
  torch::stable::fill_(dbank, 0.0);
  torch::stable::fill_(dgallery, 0.0);
  // A tile's rows of dbank by stripe, added up in the stripes' order.
  Tensor part = empty_like(bank_in, {need_bank ? stripes * kTileRows * inner : 0}, real);
  for (int64_t row = 0; row < bank.rows; row += kTileRows) {
    const int64_t rows = std::min(kTileRows, bank.rows - row);
    for_stripes(
        bank_in, real, columns, [&](int64_t stripe, int64_t first, int64_t width, void* tile) {
          const auto x = bank.part(row, rows), y = gallery.part(first, width);
          tile_product::multiply(tile, width, x, y.transposed(), real, false);
          const int64_t size = lse.element_size();
          for (int64_t r = 0; r < rows; ++r) {
            void* s = static_cast<char*>(tile) + r * width * size;
            kernel(s, at(lse, first), at(dlse, first), s, width, beta);
          }
          const tile_product::Matrix d{tile, rows, width, width, 1};
          if (need_bank)
            tile_product::multiply(at(part, stripe * kTileRows * inner), inner, d, y, real, false);
          if (need_gallery)
            tile_product::multiply(at(dgallery, first * inner), inner, d.transposed(), x, real,
                                   true);
        });
    if (!need_bank) continue;
    parallel_for(0, rows, grain_for(stripes * inner * 4), [&](int64_t begin, int64_t end) {
      const auto add = [&](auto zero) {
        using T = decltype(zero);
        T* out = static_cast<T*>(at(dbank, row * inner));
        for (int64_t s = 0; s < stripes; ++s) {
          const T* from = static_cast<const T*>(at(part, s * kTileRows * inner));
          for (int64_t i = begin * inner; i < end * inner; ++i) out[i] += from[i];
        }
      };
      if (code == kFloat64)
        add(double(0));
      else
        add(float(0));
    });
  }
  const int64_t none[] = {0};
  if (!need_bank) dbank = empty_like(bank_in, Sizes(none, 1), real);
  if (!need_gallery) dgallery = empty_like(bank_in, Sizes(none, 1), real);
  return {dbank, dgallery};
}

// The banks of a normalisation: L, A and beta of one or two.
struct Banks {
  Tensor lse, lse2;
  const char *active = nullptr, *active2 = nullptr;
  Tensor flags, flags2;
  bool second, dynamic;
  double beta, beta2;
  Banks(const Tensor& l, const OptTensor& a, double b, const OptTensor& l2, const OptTensor& a2,
        double b2, ScalarType real)
      : lse(widened(l, real)),
        second(l2.has_value()),
        dynamic(a.has_value() || a2.has_value()),
        beta(b),
        beta2(b2) {
    if (second) lse2 = widened(*l2, real);
    if (a.has_value()) flags = dense(*a), active = static_cast<const char*>(flags.const_data_ptr());
    if (a2.has_value())
      flags2 = dense(*a2), active2 = static_cast<const char*>(flags2.const_data_ptr());
  }
  // What a row whose best item is `best` (-1 for none) uses: 1, 2, both or 0.
  int uses(int64_t best) const {
    const bool one = !active || (best >= 0 && active[best]);
    const bool two = second && (!active2 || (best >= 0 && active2[best]));
    return int(one) + 2 * int(two);
  }
  BankRow row(int used, int64_t first, int64_t columns) const {
    const double scale = used ? (used & 1 ? beta : 0) + (used & 2 ? beta2 : 0) : 1;
    return {
        nullptr, nullptr, used & 1 ? at(lse, first) : nullptr, used & 2 ? at(lse2, first) : nullptr,
        columns, scale};
  }
};

std::tuple<Tensor, Tensor> bank_apply(const Tensor& s_in, const Tensor& lse, OptTensor active,
                                      double beta, OptTensor lse2, OptTensor active2,
                                      double beta2) {
  const Tensor s = dense(s_in);
  const Banks banks(lse, active, beta, lse2, active2, beta2, accumulate_type(s));
  const int64_t rows = s.size(0), columns = s.size(1);
  Tensor out = empty_like(s, s.sizes()), used = empty_like(s, {rows}, ScalarType::Int);
  int32_t* use = static_cast<int32_t*>(used.mutable_data_ptr());
  const auto& table = pick_bank_table();
  const Dtype dtype = dtype_of(s);
  parallel_for(0, rows, grain_for(columns * s.element_size()), [&](int64_t begin, int64_t end) {
    Largest best(s, 1, 1);
    for (int64_t i = begin; i < end; ++i) {
      if (banks.dynamic) {
        best.clear();
        BankTop p = best.from_row(0);
        p.tile = at(s, i * columns);
        p.stride = p.columns = columns;
        table.top[dtype](p, 0, 1);
      }
      use[i] = banks.uses(best.indices[0]);
      BankRow p = banks.row(use[i], 0, columns);
      p.in = at(s, i * columns);
      p.out = at(out, i * columns);
      table.apply[dtype](p);
    }
  });
  return {out, used};
}

Tensor bank_scores(const Tensor& queries_in, const Tensor& gallery_in, const Tensor& lse,
                   OptTensor active, double beta, OptTensor lse2, OptTensor active2, double beta2) {
  const ScalarType real = accumulate_type(queries_in);
  const RowsOf queries(queries_in, real), gallery(gallery_in, real);
  const Banks banks(lse, active, beta, lse2, active2, beta2, real);
  const int64_t columns = gallery.rows, stripes = ceil_div(columns, kTileColumns);
  const Dtype code = real == ScalarType::Double ? kFloat64 : kFloat32;
  const auto& table = pick_bank_table();
  Tensor out = empty_like(queries_in, {queries.rows, columns}, real);
  const int64_t step = std::min(queries.rows, kQueries), size = out.element_size();
  Largest part(queries_in, banks.dynamic ? stripes * step : 0, 1);
  for (int64_t start = 0; start < queries.rows; start += step) {
    const int64_t count = std::min(step, queries.rows - start);
    if (banks.dynamic) part.clear();
    for_stripes(out, real, columns, [&](int64_t stripe, int64_t first, int64_t width, void* tile) {
      for (int64_t row = 0; row < count; row += kTileRows) {
        const int64_t rows = std::min(kTileRows, count - row);
        tile_product::multiply(tile, width, queries.part(start + row, rows),
                               gallery.part(first, width).transposed(), real, false);
        if (banks.dynamic) {
          BankTop t = part.from_row(stripe * step + row);
          t.tile = tile;
          t.stride = t.columns = width;
          t.offset = first;
          table.top[code](t, 0, rows);
        }
        BankRow p = banks.row(banks.dynamic ? 0 : banks.uses(-1), first, width);
        for (int64_t r = 0; r < rows; ++r) {
          p.in = static_cast<const char*>(tile) + r * width * size;
          p.out = at(out, (start + row + r) * columns + first);
          table.apply[code](p);
        }
      }
    });
    if (!banks.dynamic) continue;
    parallel_for(0, count, grain_for(columns * size), [&](int64_t begin, int64_t end) {
      Largest best(out, 1, 1);
      for (int64_t i = begin; i < end; ++i) {
        best.clear();
        for (int64_t s = 0; s < stripes; ++s)
          table.merge[code == kFloat64](best.from_row(0), at(part.values, s * step + i),
                                        part.indices.data() + s * step + i);
        const int used = banks.uses(best.indices[0]);
        if (used == 0) continue;
        BankRow p = banks.row(used, 0, columns);
        p.in = p.out = at(out, (start + i) * columns);
        table.apply[code](p);
      }
    });
  }
  return out;
}

std::tuple<Tensor, Tensor> row_top(const Tensor& s_in, int64_t k) {
  const Tensor s = dense(s_in);
  const int64_t rows = s.size(0), columns = s.size(1);
  const Dtype dtype = dtype_of(s);
  Tensor indices = empty_like(s, {rows, k}, ScalarType::Long);
  Tensor values = empty_like(s, {rows, k}, accumulate_type(s));
  torch::stable::fill_(values, -INFINITY);
  int64_t* index = static_cast<int64_t*>(indices.mutable_data_ptr());
  std::fill(index, index + rows * k, int64_t(-1));
  const auto kernel = pick_bank_table().top[dtype];
  if (k > 0)
    parallel_for(0, rows, grain_for(columns * s.element_size()), [&](int64_t begin, int64_t end) {
      BankTop p{s.const_data_ptr(), columns, columns, 0, k, values.mutable_data_ptr(), index};
      kernel(p, begin, end);
    });
  return {
      values.scalar_type() == s.scalar_type() ? values : torch::stable::to(values, s.scalar_type()),
      indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("bank_columns", TORCH_BOX(&bank_columns));
  m.impl("bank_columns_backward", TORCH_BOX(&bank_columns_backward));
  m.impl("bank_stream", TORCH_BOX(&bank_stream));
  m.impl("bank_stream_backward", TORCH_BOX(&bank_stream_backward));
  m.impl("bank_apply", TORCH_BOX(&bank_apply));
  m.impl("bank_scores", TORCH_BOX(&bank_scores));
  m.impl("row_top", TORCH_BOX(&row_top));
}

}  // namespace solera
#endif  // SOLERA_FRONT
