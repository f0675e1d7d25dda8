// A shared linear layer with low-rank (or narrow) branches, forward and backward:
//
//   p_nj = A_e x_n + c_e,  q_nj = s g_nj act(p_nj),   e = index[n, j] (< 0: none)
//   y_n  = W x_n + d + sum_j B_e q_nj
//
// The pairs (n, j) are sorted by e (a stable counting sort); each branch is one product on tiles of
// its own rows, so that only the needed r columns are computed and no delta to W ever exists.
//
// Operations: 2 N I O for the shared product, 2 P r (I + O) for P pairs; backward twice that,
// without the I O term of dW where W is frozen. Bytes, at least: forward x, W, y once and, for the
// branches, x and y once more (r columns against a tile that has left the cache); backward dy, W,
// dx once, then dy twice, x and dx once.
//
// Tiles hold a multiple of 16 rows and the shared product runs on fixed blocks of columns, one
// thread each: neither the thread count nor the other rows of a batch change a row's bits.
#include "../activation.h"
#include "../strips.h"
#include "tiles.h"

namespace solera {

// Where a branch's pairs stand: pair `pairs[j]` is row pairs[j] / slots. Elements are of the tile's
// type, sums and `pre` of the accumulator's.
struct AdapterTable {
  void (*add_rows)(const void* h, const int64_t* pairs, int64_t count, int64_t slots, void* y,
                   int64_t columns);
  void (*add_bias)(const void* bias, void* y, int64_t rows, int64_t width, int64_t stride);
  void (*keep)(const void* z, const void* bias, const int64_t* pairs, int64_t count, void* pre,
               int64_t rank);
  void (*coefficients)(const void* pre, const void* gates, double scaling, void* q, int64_t begin,
                       int64_t end, int64_t rank, int64_t groups, int activation);
  void (*slopes)(const void* pre, const void* u, const void* gates, double scaling, void* v,
                 void* q, void* dgates, int64_t begin, int64_t end, int64_t rank, int64_t groups,
                 int activation);
  void (*sum_pairs)(const void* v, const int64_t* pairs, int64_t count, void* sum, int64_t rank);
  void (*sum_columns)(const void* dy, int64_t rows, int64_t stride, void* sum, int64_t width);
};

struct AdapterTables {
  AdapterTable of[3];  // tiles of float, double, bfloat16
};

namespace SOLERA_ISA {
namespace {

template <class C>
struct Adapter {
  typedef A<C> Real;
  typedef AccVec<C> V;
  static constexpr int L = kLanes<C>;

  static void add_rows(const void* h, const int64_t* pairs, int64_t count, int64_t slots, void* y,
                       int64_t columns) {
    for (int64_t j = 0; j < count; ++j) {
      C* to = (C*)y + pairs[j] / slots * columns;
      const C* from = (const C*)h + j * columns;
      strips<L>(columns,
                [&](int64_t i, int c) { put(to + i, get(to + i, c) + get(from + i, c), c); });
    }
  }
  static void add_bias(const void* bias, void* y, int64_t rows, int64_t width, int64_t stride) {
    for (int64_t n = 0; n < rows; ++n) {
      C* to = (C*)y + n * stride;
      strips<L>(width, [&](int64_t i, int c) {
        put(to + i, get(to + i, c) + get((const Real*)bias + i, c), c);
      });
    }
  }
  static void keep(const void* z, const void* bias, const int64_t* pairs, int64_t count, void* pre,
                   int64_t rank) {
    for (int64_t j = 0; j < count; ++j) {
      Real* to = (Real*)pre + pairs[j] * rank;
      const C* from = (const C*)z + j * rank;
      strips<L>(rank, [&](int64_t i, int c) {
        V v = get(from + i, c);
        put(to + i, bias ? v + get((const Real*)bias + i, c) : v, c);
      });
    }
  }

