// K linear layers with a shared weight (BatchEnsemble), forward and backward:
//
//   y_bk = act(s_k * (W (r_k * x_bk)) + b_k)
//
// Operations: forward 2 B K I O. Backward twice that: once for dx, once for the member products
//   G_k = delta_k^T x_k   with delta = dy * act'(z)
// from which the rest is elementwise, K I O operations each (formulas in batch_ensemble.py):
//   dW += s_k r_k G_k     ds_k = row sums of G_k r_k W     dr_k = column sums of G_k s_k W
// G_k is made and used up a block at a time, in cache. For few batch items the elementwise part
// would outweigh the product: there h = W (r x) is computed again and dW is one contraction over
// all rows. Bytes, at least: forward x, W, y (and z for gelu, silu); backward dy, x, W, saved, dx,
// dW.
//
// Sums over the batch, members and blocks run in an order given by the shapes, never by the
// threads.
#include "tiles.h"

#ifdef SOLERA_FRONT
#include "batch_ensemble.h"

namespace solera {
namespace ensemble {
namespace {

// Up to kFewItems batch items take the contraction, if its operands stay under kFewBytes.
constexpr int64_t kFewItems = 8, kFewBytes = int64_t(64) << 20;
// Blocks of G_k, and about how many tasks the member products are cut into whatever the machine.
constexpr int64_t kBlockOut = 256, kBlockIn = 512, kTasks = 8;
// Rows of a tile beside a weight that is packed once: both then stay in the second-level cache.
constexpr int64_t kPackedRows = 128;
constexpr int64_t kFewBlock = 128;  // rows of dW a task makes by contraction

Engine engine_of(const Tensor& x) {
  Engine e(x);
  if (e.own && amx()) e.max_rows = kPackedRows;
  return e;
}

struct Sizes {
  int64_t items, members, in, out, rows;
  bool shared;
  Sizes(const Tensor& x, const Tensor& weight, int64_t members)
      : items(x.size(0)),
        members(members),
        in(weight.size(1)),
        out(weight.size(0)),
        rows(items * members),
        shared(x.dim() == 2) {}
  EnsembleTile tile(const Engine& e, int64_t begin, int64_t end, int64_t columns) const {
    return {begin, 1, end - begin, e.padded(end - begin), members, columns, shared};
  }
};

int64_t members_of(const Tensor& x, const OptTensor& r, const OptTensor& s, const OptTensor& bias) {
  if (x.dim() == 3) return x.size(1);
  for (const OptTensor* t : {&r, &s, &bias})
    if (t->has_value() && (*t)->dim() == 2) return (*t)->size(0);
  STD_TORCH_CHECK(false, "batch_ensemble: a shared x needs r, s or a bias per member");
}

std::tuple<Tensor, Tensor> forward(const Tensor& x_in, const Tensor& weight, const OptTensor& r_in,
                                   const OptTensor& s_in, const OptTensor& bias_in,
                                   int64_t activation, bool save) {
  const Tensor x = dense(x_in);
  const Engine e = engine_of(x);
  const Sizes n(x, weight, members_of(x, r_in, s_in, bias_in));
  const bool keep_z = save && activation >= 2;
  const std::vector<int64_t> shape{n.items, n.members, n.out};
  Tensor y = empty_like(x, shape), z = empty_like(x, keep_z ? shape : std::vector<int64_t>{0});
  if (n.rows == 0 || n.out == 0) return {y, z};
  const Parameter r(r_in, x, n.in, 1), s(s_in, x, n.out, 1), bias(bias_in, x, n.out, 0);
  const Tensor w = as(weight, e.tile);
  // A product with the transposed copy is up to twice as fast on few rows, and the same bits.
  Tensor turned;
  Right right = e.prepare(x, {w.const_data_ptr(), n.in, n.out, 1, n.in});
  if (n.rows >= 64 && !e.fixed && !right.is_packed) {
    turned = e.scratch(x, n.in * n.out);
    parallel_for(0, ceil_div(n.out, 16), 8, [&](int64_t begin, int64_t end) {
      e.run.transpose(w.const_data_ptr(), turned.mutable_data_ptr(), n.out, n.in, begin, end);
    });
    right.matrix = {turned.const_data_ptr(), n.in, n.out, n.out, 1};
  }
  const bool plain_x = !r.given && !n.shared && e.stored_as_tile;
  const bool plain_y = !s.given && !bias.given && activation == 0;
  const void* xp = x.const_data_ptr();
  void *yp = y.mutable_data_ptr(), *zp = keep_z ? z.mutable_data_ptr() : nullptr;
  for_tiles(e, x, n.rows, 1, n.in + n.out, [&](int64_t begin, int64_t end, void* scratch) {
    const EnsembleTile in = n.tile(e, begin, end, n.in), out = n.tile(e, begin, end, n.out);
    const bool whole = in.count == in.padded;
    Matrix left{scratch, in.padded, n.in, n.in, 1};
    if (whole && plain_x)
      left.data = e.at_stored(xp, begin * n.in);
    else
      e.run.scale(xp, r.rows, scratch, in);
    const bool in_place = whole && e.stored_as_tile;
    const EnsembleMatrix h{in_place ? e.at(yp, begin * n.out) : e.at(scratch, in.padded * n.in),
                           n.out};
    e.product(h, left, right);
    if (!(in_place && plain_y)) e.run.finish(h, s.rows, bias.rows, yp, zp, out, int(activation));
  });
  return {y, z};
}

Tensor batch_ensemble(const Tensor& x, const Tensor& weight, OptTensor r, OptTensor s,
                      OptTensor bias, int64_t activation) {
  return std::get<0>(forward(x, weight, r, s, bias, activation, false));
}
std::tuple<Tensor, Tensor> batch_ensemble_saved(const Tensor& x, const Tensor& weight, OptTensor r,
                                                OptTensor s, OptTensor bias, int64_t activation) {
  return forward(x, weight, r, s, bias, activation, true);
}

// What one backward call reads and where its results go; null where a result is not wanted.
struct Backward {
  const Engine e;
  const Sizes n;
  const Tensor& like;
  const void *dy, *x, *saved, *w;
  EnsembleRows r, s;
  int activation;
  void *dx, *dw, *dr, *ds,
      *db;  // dx of a shared x and the rest in the accumulator's type, db (K, O)

