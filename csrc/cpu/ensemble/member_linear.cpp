// K linear layers with a weight each, forward and backward:
//
//   y_bk = act(W_k^T x_bk + b_k),   W (K, I, O)
//   dx_bk = W_k delta_bk     dW_k = sum_b x_bk delta_bk^T     db_k = sum_b delta_bk,   delta = dy *
//   act'(z)
//
// Operations: forward 2 B K I O, backward twice that. Bytes, at least: x, W and y once (and z for
// gelu, silu), then dy, x, W, saved, dx and dW once: for small batches the weights are all of it.
// Half-precision weights are widened a member at a time into the thread's own cache, never as a
// whole.
//
// Sums over the batch and (for a shared x) over members run in a fixed order.
#include "tiles.h"

#ifdef SOLERA_FRONT
namespace solera {
namespace ensemble {
namespace {

constexpr int64_t kMemberBlock = 256;  // columns of dW_k a task makes
constexpr int64_t kMemberTurned =
    48;  // below this many columns (O, I) is faster, transpose and all

struct MemberSizes {
  int64_t items, members, in, out, wide;  // wide: the columns that W has in the forward product
  bool shared;
  MemberSizes(const Engine& e, const Tensor& x, const Tensor& weight)
      : items(x.size(0)),
        members(weight.size(0)),
        in(weight.size(1)),
        out(weight.size(2)),
        wide(e.columns(out)),
        shared(x.dim() == 2) {}
  // Batch items [begin, end) of member k as a tile.
  EnsembleTile tile(const Engine& e, int64_t k, int64_t begin, int64_t end, int64_t columns) const {
    return {
        begin * members + k, members, end - begin, e.padded(end - begin), members, columns, shared};
  }
};

// The members' weights in the tile's type: as they are, or widened one at a time into scratch.
struct MemberWeights {
  Tensor owner;
  const EnsembleTable* widen = nullptr;
  int64_t numel, step, in, out, wide, size;
  // Rows of `wide` columns, zero from the weight's own on.
  MemberWeights(const Engine& e, const Tensor& weight, int64_t wide)
      : numel(weight.size(1) * weight.size(2)),
        in(weight.size(1)),
        out(weight.size(2)),
        wide(wide),
        size(e.tile_size) {
    const bool half = weight.element_size() == 2;
    owner = weight.scalar_type() == e.tile || (half && e.tile == ScalarType::Float)
                ? dense(weight)
                : as(weight, e.tile);
    if (owner.scalar_type() != e.tile) widen = &pick_ensemble_tables().of[dtype_of(owner)];
    step = numel * owner.element_size();
  }
  int64_t scratch_size() const { return (widen ? numel : 0) + (wide != out ? in * wide : 0); }
  const void* get(int64_t k, void* scratch) const {
    const void* at = static_cast<const char*>(owner.const_data_ptr()) + k * step;
    if (widen) {
      widen->widen(at, scratch, numel);
      at = scratch;
    }
    if (wide == out) return at;
    char* copy = static_cast<char*>(scratch) + (widen ? numel * size : 0);
    std::memset(copy, 0, size_t(in * wide * size));
    for (int64_t i = 0; i < in; ++i)
      std::memcpy(copy + i * wide * size, static_cast<const char*>(at) + i * out * size,
                  size_t(out * size));
    return copy;
  }
};

// Calls body(k, begin, end, weight of k, scratch) for tiles of batch items of every member, in
// parallel.
template <class F>
void for_member_tiles(const Engine& e, const Tensor& like, const MemberSizes& n,
                      const MemberWeights& w, const F& body) {
  if (n.items == 0) return;
  const int64_t threads = int64_t(torch::stable::get_num_threads());
  const int64_t pieces = n.members >= 2 * threads ? 1 : ceil_div(2 * threads, n.members);
  const int64_t tiles = round_up(ceil_div(n.items, e.max_rows), pieces);
  const int64_t tile = e.fixed ? e.max_rows : round_up(ceil_div(n.items, tiles), kRowQuantum);
  const int64_t count = ceil_div(n.items, tile);
  parallel_for(0, n.members * count, 1, [&](int64_t begin, int64_t end) {
    Tensor weight = e.scratch(like, w.scratch_size());
    Tensor scratch = e.scratch(like, e.padded(tile) * (n.in + n.wide));
    const void* ready = nullptr;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t k = t / count, first = t % count * tile;
      if (t == begin || t % count == 0) ready = w.get(k, weight.mutable_data_ptr());
      body(k, first, first + tile < n.items ? first + tile : n.items, ready,
           scratch.mutable_data_ptr());
    }
  });
}

std::tuple<Tensor, Tensor> forward(const Tensor& x_in, const Tensor& weight,
                                   const OptTensor& bias_in, int64_t activation, bool save) {
  const Tensor x = dense(x_in);
  const Engine e(x);
  const MemberSizes n(e, x, weight);
  const bool keep_z = save && activation >= 2;
  const std::vector<int64_t> shape{n.items, n.members, n.out};
  Tensor y = empty_like(x, shape), z = empty_like(x, keep_z ? shape : std::vector<int64_t>{0});
  if (y.numel() == 0) return {y, z};
  const Parameter bias(bias_in, x, n.out, 0), ones(std::nullopt, x, n.in > n.out ? n.in : n.out, 1);
  const MemberWeights w(e, weight, n.wide);
  const void* xp = x.const_data_ptr();
  void *yp = y.mutable_data_ptr(), *zp = keep_z ? z.mutable_data_ptr() : nullptr;
  const bool plain_y = !bias.given && activation == 0;
  for_member_tiles(
      e, x, n, w, [&](int64_t k, int64_t begin, int64_t end, const void* wk, void* scratch) {
        const EnsembleTile in = n.tile(e, k, begin, end, n.in),
                           out = n.tile(e, k, begin, end, n.out);
        const bool widened = n.wide != n.out;
        const bool in_place = in.count == in.padded && e.stored_as_tile;
        Matrix left{scratch, in.padded, n.in, n.in, 1};
        if (in_place) {
          left.data = e.at_stored(xp, (n.shared ? begin : in.base) * n.in);
          left.row_step = n.shared ? n.in : n.members * n.in;
        } else {
          e.run.scale(xp, ones.rows, scratch, in);
        }
        const bool there = in_place && !widened;
        const EnsembleMatrix h{there ? e.at(yp, out.base * n.out) : e.at(scratch, in.padded * n.in),
                               there ? n.members * n.out : n.wide};
        e.product(h, left, {wk, n.in, n.wide, n.wide, 1});
        if (!(there && plain_y))
          e.run.finish(h, ones.rows, bias.rows, yp, zp, out, int(activation));
      });
  return {y, z};
}

Tensor member_linear(const Tensor& x, const Tensor& weight, OptTensor bias, int64_t activation) {
  return std::get<0>(forward(x, weight, bias, activation, false));
}
std::tuple<Tensor, Tensor> member_linear_saved(const Tensor& x, const Tensor& weight,
                                               OptTensor bias, int64_t activation) {
  return forward(x, weight, bias, activation, true);
}

struct MemberBackward {
  const Engine e;
  const MemberSizes n;
  const Tensor& like;
  const void *dy, *x, *saved;
  EnsembleRows ones;
  int activation;