  static Real factor(const void* gates, int64_t at, double scaling) {
    return gates ? Real(scaling) * ((const Real*)gates)[at] : Real(scaling);
  }
  static void coefficients(const void* pre, const void* gates, double scaling, void* q,
                           int64_t begin, int64_t end, int64_t rank, int64_t groups,
                           int activation) {
    const int64_t width = rank / groups;
    for (int64_t p = begin * groups; p < end * groups; ++p) {
      const Real by = factor(gates, p, scaling);
      const Real* from = (const Real*)pre + p * width;
      C* to = (C*)q + p * width;
      strips<L>(width, [&](int64_t i, int c) {
        put(to + i, activate(get(from + i, c), activation) * by, c);
      });
    }
  }
  static void slopes(const void* pre, const void* u, const void* gates, double scaling, void* v,
                     void* q, void* dgates, int64_t begin, int64_t end, int64_t rank,
                     int64_t groups, int activation) {
    const int64_t width = rank / groups;
    for (int64_t p = begin * groups; p < end * groups; ++p) {
      const Real by = factor(gates, p, scaling);
      const Real *z = (const Real*)pre + p * width, *g = (const Real*)u + p * width;
      V sum{};
      strips<L>(width, [&](int64_t i, int c) {
        const V at = get(z + i, c), d = get(g + i, c), t = activate(at, activation);
        sum += keep_lanes(t * d, c);
        put((C*)v + p * width + i, (activation == kNone ? d : slope(d, at, activation)) * by, c);
        put((C*)q + p * width + i, t * by, c);
      });
      if (dgates) ((Real*)dgates)[p] = Real(scaling) * lane_sum(sum);
    }
  }
  static V keep_lanes(V v, int c) { return solera::SOLERA_ISA::keep<C>(v, c); }

  static void sum_pairs(const void* v, const int64_t* pairs, int64_t count, void* sum,
                        int64_t rank) {
    strips<L>(rank, [&](int64_t i, int c) {
      V total{};
      for (int64_t start = 0; start < count; start += 64) {
        V part{};
        for (int64_t j = start; j < count && j < start + 64; ++j)
          part += get((const C*)v + pairs[j] * rank + i, c);
        total += part;
      }
      put((Real*)sum + i, total, c);
    });
  }
  static void sum_columns(const void* dy, int64_t rows, int64_t stride, void* sum, int64_t width) {
    memset(sum, 0, size_t(width) * sizeof(Real));
    for (int64_t start = 0; start < rows; start += 32)
      strips<L>(width, [&](int64_t i, int c) {
        V part{};
        for (int64_t n = start; n < rows && n < start + 32; ++n)
          part += get((const C*)dy + n * stride + i, c);
        put((Real*)sum + i, get((Real*)sum + i, c) + part, c);
      });
  }