  EnsembleSpan span(int64_t k, int64_t begin, int64_t end) const {
    return {k, begin, end, n.members};
  }

  // dx = r * ((s * delta) W), tile by tile.
  void input() const {
    const Right right = e.prepare(like, {w, n.out, n.in, n.in, 1});
    for_tiles(e, like, n.rows, n.shared ? n.members : 1, n.in + n.out,
              [&](int64_t begin, int64_t end, void* scratch) {
                const EnsembleTile in = n.tile(e, begin, end, n.in),
                                   out = n.tile(e, begin, end, n.out);
                e.run.delta(dy, saved, s, scratch, out, activation);
                const bool in_place = in.count == in.padded && e.stored_as_tile && !n.shared;
                const EnsembleMatrix d{
                    in_place ? e.at(dx, begin * n.in) : e.at(scratch, in.padded * n.out), n.in};
                e.product(d, {scratch, out.padded, n.out, n.out, 1}, right);
                e.run.finish_dx(d, r, dx, in);
              });
  }

  // Only the bias wants a gradient.
  void bias() const {
    parallel_for(
        0, n.members, pass_grain(n.members, n.items * n.out), [&](int64_t begin, int64_t end) {
          for (int64_t k = begin; k < end; ++k)
            e.run.member_dots_delta(dy, saved, {nullptr, 0}, nullptr, e.at_real(db, k * n.out),
                                    span(k, 0, n.items), n.out, activation);
        });
  }