  // One tile: delta, then its product with W_k^T.
  void input_tile(int64_t k, int64_t begin, int64_t end, const void* wk, void* scratch,
                  void* dx) const {
    const EnsembleTile in = n.tile(e, k, begin, end, n.in), out = n.tile(e, k, begin, end, n.out);
    e.run.delta(dy, saved, ones, scratch, out, activation);
    const bool in_place = in.count == in.padded && e.stored_as_tile && !n.shared;
    const EnsembleMatrix d{in_place ? e.at(dx, in.base * n.in) : e.at(scratch, in.padded * n.out),
                           in_place ? n.members * n.in : n.in};
    e.product(d, {scratch, out.padded, n.out, n.out, 1}, {wk, n.out, n.in, 1, n.out});
    if (!in_place) e.run.finish_dx(d, ones, dx, in);
  }

  void input(const Tensor& weight, void* dx) const {
    if (!n.shared) {
      const MemberWeights w(e, weight, n.out);
      for_member_tiles(e, like, n, w,
                       [&](int64_t k, int64_t begin, int64_t end, const void* wk, void* scratch) {
                         input_tile(k, begin, end, wk, scratch, dx);
                       });
      return;
    }
    const Tensor all = as(weight, e.tile);
    for_tiles(e, like, n.items, 1, n.in + n.out, [&](int64_t begin, int64_t end, void* scratch) {
      for (int64_t k = 0; k < n.members; ++k)
        input_tile(k, begin, end, e.at(const_cast<void*>(all.const_data_ptr()), k * n.in * n.out),
                   scratch, dx);
    });
  }