  static constexpr AdapterTable table() {
    return {add_rows, add_bias, keep, coefficients, slopes, sum_pairs, sum_columns};
  }
};

}  // namespace

extern const AdapterTables adapter_tables;
const AdapterTables adapter_tables = {
    {Adapter<float>::table(), Adapter<double>::table(), Adapter<bf16>::table()}};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "shared_product.h"

namespace solera {

namespace generic {
extern const AdapterTables adapter_tables;
}
SOLERA_PICK(AdapterTables, adapter_tables)

namespace ensemble {
namespace {

constexpr int64_t kTileElements = 1 << 18;  // a tile of gathered rows: 1 MiB of float32
constexpr int64_t kOuterRows = 384, kOuterColumns = 512;

struct AdapterSizes {
  int64_t rows, in, out, slots, pairs, experts, rank, groups;
  AdapterSizes(const Tensor& index, const Tensor& a, const Tensor& b, const OptTensor& gates)
      : rows(index.size(0)),
        in(a.size(2)),
        out(b.size(1)),
        slots(index.size(1)),
        pairs(rows * slots),
        experts(a.size(0)),
        rank(a.size(1)),
        groups(gates.has_value() ? gates->size(2) : 1) {}
};

// The pairs by branch, in order within one: of branch e order[offsets[e] .. offsets[e + 1]).
struct AdapterOrder {
  std::vector<int64_t> order, offsets;
  AdapterOrder(const Tensor& index_in, const AdapterSizes& n)
      : order(size_t(n.pairs)), offsets(size_t(n.experts) + 1) {
    const Tensor index = dense(index_in);
    const int64_t* of = static_cast<const int64_t*>(index.const_data_ptr());
    const auto valid = [&](int64_t e) { return e >= 0 && e < n.experts; };
    std::vector<int64_t> next(size_t(n.experts) + 1);
    for (int64_t p = 0; p < n.pairs; ++p)
      if (valid(of[p])) ++next[size_t(of[p]) + 1];
    for (int64_t e = 0; e < n.experts; ++e) next[size_t(e) + 1] += next[size_t(e)];
    offsets = next;
    for (int64_t p = 0; p < n.pairs; ++p)
      if (valid(of[p])) order[size_t(next[size_t(of[p])]++)] = p;
  }
  // The first place at or past `from` in branch e whose pair is at least p.
  int64_t lower(int64_t e, int64_t p) const {
    int64_t low = offsets[size_t(e)], high = offsets[size_t(e) + 1];
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (order[size_t(middle)] < p)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

// A stack of matrices: of branch e, element (i, j) at data + e * step + i * row + j * column.
struct AdapterStack {
  const void* data;
  int64_t step, row, column;
};

struct Adapters {
  const Engine e;
  const AdapterTable& run;
  const Tensor& like;
  const AdapterSizes n;
  const AdapterOrder by;

  Adapters(const Tensor& x, const Tensor& index, const Tensor& a, const Tensor& b,
           const OptTensor& gates)
      : e(x),
        run(pick_adapter_tables().of[e.tile == ScalarType::BFloat16 ? 2
                                     : e.tile == ScalarType::Double ? 1
                                                                    : 0]),
        like(x),
        n(index, a, b, gates),
        by(index, n) {}

  int64_t chunk(int64_t width) const {
    if (e.fixed) return e.max_rows;
    const int64_t fit = round_up(kTileElements / (width > 0 ? width : 1), kRowQuantum);
    return fit < 16 ? 16 : fit > e.max_rows ? e.max_rows : fit;
  }
  const void* item(const AdapterStack& s, int64_t k) const {
    return e.at(const_cast<void*>(s.data), k * s.step);
  }
  // Rows of x (by pair / slots, or by pair) into a dense tile, the rest zero.
  void gather(const void* x, const int64_t* pairs, int64_t count, int64_t padded, int64_t slots,
              int64_t stride, int64_t first, int64_t width, void* tile) const {
    const size_t bytes = size_t(width * e.tile_size);
    if (bytes == 0) return;
    for (int64_t j = 0; j < count; ++j)
      std::memcpy(e.at(tile, j * width),
                  e.at(const_cast<void*>(x), pairs[j] / slots * stride + first), bytes);
    std::memset(e.at(tile, count * width), 0, size_t(padded - count) * bytes);
  }

  // pre[p] = M_e x[row of p] + bias_e, M_e as a (width, rank) stack of right factors.
  void shrink(const void* x, int64_t width, const AdapterStack& m, const void* bias,
              void* pre) const {
    struct Piece {
      int64_t expert, begin, end;
    };
    std::vector<Piece> pieces;
    const int64_t most = chunk(width);
    for (int64_t k = 0; k < n.experts; ++k)
      for (int64_t at = by.offsets[size_t(k)]; at < by.offsets[size_t(k) + 1]; at += most)
        pieces.push_back({k, at, std::min(at + most, by.offsets[size_t(k) + 1])});
    tasks(int64_t(pieces.size()), [&](int64_t begin, int64_t end) {
      Tensor tile = e.scratch(like, most * width), z = e.scratch(like, most * n.rank);
      for (int64_t t = begin; t < end; ++t) {
        const Piece& piece = pieces[size_t(t)];
        const int64_t count = piece.end - piece.begin, padded = e.padded(count);
        const int64_t* pairs = by.order.data() + piece.begin;
        const bool in_place = n.slots == 1 && count == padded && pairs[count - 1] - *pairs < count;
        const void* rows =
            in_place ? e.at(const_cast<void*>(x), *pairs * width) : tile.const_data_ptr();
        if (!in_place)
          gather(x, pairs, count, padded, n.slots, width, 0, width, tile.mutable_data_ptr());
        e.product({z.mutable_data_ptr(), n.rank}, {rows, padded, width, width, 1},
                  {item(m, piece.expert), width, n.rank, m.row, m.column});
        run.keep(z.const_data_ptr(), e.at_real(const_cast<void*>(bias), piece.expert * n.rank),
                 pairs, count, pre, n.rank);
      }
    });
  }

  // y[row of p] += q[p] M_e, M_e as a (rank, width) stack of right factors; branches in order.
  void expand(const void* q, const AdapterStack& m, void* y, int64_t width) const {
    const int64_t threads = int64_t(torch::stable::get_num_threads());
    const int64_t most = chunk(width), task = std::max<int64_t>(ceil_div(n.rows, threads), 16);
    tasks(ceil_div(n.rows, task), [&](int64_t begin, int64_t end) {
      Tensor tile = e.scratch(like, most * n.rank), h = e.scratch(like, most * width);
      const int64_t first = begin * task * n.slots, last = std::min(end * task, n.rows) * n.slots;
      for (int64_t k = 0; k < n.experts; ++k) {
        const int64_t stop = by.lower(k, last);
        for (int64_t at = by.lower(k, first); at < stop; at += most) {
          const int64_t count = std::min(most, stop - at), padded = e.padded(count);
          const int64_t* pairs = by.order.data() + at;
          gather(q, pairs, count, padded, 1, n.rank, 0, n.rank, tile.mutable_data_ptr());
          e.product({h.mutable_data_ptr(), width},
                    {tile.const_data_ptr(), padded, n.rank, n.rank, 1},
                    {item(m, k), n.rank, width, m.row, m.column});
          run.add_rows(h.const_data_ptr(), pairs, count, n.slots, y, width);
        }
      }
    });
  }

  // out_e = sum over its pairs of v[p] x[row of p]^T (rank, width), or its transpose.
  void outer(const void* v, const void* x, int64_t width, void* out, bool turned) const {
    const int64_t blocks = ceil_div(width, kOuterColumns);
    if (n.rank == 0) return;
    tasks(n.experts * blocks, [&](int64_t begin, int64_t end) {
      Tensor left = e.scratch(like, kOuterRows * n.rank),
             right = e.scratch(like, kOuterRows * kOuterColumns),
             part = e.scratch(like, n.rank * kOuterColumns),
             sum = e.scratch(like, n.rank * kOuterColumns, true);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t k = t / blocks, c = t % blocks * kOuterColumns;
        const int64_t w = std::min(kOuterColumns, width - c), size = n.rank * w;
        std::memset(sum.mutable_data_ptr(), 0, size_t(size * e.real_size));
        for (int64_t at = by.offsets[size_t(k)]; at < by.offsets[size_t(k) + 1]; at += kOuterRows) {
          const int64_t count = std::min(kOuterRows, by.offsets[size_t(k) + 1] - at);
          const int64_t* pairs = by.order.data() + at;
          gather(v, pairs, count, count, 1, n.rank, 0, n.rank, left.mutable_data_ptr());
          gather(x, pairs, count, count, n.slots, width, c, w, right.mutable_data_ptr());
          const void *l = left.const_data_ptr(), *r = right.const_data_ptr();
          if (turned)
            e.product({part.mutable_data_ptr(), n.rank}, {r, w, count, 1, w},
                      {l, count, n.rank, n.rank, 1});
          else
            e.product({part.mutable_data_ptr(), w}, {l, n.rank, count, 1, n.rank},
                      {r, count, w, w, 1});
          e.run.add(part.const_data_ptr(), sum.mutable_data_ptr(), size);
        }
        char* to = static_cast<char*>(out) + k * n.rank * width * e.real_size;
        if (turned)
          std::memcpy(to + c * n.rank * e.real_size, sum.const_data_ptr(),
                      size_t(size * e.real_size));
        else
          for (int64_t i = 0; i < n.rank; ++i)
            std::memcpy(to + (i * width + c) * e.real_size,
                        e.at_real(sum.mutable_data_ptr(), i * w), size_t(w * e.real_size));
      }
    });
  }
};

std::tuple<Tensor, Tensor> adapter_linear(const Tensor& x_in, OptTensor weight, OptTensor bias_in,
                                          const Tensor& a_in, OptTensor a_bias_in,
                                          const Tensor& b_in, const Tensor& index,
                                          OptTensor gates_in, double scaling, int64_t activation,
                                          bool residual) {
  const Adapters call(x_in, index, a_in, b_in, gates_in);
  const Engine& e = call.e;
  const AdapterSizes& n = call.n;
  const Tensor x = as(x_in, e.tile), a = as(a_in, e.tile), b = as(b_in, e.tile);
  const OptTensor bias = bias_in ? OptTensor(as(*bias_in, e.real)) : bias_in,
                  a_bias = a_bias_in ? OptTensor(as(*a_bias_in, e.real)) : a_bias_in,
                  gates = gates_in ? OptTensor(as(*gates_in, e.real)) : gates_in;
  const int64_t rows = x.size(0);
  const int64_t out = weight ? weight->size(0) : residual ? x.size(1) : n.out;
  Result y(e, x_in, {rows, out});
  Tensor pre = empty_like(x, {n.rows, n.slots, n.rank}, e.real), q = e.scratch(x, n.pairs * n.rank);
  if (pre.numel() > 0)
    std::memset(pre.mutable_data_ptr(), 0, size_t(n.pairs * n.rank * e.real_size));
  const void* xp = x.const_data_ptr();
  if (weight)
    SharedProduct{e, x, rows, x.size(1), out, true}(xp, *weight, data_or_null(bias), y.data(),
                                                    call.run.add_bias);
  else
    y.start(residual ? xp : nullptr);
  call.shrink(xp, n.in, {a.const_data_ptr(), n.rank * n.in, 1, n.in}, data_or_null(a_bias),
              pre.mutable_data_ptr());
  parallel_for(0, n.pairs, grain_for(n.rank * 8), [&](int64_t begin, int64_t end) {
    call.run.coefficients(pre.const_data_ptr(), data_or_null(gates), scaling, q.mutable_data_ptr(),
                          begin, end, n.rank, n.groups, int(activation));
  });
  call.expand(q.const_data_ptr(), {b.const_data_ptr(), n.rank * n.out, 1, n.rank}, y.data(), n.out);
  return {y.finish(), pre};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients adapter_linear_backward(const Tensor& dy_in, const Tensor& x_in, OptTensor weight,
                                  const Tensor& a_in, const Tensor& b_in, const Tensor& pre_in,
                                  const Tensor& index, OptTensor gates_in, double scaling,
                                  int64_t activation, bool residual, bool need_x, bool need_weight,
                                  bool need_bias, bool need_a, bool need_a_bias, bool need_b,
                                  bool need_gates) {
  const Adapters call(x_in, index, a_in, b_in, gates_in);
  const Engine& e = call.e;
  const AdapterSizes& n = call.n;
  const Tensor dy = as(dy_in, e.tile), x = as(x_in, e.tile), a = as(a_in, e.tile),
               b = as(b_in, e.tile), pre = dense(pre_in);
  const OptTensor gates = gates_in ? OptTensor(as(*gates_in, e.real)) : gates_in;
  const int64_t rows = x.size(0), in = x.size(1), out = dy.size(1);
  const void *dyp = dy.const_data_ptr(), *xp = x.const_data_ptr();
  using Shape = std::vector<int64_t>;
  const Shape none{0};
  const auto sums = [&](bool need, const Shape& sizes) {
    return empty_like(x, need ? sizes : none, e.real);
  };
  Result dx(e, x_in, need_x ? Shape{rows, in} : none);
  Tensor dw = weight ? empty_like(*weight, need_weight ? sizes_of(*weight) : none,
                                  e.real == ScalarType::Double ? e.real : weight->scalar_type())
                     : sums(false, none);
  Tensor dbias = sums(need_bias, {out}), da = sums(need_a, {n.experts, n.rank, n.in}),
         da_bias = sums(need_a_bias, {n.experts, n.rank}),
         db = sums(need_b, {n.experts, n.out, n.rank}),
         dgates = sums(need_gates, {n.rows, n.slots, n.groups});

  Tensor u = e.scratch(x, n.pairs * n.rank, true), v = e.scratch(x, n.pairs * n.rank),
         q = e.scratch(x, n.pairs * n.rank);
  std::memset(u.mutable_data_ptr(), 0, size_t(n.pairs * n.rank * e.real_size));
  call.shrink(dyp, n.out, {b.const_data_ptr(), n.rank * n.out, n.rank, 1}, nullptr,
              u.mutable_data_ptr());
  parallel_for(0, n.pairs, grain_for(n.rank * 16), [&](int64_t begin, int64_t end) {
    call.run.slopes(pre.const_data_ptr(), u.const_data_ptr(), data_or_null(gates), scaling,
                    v.mutable_data_ptr(), q.mutable_data_ptr(),
                    need_gates ? dgates.mutable_data_ptr() : nullptr, begin, end, n.rank, n.groups,
                    int(activation));
  });
  if (need_x) {
    if (weight)
      SharedProduct{e, x, rows, out, in, false}(dyp, *weight, nullptr, dx.data(),
                                                call.run.add_bias);
    else
      dx.start(residual ? dyp : nullptr);
    call.expand(v.const_data_ptr(), {a.const_data_ptr(), n.rank * n.in, n.in, 1}, dx.data(), n.in);
    dx.finish();
  }
  if (need_weight) shared_weight(e, x, dyp, xp, rows, out, in, dw);
  if (need_bias)
    tasks(ceil_div(out, kOuterColumns), [&](int64_t begin, int64_t end) {
      const int64_t c = begin * kOuterColumns;
      call.run.sum_columns(e.at(const_cast<void*>(dyp), c), rows, out,
                           e.at_real(dbias.mutable_data_ptr(), c),
                           std::min(end * kOuterColumns, out) - c);
    });
  if (need_a) call.outer(v.const_data_ptr(), xp, n.in, da.mutable_data_ptr(), false);
  if (need_b) call.outer(q.const_data_ptr(), dyp, n.out, db.mutable_data_ptr(), true);
  for (int64_t k = 0; need_a_bias && k < n.experts; ++k)
    call.run.sum_pairs(v.const_data_ptr(), call.by.order.data() + call.by.offsets[size_t(k)],
                       call.by.offsets[size_t(k) + 1] - call.by.offsets[size_t(k)],
                       e.at_real(da_bias.mutable_data_ptr(), k * n.rank), n.rank);
  return {dx.out, weight ? as(dw, weight->scalar_type()) : dw, dbias, da, da_bias, db, dgates};
}

}  // namespace
}  // namespace ensemble

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("adapter_linear", TORCH_BOX(&ensemble::adapter_linear));
  m.impl("adapter_linear_backward", TORCH_BOX(&ensemble::adapter_linear_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