  // Everything at few batch items: r x, s delta, h and d = (s delta) W for all rows, then the sums.
  void few() const {
    const bool sums_s = ds != nullptr, sums_r = dr != nullptr;
    Tensor rx = e.scratch(like, dw || sums_s ? n.rows * n.in : 0),
           sd = e.scratch(like, n.rows * n.out);
    Tensor h = e.scratch(like, sums_s ? n.rows * n.out : 0),
           d = e.scratch(like, sums_r ? n.rows * n.in : 0);
    const Matrix forward{w, n.in, n.out, 1, n.in}, back{w, n.out, n.in, n.in, 1};
    const Right up = sums_s ? e.prepare(like, forward) : Right(forward),
                down = sums_r || dx ? e.prepare(like, back) : Right(back);
    for_tiles(
        e, like, n.rows, n.shared && dx ? n.members : 1, n.in + n.out,
        [&](int64_t begin, int64_t end, void* scratch) {
          const EnsembleTile in = n.tile(e, begin, end, n.in), out = n.tile(e, begin, end, n.out);
          const bool whole = in.count == in.padded;
          void* spare = e.at(scratch, in.padded * n.in);
          // A tile goes straight to its rows of `all`, or by way of scratch where its padding would
          // not fit.
          const auto place = [&](const Tensor& all, int64_t width, void* other) {
            return whole ? e.at(const_cast<void*>(all.const_data_ptr()), begin * width) : other;
          };
          const auto settle = [&](const Tensor& all, int64_t width, const void* from) {
            if (!whole)
              std::memcpy(e.at(const_cast<void*>(all.const_data_ptr()), begin * width), from,
                          size_t(in.count * width * e.tile_size));
          };
          if (dw || sums_s) {
            void* left = place(rx, n.in, scratch);
            e.run.scale(x, r, left, in);
            settle(rx, n.in, left);
            if (sums_s) {
              void* product = place(h, n.out, spare);
              e.product({product, n.out}, {left, in.padded, n.in, n.in, 1}, up);
              settle(h, n.out, product);
            }
          }
          void* left = place(sd, n.out, spare);
          e.run.delta(dy, saved, s, left, out, activation);
          settle(sd, n.out, left);
          if (!sums_r && !dx) return;
          void* product = sums_r ? place(d, n.in, scratch) : scratch;
          e.product({product, n.in}, {left, out.padded, n.out, n.out, 1}, down);
          if (sums_r) settle(d, n.in, product);
          if (dx) e.run.finish_dx({product, n.in}, r, dx, in);
        });
    const int64_t grain = pass_grain(n.members, n.items * (n.in + n.out));
    parallel_for(0, n.members, grain, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        if (ds || db)
          e.run.member_dots_delta(dy, saved, {h.mutable_data_ptr(), n.out},
                                  e.at_real(ds, k * n.out), e.at_real(db, k * n.out),
                                  span(k, 0, n.items), n.out, activation);
        if (dr)
          e.run.member_dots(x, n.shared, {d.mutable_data_ptr(), n.in}, e.at_real(dr, k * n.in),
                            span(k, 0, n.items), n.in);
      }
    });
    if (!dw) return;
    parallel_for(0, ceil_div(n.out, kFewBlock), 1, [&](int64_t begin, int64_t end) {
      Tensor part = e.scratch(like, e.tile == e.real ? 0 : kFewBlock * n.in);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t o = block * (kFewBlock);
        const int64_t count = o + kFewBlock < n.out ? kFewBlock : n.out - o;
        void* to = e.at_real(dw, o * n.in);
        void* product = e.tile == e.real ? to : part.mutable_data_ptr();
        e.product({product, n.in}, {e.at(sd.mutable_data_ptr(), o), count, n.rows, 1, n.out},
                  {rx.const_data_ptr(), n.rows, n.in, n.in, 1});
        if (e.tile == e.real) continue;
        std::memset(to, 0, size_t(count * n.in * e.real_size));
        e.run.add(product, to, count * n.in);
      }
    });
  }