  // dW_k and db_k; dW is written in the weight's type.
  void parameters(Tensor* dweight, void* db) const {
    const int64_t blocks = n.out > 0 ? ceil_div(n.out, kMemberBlock) : 1;
    const bool same = dweight && dweight->scalar_type() == e.real;
    const EnsembleTable& store = pick_ensemble_tables().of[dweight ? dtype_of(*dweight) : kFloat32];
    parallel_for(0, n.members * blocks, 1, [&](int64_t begin, int64_t end) {
      const int64_t chunk = n.items < kBatchChunk ? n.items : kBatchChunk;
      Tensor delta = e.scratch(like, chunk * kMemberBlock);
      Tensor copy = e.scratch(like, e.stored_as_tile ? 0 : chunk * n.in);
      Tensor part = e.scratch(like, n.in * kMemberBlock),
             sum = e.scratch(like, n.in * kMemberBlock, true),
             turned = e.scratch(like, n.out < kMemberTurned ? n.in * n.out : 0, true);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t k = task / blocks, o = task % blocks * kMemberBlock;
        const int64_t width = n.out - o < kMemberBlock ? n.out - o : kMemberBlock;
        void* db_row = e.at_real(db, k * n.out + o);
        if (db_row) std::memset(db_row, 0, size_t(width * e.real_size));
        const bool direct = e.tile == e.real && n.items <= chunk;  // the only product is the sum
        const bool turns = width > 1 && n.out < kMemberTurned;
        const bool writes = direct && same && !turns;  // to its place
        if (!direct) std::memset(sum.mutable_data_ptr(), 0, size_t(n.in * width * e.real_size));
        for (int64_t b = 0; b < n.items || b == 0; b += chunk) {
          const int64_t stop = b + chunk < n.items ? b + chunk : n.items;
          e.run.gather_delta(dy, saved, delta.mutable_data_ptr(), db_row, {k, b, stop, n.members},
                             n.out, o, width, activation);
          if (dweight) {
            const int64_t step = n.shared ? n.in : n.members * n.in;
            const void* from = e.at_stored(x, (n.shared ? b : b * n.members + k) * n.in);
            Matrix rows{from, stop - b, n.in, step, 1};
            if (!e.stored_as_tile) {
              for (int64_t j = 0; j < stop - b; ++j)
                e.run.widen(e.at_stored(from, j * step), e.at(copy.mutable_data_ptr(), j * n.in),
                            n.in);
              rows = {copy.const_data_ptr(), stop - b, n.in, n.in, 1};
            }
            EnsembleMatrix to{direct ? sum.mutable_data_ptr() : part.mutable_data_ptr(), width};
            if (writes) to = {e.at_real(dweight->mutable_data_ptr(), k * n.in * n.out + o), n.out};
            if (turns)
              e.product({to.data, n.in}, {delta.const_data_ptr(), width, stop - b, 1, width}, rows);
            else
              e.product(to, {rows.data, n.in, stop - b, 1, rows.row_step},
                        {delta.const_data_ptr(), stop - b, width, width, 1});
            if (!direct) e.run.add(part.const_data_ptr(), sum.mutable_data_ptr(), n.in * width);
          }
          if (chunk == 0) break;
        }
        if (!dweight || writes) continue;
        void* found = sum.mutable_data_ptr();
        if (turns) {
          e.real_run.transpose(found, turned.mutable_data_ptr(), width, n.in, 0,
                               ceil_div(width, 16));
          found = turned.mutable_data_ptr();
        }
        for (int64_t i = 0; i < n.in; ++i)
          store.round(e.at_real(found, i * width),
                      static_cast<char*>(dweight->mutable_data_ptr()) +
                          ((k * n.in + i) * n.out + o) * dweight->element_size(),
                      width);
      }
    });
  }
};

std::tuple<Tensor, Tensor, Tensor> member_linear_backward(const Tensor& dy_in, const Tensor& x_in,
                                                          const Tensor& weight, OptTensor saved_in,
                                                          int64_t activation, bool bias_per_member,
                                                          bool need_x, bool need_weight,
                                                          bool need_bias) {
  const Tensor dy = dense(dy_in), x = dense(x_in);
  const Tensor saved = saved_in.has_value() ? dense(*saved_in) : dy;
  const Engine e(x);
  const MemberSizes n(e, x, weight);
  const Parameter ones(std::nullopt, x, n.in > n.out ? n.in : n.out, 1);
  using Shape = std::vector<int64_t>;
  const Shape none{0}, per_member{n.members, n.out};
  // With float64 x the sums are float64 whatever the weight's type, and rounded at the end.
  const ScalarType dw_type = e.real == ScalarType::Double ? e.real : weight.scalar_type();
  Tensor dx = empty_like(x, need_x ? sizes_of(x) : none);
  Tensor dw = empty_like(weight, need_weight ? sizes_of(weight) : none, dw_type);
  Tensor db = empty_like(x,
                         !need_bias        ? none
                         : bias_per_member ? per_member
                                           : Shape{n.out},
                         e.real);
  const MemberBackward call{e,
                            n,
                            x,
                            dy.const_data_ptr(),
                            x.const_data_ptr(),
                            saved.const_data_ptr(),
                            ones.rows,
                            int(activation)};
  if (need_x) {
    const bool sum = n.shared, apart = sum && x.scalar_type() != e.real;
    Tensor to = apart ? e.scratch(x, n.items * n.in, true) : dx;
    if (sum) std::memset(to.mutable_data_ptr(), 0, size_t(n.items * n.in * e.real_size));
    call.input(weight, to.mutable_data_ptr());
    if (apart) e.run.round(to.const_data_ptr(), dx.mutable_data_ptr(), n.items * n.in);
  }
  const bool sum_bias = need_bias && !bias_per_member;
  Tensor db_parts = sum_bias ? e.scratch(x, n.members * n.out, true) : db;
  if (need_weight || need_bias)
    call.parameters(need_weight ? &dw : nullptr, need_bias ? db_parts.mutable_data_ptr() : nullptr);
  if (sum_bias) sum_parts(e, db_parts.const_data_ptr(), db.mutable_data_ptr(), n.members, n.out);
  return {dx, as(dw, weight.scalar_type()), db};
}

}  // namespace
}  // namespace ensemble

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("member_linear", TORCH_BOX(&ensemble::member_linear));
  m.impl("member_linear_saved", TORCH_BOX(&ensemble::member_linear_saved));
  m.impl("member_linear_backward", TORCH_BOX(&ensemble::member_linear_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