  // The parameters' gradients from the member products, a block of G_k at a time.
  void members() const {
    const int64_t outs = n.out > 0 ? ceil_div(n.out, kBlockOut) : 1;
    const int64_t ins = n.in > 0 ? ceil_div(n.in, kBlockIn) : 1;
    const int64_t wanted = ceil_div(kTasks, outs * ins);
    const int64_t groups = dw ? (wanted < n.members ? wanted : n.members) : n.members;
    const int64_t per_group = ceil_div(n.members, groups);
    // Partial results where several tasks share a sum: dW by group of members, ds and dr by block.
    Tensor dw_parts = e.scratch(like, dw && groups > 1 ? groups * n.out * n.in : 0, true);
    Tensor ds_parts = e.scratch(like, ds && ins > 1 ? ins * n.members * n.out : 0, true);
    Tensor dr_parts = e.scratch(like, dr && outs > 1 ? outs * n.members * n.in : 0, true);
    void* dw_to = !dw || groups == 1 ? dw : dw_parts.mutable_data_ptr();
    void* ds_to = !ds || ins == 1 ? ds : ds_parts.mutable_data_ptr();
    void* dr_to = !dr || outs == 1 ? dr : dr_parts.mutable_data_ptr();
    parallel_for(0, groups * outs * ins, 1, [&](int64_t begin, int64_t end) {
      const int64_t chunk = n.items < kBatchChunk ? n.items : kBatchChunk;
      Tensor delta = e.scratch(like, chunk * kBlockOut),
             product = e.scratch(like, kBlockOut * kBlockIn);
      Tensor copy = e.scratch(like, e.stored_as_tile ? 0 : chunk * kBlockIn);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t group = task / (outs * ins), block = task % outs, slab = task / outs % ins;
        const int64_t o = block * kBlockOut, i = slab * kBlockIn;
        const int64_t height = n.out - o < kBlockOut ? n.out - o : kBlockOut;
        const int64_t width = n.in - i < kBlockIn ? n.in - i : kBlockIn;
        const EnsembleMatrix dw_block{e.at_real(dw_to, (group * n.out + o) * n.in + i), n.in};
        for (int64_t j = 0; dw && j < height; ++j)
          std::memset(e.at_real(dw_block.data, j * n.in), 0, size_t(width * e.real_size));
        const int64_t last =
            (group + 1) * per_group < n.members ? (group + 1) * per_group : n.members;
        for (int64_t k = group * per_group; k < last; ++k) {
          void* ds_row = e.at_real(ds_to, (slab * n.members + k) * n.out + o);
          void* dr_row = e.at_real(dr_to, (block * n.members + k) * n.in + i);
          void* db_row = slab == 0 ? e.at_real(db, k * n.out + o) : nullptr;
          if (ds_row) std::memset(ds_row, 0, size_t(height * e.real_size));
          if (dr_row) std::memset(dr_row, 0, size_t(width * e.real_size));
          if (db_row) std::memset(db_row, 0, size_t(height * e.real_size));
          for (int64_t b = 0; b < n.items; b += chunk) {
            const int64_t stop = b + chunk < n.items ? b + chunk : n.items;
            e.run.gather_delta(dy, saved, delta.mutable_data_ptr(), db_row, span(k, b, stop), n.out,
                               o, height, activation);
            const int64_t step = n.shared ? n.in : n.members * n.in;
            const void* from = e.at_stored(x, (n.shared ? b : b * n.members + k) * n.in + i);
            Matrix right{from, stop - b, width, step, 1};
            if (!e.stored_as_tile) {
              for (int64_t j = 0; j < stop - b; ++j)
                e.run.widen(e.at_stored(from, j * step), e.at(copy.mutable_data_ptr(), j * width),
                            width);
              right = {copy.const_data_ptr(), stop - b, width, width, 1};
            }
            e.product({product.mutable_data_ptr(), width},
                      {delta.const_data_ptr(), height, stop - b, 1, height}, right);
            e.run.combine(product.const_data_ptr(),
                          {e.at(const_cast<void*>(w), o * n.in + i), n.in}, dw_block,
                          e.at_real(const_cast<void*>(r.data), k * r.stride + i),
                          e.at_real(const_cast<void*>(s.data), k * s.stride + o), dr_row, ds_row,
                          height, width);
          }
        }
      }
    });
    if (dw && groups > 1) sum_parts(e, dw_parts.const_data_ptr(), dw, groups, n.out * n.in);
    if (ds && ins > 1) sum_parts(e, ds_parts.const_data_ptr(), ds, ins, n.members * n.out);
    if (dr && outs > 1) sum_parts(e, dr_parts.const_data_ptr(), dr, outs, n.members * n.in);
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_ensemble_backward(
    const Tensor& dy_in, const Tensor& x_in, const Tensor& weight, OptTensor r_in, OptTensor s_in,
    OptTensor saved_in, int64_t activation, bool bias_per_member, bool need_x, bool need_weight,
    bool need_r, bool need_s, bool need_bias) {
  const Tensor dy = dense(dy_in), x = dense(x_in);
  const Tensor saved = saved_in.has_value() ? dense(*saved_in) : dy;
  const Engine e = engine_of(x);
  const Sizes n(x, weight, dy.size(1));
  const Tensor w = as(weight, e.tile);
  const Parameter r(r_in, x, n.in, 1), s(s_in, x, n.out, 1);
  using Shape = std::vector<int64_t>;
  const Shape none{0}, per_member{n.members, n.out};
  Tensor dx = empty_like(x, need_x ? sizes_of(x) : none);
  Tensor dw = empty_like(x, need_weight ? Shape{n.out, n.in} : none, e.real);
  Tensor dr = empty_like(x, need_r ? Shape{n.members, n.in} : none, e.real);
  Tensor ds = empty_like(x, need_s ? per_member : none, e.real);
  Tensor db = empty_like(x,
                         !need_bias        ? none
                         : bias_per_member ? per_member
                                           : Shape{n.out},
                         e.real);
  const bool sum_x = n.shared && need_x, sum_bias = need_bias && !bias_per_member;
  Tensor dx_sum = sum_x && x.scalar_type() != e.real ? e.scratch(x, n.items * n.in, true) : dx;
  Tensor db_parts = sum_bias ? e.scratch(x, n.members * n.out, true) : db;
  if (sum_x) std::memset(dx_sum.mutable_data_ptr(), 0, size_t(n.items * n.in * e.real_size));
  const auto pointer = [](Tensor& t, bool need) { return need ? t.mutable_data_ptr() : nullptr; };
  const Backward call{e,
                      n,
                      x,
                      dy.const_data_ptr(),
                      x.const_data_ptr(),
                      saved.const_data_ptr(),
                      w.const_data_ptr(),
                      r.rows,
                      s.rows,
                      int(activation),
                      pointer(dx_sum, need_x),
                      pointer(dw, need_weight),
                      pointer(dr, need_r),
                      pointer(ds, need_s),
                      pointer(db_parts, need_bias)};
  const bool products = need_weight || need_r || need_s;
  const int64_t few_bytes = n.rows * 2 * (n.in + n.out) * e.tile_size;
  if (products && n.items <= kFewItems && few_bytes <= kFewBytes) {
    call.few();
  } else {
    if (need_x) call.input();
    if (products)
      call.members();
    else if (need_bias)
      call.bias();
  }
  if (sum_x && x.scalar_type() != e.real)
    e.run.round(dx_sum.const_data_ptr(), dx.mutable_data_ptr(), n.items * n.in);
  if (sum_bias) sum_parts(e, db_parts.const_data_ptr(), db.mutable_data_ptr(), n.members, n.out);
  return {dx, dw, dr, ds, db};
}

}  // namespace ensemble

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("batch_ensemble", TORCH_BOX(&ensemble::batch_ensemble));
  m.impl("batch_ensemble_saved", TORCH_BOX(&ensemble::batch_ensemble_saved));
  m.impl("batch_ensemble_backward", TORCH_BOX(&ensemble::batch_ensemble_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
