// K perceptrons of L layers, forward and backward:
//
//   h^0 = x_bk    z^l = W^l_k h^(l-1) + b^l_k    h^l = act_l(z^l)    y_bk = h^L, or y_b = sum_k w_k
//   h^L
//
// A task takes a tile of rows of one member through all the layers, so between two layers a tile
// lies in the second-level cache; forward writes one tensor a hidden layer (h, or z for gelu and
// silu), backward reads it once.
//
// Operations: forward 2 B K sum(I O), backward twice that. Bytes, at least: x, parameters, saved
// (B K sum(H)) and y once forward; dy, x, parameters, saved read and dx, dparameters written
// backward.
//
// Sums over the batch run tile by tile and piece by piece, over members group by group, all fixed
// by the shapes, never by the threads.
#include "float_product.h"
#include "mlp_rows.h"

namespace solera {
namespace SOLERA_ISA {

extern const MlpTables mlp_tables;
const MlpTables mlp_tables = {{
    Mlp<float, float>::table(),
    Mlp<double, double>::table(),
    Mlp<bf16, float>::table(),
    Mlp<f16, float>::table(),
    Mlp<bf16, bf16>::table(),
}};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
namespace solera {

SOLERA_PICK(MlpTables, mlp_tables)

namespace ensemble {
namespace {

using Tensors = std::vector<Tensor>;

constexpr int64_t kMlpRows = 512, kMlpTile = int64_t(1) << 16;  // rows and elements of a tile, most
constexpr int64_t kMlpFloatRows = 256;  // of products in registers: two tiles' rows lie in cache
constexpr int64_t kMlpTasks = 32;       // pieces of work there should be, whatever the machine
constexpr int64_t kMlpGroups = 16;      // of members, where a sum runs over them
constexpr int64_t kMlpSmall = int64_t(1) << 16;  // elements of W, most, for a FloatTable's product

// One call's shapes: layer l maps widths[l] features to widths[l + 1].
struct MlpPlan {
  const Engine e;
  const MlpTable& run;
  int64_t items, members, layers, widest, rows, tiles;
  std::vector<int64_t> widths, activations;
  // Products in registers, which take any width and either layout of W.
  bool shared, out_first, registers;
  // The same of float32 tiles; null where the library multiplies.
  const FloatTable* floats = nullptr;
  Tensors weights;
  std::vector<double> combine;  // of each member; empty if members are not combined

  // A library rounds bfloat16 products before their bias is added, so that hidden values near zero
  // change sign and gradients through relu err several times as much as torch's: bfloat16 tiles
  // only where products are rounded after it, or on request.
  static bool all_in_registers(const Tensor& x, const Tensors& weights, bool out_first) {
    if (x.scalar_type() != ScalarType::BFloat16) return false;
    int64_t terms = x.size(-1);
    for (const Tensor& w : weights) {
      if (!bfloat16_sums(terms)) return false;
      terms = w.size(out_first ? 1 : 2);
    }
    return true;
  }

  MlpPlan(const Tensor& x, const Tensors& weights_in, std::vector<int64_t> activations_in,
          bool out_first, const OptTensor& combine_in)
      : MlpPlan(x, weights_in, std::move(activations_in), out_first, combine_in,
                all_in_registers(x, weights_in, out_first)) {}

 private:
  MlpPlan(const Tensor& x, const Tensors& weights_in, std::vector<int64_t> activations_in,
          bool out_first, const OptTensor& combine_in, bool registers)
      : e(x, registers || asked_for_product("native") || asked_for_product("library")),
        run(pick_mlp_tables()
                .of[e.tile == ScalarType::BFloat16 ? 4 : static_cast<int>(dtype_of(x))]),
        items(x.size(0)),
        members(weights_in[0].size(0)),
        layers(int64_t(weights_in.size())),
        widths{x.size(-1)},
        activations(std::move(activations_in)),
        shared(x.dim() == 2),
        out_first(out_first),
        registers(registers) {
    widest = widths[0];
    for (const Tensor& w : weights_in) {
      weights.push_back(as(w, e.tile));
      widths.push_back(w.size(out_first ? 1 : 2));
      const int64_t step = e.columns(widths.back());
      if (step > widest) widest = step;
    }
    bool small = e.tile == ScalarType::Float && !asked_for_product("library");
    for (int64_t l = 0; l < layers; ++l) small = small && widths[l] * widths[l + 1] <= kMlpSmall;
    if (small && pick_float_table().multiply) floats = &pick_float_table();
    const int64_t fit = kMlpTile / (widest > 0 ? widest : 1);
    const int64_t most = floats ? kMlpFloatRows : kMlpRows;
    rows = fit >= most ? most : fit < 64 ? 64 : fit / kRowQuantum * kRowQuantum;
    if (rows > items) rows = items > 0 ? round_up(items, kRowQuantum) : kRowQuantum;
    if (e.fixed) rows = e.max_rows;
    tiles = ceil_div(items, rows);
    if (!combine_in.has_value()) return;
    const Tensor values = as(*combine_in, ScalarType::Double);
    const double* p = static_cast<const double*>(values.const_data_ptr());
    combine.assign(p, p + members);
  }

 public:
  int64_t out() const { return widths.back(); }
  int64_t last() const { return layers - 1; }
  // Hidden layers keep something for backward, the last only if it has an activation.
  bool keeps(int64_t layer) const { return layer < last() || activations[layer] != 0; }
  // Whether what rounding leaves of a layer's output goes into the next product too. With it z and
  // its sign are as exact as from float32 tiles; relu's derivative jumps, so that without it the
  // gradients of hidden layers err by some percent, as torch's do.
  bool splits(int64_t layer) const {
    return registers && layer < last() && activations[layer] < 2 && activations[layer + 1] == 1;
  }
  int64_t padded(int64_t count) const { return floats ? count : e.padded(count); }
  int64_t scratch_size() const { return e.padded(rows) * widest; }
  double weight_of(int64_t k) const { return combine.empty() ? 1.0 : combine[size_t(k)]; }

  const void* matrix(int64_t layer, int64_t k) const {
    const int64_t n = widths[layer] * widths[layer + 1];
    return e.at(const_cast<void*>(weights[layer].const_data_ptr()), k * n);
  }
  int64_t product_width(int64_t layer) const {
    return registers || floats ? widths[layer + 1] : e.columns(widths[layer + 1]);
  }
  bool widens(int64_t layer) const { return product_width(layer) != widths[layer + 1]; }
  // Rows from which a product with a transposed copy of W is faster by more than the copy; its bits
  // are the same.
  bool turns() const { return out_first && (floats || (rows >= 64 && !e.fixed)); }
  bool copies(int64_t layer) const { return !registers && (turns() || widens(layer)); }
  int64_t copies_size() const {
    int64_t n = 0;
    for (int64_t l = 0; l < layers; ++l)
      if (copies(l)) n += widths[l] * product_width(l);
    return n;
  }
  // Member k's copies of W as (I, product_width), one after another.
  void copy(int64_t k, void* to) const {
    for (int64_t l = 0; l < layers; ++l) {
      if (!copies(l)) continue;
      const int64_t in = widths[l], out = widths[l + 1], step = product_width(l);
      if (floats)
        floats->transpose((const float*)matrix(l, k), in, out, in, (float*)to, out);
      else if (out_first && step == out)
        e.run.transpose(matrix(l, k), to, out, in, 0, ceil_div(out, 16));
      else
        run.widen(matrix(l, k), to, in, out, step, out_first);
      to = e.at(to, in * step);
    }
  }
  // W of a layer as (I, O), for forward, or as (O, I), for the way back.
  Matrix right(int64_t layer, int64_t k, bool back) const {
    const int64_t in = widths[layer], out = widths[layer + 1];
    const Matrix m = out_first ? Matrix{matrix(layer, k), out, in, in, 1}
                               : Matrix{matrix(layer, k), in, out, out, 1};
    return back == out_first ? m : Matrix{m.data, m.columns, m.rows, m.column_step, m.row_step};
  }
  // Rows [begin, begin + count) of x as member k sees them: where they lie, or as a tile in
  // scratch.
  Matrix input(const void* x, int64_t k, int64_t begin, int64_t count, int64_t padded,
               void* scratch) const {
    const int64_t in = widths[0], step = shared ? in : members * in;
    const void* from = e.at_stored(x, (shared ? begin : begin * members + k) * in);
    if (e.stored_as_tile && count == padded) return {from, count, in, step, 1};
    run.gather(from, step, scratch, count, padded, in, 1.0);
    return {scratch, padded, in, in, 1};
  }
  // By `floats`.
  void multiply(const Matrix& a, const Matrix& b, const FloatResult& out,
                const FloatAhead& ahead = {}) const {
    const auto of = [](const Matrix& m) {
      return FloatMatrix{(const float*)m.data, m.rows, m.columns, m.row_step, m.column_step};
    };
    floats->multiply(of(a), of(b), out, ahead);
  }
};

std::tuple<Tensor, Tensors> mlp_forward(const Tensor& x_in, const Tensors& weights,
                                        const Tensors& biases_in, std::vector<int64_t> activations,
                                        bool out_first, const OptTensor& combine, bool save) {
  const Tensor x = dense(x_in);
  const MlpPlan n(x, weights, std::move(activations), out_first, combine);
  const Engine& e = n.e;
  const bool sums = !n.combine.empty();
  using Shape = std::vector<int64_t>;
  Tensor y = empty_like(x, sums ? Shape{n.items, n.out()} : Shape{n.items, n.members, n.out()});
  Tensors saved, biases;
  for (int64_t l = 0; save && l < n.layers; ++l)
    if (n.keeps(l)) saved.push_back(empty_like(x, {n.items * n.members * n.widths[l + 1]}));
  for (const Tensor& b : biases_in) biases.push_back(as(b, e.real));
  if (n.items == 0) return {y, saved};
  const int64_t groups = !sums ? n.members : n.members < kMlpGroups ? n.members : kMlpGroups;
  const int64_t of_group = ceil_div(n.members, groups);
  Tensor parts = e.scratch(x, sums ? groups * n.items * n.out() : 0, true);
  const void* xp = x.const_data_ptr();
  parallel_for(0, groups * n.tiles, 1, [&](int64_t first, int64_t end) {
    Tensor one = e.scratch(x, n.scratch_size()), two = e.scratch(x, n.scratch_size());
    Tensor rests = e.scratch(x, n.registers ? 2 * n.scratch_size() : 0);
    Tensor copies = e.scratch(x, n.copies_size());
    int64_t ready = -1;  // the member whose transposed weights are there
    for (int64_t t = first; t < end; ++t) {
      const int64_t group = t / n.tiles, begin = t % n.tiles * n.rows;
      const int64_t count = begin + n.rows < n.items ? n.rows : n.items - begin;
      const int64_t padded = n.padded(count), from = group * of_group;
      void* sum = e.at_real(parts.mutable_data_ptr(), (group * n.items + begin) * n.out());
      if (from >= n.members && n.out() > 0)
        std::memset(sum, 0, size_t(count * n.out() * e.real_size));
      for (int64_t k = from; k < from + of_group && k < n.members; ++k) {
        void *here = one.mutable_data_ptr(), *next = two.mutable_data_ptr();
        Matrix left = n.input(xp, k, begin, count, padded, here);
        if (ready != k) n.copy(k, copies.mutable_data_ptr());
        ready = k;
        void* w = copies.mutable_data_ptr();
        char* const result =
            static_cast<char*>(y.mutable_data_ptr()) + (begin * n.members + k) * n.out() * e.size;
        // Results in the tile's type are multiplied and finished where they belong.
        const bool ends = n.floats && !sums && e.stored_as_tile && n.activations[n.last()] < 2 &&
                          !(save && n.keeps(n.last()));
        for (int64_t l = 0; l < n.layers; ++l) {
          const int64_t width = n.widths[l + 1], row = k * n.items + begin;
          const int64_t in = n.widths[l], step = n.product_width(l);
          const void* bias =
              biases.empty() ? nullptr
                             : e.at_real(const_cast<void*>(biases[l].const_data_ptr()), k * width);
          void* keep = save && n.keeps(l)
                           ? static_cast<char*>(saved[l].mutable_data_ptr()) + row * width * e.size
                           : nullptr;
          // What is kept is what the next layer reads: multiplied and finished where it stays.
          const bool stays = keep && l < n.last() && e.stored_as_tile && n.activations[l] < 2 &&
                             count == padded && step == width;
          const bool at_end = ends && l == n.last();
          void* to = stays ? keep : at_end ? result : next;
          const Matrix right = n.copies(l) ? Matrix{w, in, step, step, 1} : n.right(l, k, false);
          if (n.copies(l)) w = e.at(w, in * step);
          const int activation = int(n.activations[l]);
          void* rest =
              n.splits(l) ? e.at(rests.mutable_data_ptr(), l % 2 * n.scratch_size()) : nullptr;
          const bool done =
              n.floats || (n.registers && e.product_with_bias({to, step}, left, right, bias,
                                                              activation == 1, rest));
          if (n.floats)
            n.multiply(left, right,
                       {(float*)to, at_end ? n.members * width : width, false, (const float*)bias,
                        activation == 1, nullptr, nullptr});
          else if (!done)
            e.product({to, step}, left, right);
          if (!done || activation > 1 || (keep && !stays))
            n.run.finish(to, step, done ? nullptr : bias, stays ? nullptr : keep, count, width,
                         activation);
          left = {to, padded, width, width, 1, done ? rest : nullptr};
          if (to == next) std::swap(here, next);
        }
        if (sums)
          n.run.blend(here, sum, count * n.out(), n.weight_of(k), k == from);
        else if (!ends)
          n.run.scatter(here, result, n.members * n.out(), count, n.out());
      }
    }
  });
  if (sums) {
    const int64_t size = n.items * n.out();
    Tensor total = x.scalar_type() == e.real ? y : e.scratch(x, size, true);
    sum_parts(e, parts.const_data_ptr(), total.mutable_data_ptr(), groups, size);
    if (x.scalar_type() != e.real) e.run.round(total.const_data_ptr(), y.mutable_data_ptr(), size);
  }
  return {y, saved};
}

Tensor ensemble_mlp(const Tensor& x, const Tensors& weights, const Tensors& biases,
                    std::vector<int64_t> activations, bool out_first, OptTensor combine) {
  return std::get<0>(
      mlp_forward(x, weights, biases, std::move(activations), out_first, combine, false));
}
std::tuple<Tensor, Tensors> ensemble_mlp_saved(const Tensor& x, const Tensors& weights,
                                               const Tensors& biases,
                                               std::vector<int64_t> activations, bool out_first,
                                               OptTensor combine) {
  return mlp_forward(x, weights, biases, std::move(activations), out_first, combine, true);
}

struct MlpBackward {
  const MlpPlan& n;
  const Tensor &dy, &x;
  const Tensors& saved;
  bool need_x, need_parameters;
  int64_t pieces;
  Tensors dw, db;  // (pieces, K, ...) sums
  void* dx;        // rows of members, or of a shared x the sums of groups of members

  const void* saved_rows(int64_t l, int64_t row) const {
    return n.e.at_stored(saved[l].const_data_ptr(), row * n.widths[l + 1]);
  }
  // What the tile that follows `row` kept of a layer.
  FloatAhead following(int64_t l, int64_t row) const {
    const int64_t end = n.items * n.members, begin = row + n.rows < end ? row + n.rows : end;
    const int64_t stop = begin + n.rows < end ? begin + n.rows : end;
    if (!n.keeps(l)) return {};
    return {saved_rows(l, begin), saved_rows(l, stop)};
  }

  void* bias_sums(int64_t l, int64_t k, int64_t piece, bool first) const {
    if (!need_parameters) return nullptr;
    void* row = n.e.at_real(db[l].mutable_data_ptr(), (piece * n.members + k) * n.widths[l + 1]);
    if (first && n.widths[l + 1] > 0) std::memset(row, 0, size_t(n.widths[l + 1] * n.e.real_size));
    return row;
  }
  // Whether a product in registers can multiply its result by the derivative of a layer's
  // activation.
  bool gates(int64_t l) const {
    return n.floats && n.activations[l] < 2 && (n.activations[l] == 0 || n.e.stored_as_tile);
  }

  // One tile of member k, from dy down to x. `first` tells the first of a sum over tiles.
  void step(int64_t k, int64_t begin, int64_t piece, bool first, void* here, void* next,
            void* input, void* part) const {
    const Engine& e = n.e;
    const int64_t count = begin + n.rows < n.items ? n.rows : n.items - begin;
    const int64_t padded = n.padded(count), row = k * n.items + begin, out = n.out();
    const bool sums = !n.combine.empty();
    n.run.gather(e.at_stored(dy.const_data_ptr(), (sums ? begin : begin * n.members + k) * out),
                 sums ? out : n.members * out, here, count, padded, out, n.weight_of(k));
    for (int64_t l = n.last(); l >= 0; --l) {
      const int64_t in = n.widths[l], width = n.widths[l + 1], numel = in * width;
      if (l == n.last() || !gates(l))
        n.run.delta(here, n.keeps(l) ? saved_rows(l, row) : nullptr, bias_sums(l, k, piece, first),
                    count, width, int(n.activations[l]));
      if (need_parameters) {
        Matrix h;
        if (l == 0) {
          h = n.input(x.const_data_ptr(), k, begin, count, count, input);
        } else if (e.stored_as_tile && n.activations[l - 1] < 2) {
          h = {saved_rows(l - 1, row), count, in, in, 1};
        } else {
          n.run.revive(saved_rows(l - 1, row), input, count * in, int(n.activations[l - 1]));
          h = {input, count, in, in, 1};
        }
        const Matrix h_turned{h.data, in, count, 1, h.row_step};
        void* to = e.at_real(dw[l].mutable_data_ptr(), (piece * n.members + k) * numel);
        const Matrix delta{here, count, width, width, 1}, turned{here, width, count, 1, width};
        const bool direct = (first || n.floats) && e.tile == e.real;
        void* product = direct ? to : part;
        if (n.floats)
          n.multiply(
              n.out_first ? turned : h_turned, n.out_first ? h : delta,
              {(float*)to, n.out_first ? in : width, !first, nullptr, false, nullptr, nullptr},
              following(l, row));
        else if (e.tile != e.real)
          e.accumulate(to, n.out_first ? turned : h_turned, n.out_first ? h : delta, first, part);
        else if (n.out_first)
          e.product({product, in}, turned, h);
        else
          e.product({product, width}, h_turned, delta);
        if (!direct && e.tile == e.real) n.run.blend(product, to, numel, 1.0, first);
      }
      if (l == 0 && !need_x) return;
      const Matrix delta{here, padded, width, width, 1}, w = n.right(l, k, true);
      if (!n.floats) {
        e.product({next, in}, delta, w);
      } else {
        if (!n.out_first)
          n.floats->transpose((const float*)w.data, width, in, width, (float*)part, in);
        const bool gated = l > 0 && gates(l - 1), relu = gated && n.activations[l - 1] == 1;
        n.multiply(delta, n.out_first ? w : Matrix{part, width, in, in, 1},
                   {(float*)next, in, false, nullptr, false,
                    relu ? (const float*)saved_rows(l - 1, row) : nullptr,
                    gated ? (float*)bias_sums(l - 1, k, piece, first) : nullptr});
      }
      std::swap(here, next);
    }
    const int64_t in = n.widths[0];
    if (!n.shared)
      n.run.scatter(here, static_cast<char*>(dx) + (begin * n.members + k) * in * e.size,
                    n.members * in, count, in);
    else
      n.run.blend(here, e.at_real(input_sum, begin * in), count * in, 1.0, first_member);
  }
  void* input_sum = nullptr;  // of the group at work
  bool first_member = true;
};

std::tuple<Tensor, Tensors, Tensors> ensemble_mlp_backward(const Tensor& dy_in, const Tensor& x_in,
                                                           const Tensors& weights,
                                                           const Tensors& saved,
                                                           std::vector<int64_t> activations,
                                                           bool out_first, OptTensor combine,
                                                           bool need_x, bool need_parameters) {
  const Tensor dy = dense(dy_in), x = dense(x_in);
  const MlpPlan n(x, weights, std::move(activations), out_first, combine);
  const Engine& e = n.e;
  const bool sums = n.shared && need_x;
  const int64_t groups = sums && n.members > kMlpGroups ? kMlpGroups : n.members;
  const int64_t of_group = ceil_div(n.members, groups);
  const int64_t wanted = ceil_div(kMlpTasks, groups);
  const int64_t pieces = n.tiles < 1 ? 1 : n.tiles < wanted ? n.tiles : wanted;
  Tensors dense_saved;
  for (const Tensor& t : saved) dense_saved.push_back(dense(t));
  Tensor dx = empty_like(x, need_x ? sizes_of(x) : std::vector<int64_t>{0});
  Tensor dx_parts = e.scratch(x, sums ? groups * n.items * n.widths[0] : 0, true);
  Tensors dweights, dbiases, dw, db;
  for (int64_t l = 0; need_parameters && l < n.layers; ++l) {
    dweights.push_back(empty_like(x, sizes_of(weights[l]), e.real));
    dbiases.push_back(empty_like(x, {n.members, n.widths[l + 1]}, e.real));
    dw.push_back(pieces == 1 ? dweights[l] : e.scratch(x, pieces * dweights[l].numel(), true));
    db.push_back(pieces == 1 ? dbiases[l] : e.scratch(x, pieces * dbiases[l].numel(), true));
    if (n.items > 0) continue;
    for (Tensor* t : {&dweights[l], &dbiases[l]})
      if (t->numel() > 0) std::memset(t->mutable_data_ptr(), 0, size_t(t->numel() * e.real_size));
  }
  int64_t largest = 0;
  for (int64_t l = 0; l < n.layers; ++l)
    if (n.widths[l] * n.widths[l + 1] > largest) largest = n.widths[l] * n.widths[l + 1];
  if (n.items > 0)
    parallel_for(0, groups * pieces, 1, [&](int64_t begin, int64_t end) {
      Tensor scratch = e.scratch(x, 3 * n.scratch_size() + largest);
      void* at[4];
      for (int64_t i = 0; i < 4; ++i)
        at[i] = e.at(scratch.mutable_data_ptr(), i * n.scratch_size());
      MlpBackward call{n,      dy,
                       x,      dense_saved,
                       need_x, need_parameters,
                       pieces, dw,
                       db,     need_x ? dx.mutable_data_ptr() : nullptr};
      for (int64_t t = begin; t < end; ++t) {
        const int64_t group = t / pieces, piece = t % pieces, from = group * of_group;
        const int64_t tile = piece * n.tiles / pieces, stop = (piece + 1) * n.tiles / pieces;
        call.input_sum = e.at_real(dx_parts.mutable_data_ptr(), group * n.items * n.widths[0]);
        for (int64_t k = from; k < from + of_group && k < n.members; ++k) {
          call.first_member = k == from;
          for (int64_t i = tile; i < stop; ++i)
            call.step(k, i * n.rows, piece, i == tile, at[0], at[1], at[2], at[3]);
        }
      }
    });
  for (int64_t l = 0; need_parameters && l < n.layers; ++l) {
    if (pieces > 1 && n.items > 0) {
      sum_parts(e, dw[l].const_data_ptr(), dweights[l].mutable_data_ptr(), pieces,
                dweights[l].numel());
      sum_parts(e, db[l].const_data_ptr(), dbiases[l].mutable_data_ptr(), pieces,
                dbiases[l].numel());
    }
    dweights[l] = as(dweights[l], weights[l].scalar_type());
  }
  if (sums && dx.numel() > 0) {
    const bool apart = x.scalar_type() != e.real;
    Tensor total = apart ? e.scratch(x, dx.numel(), true) : dx;
    const int64_t full = ceil_div(n.members, of_group);  // groups with a member
    sum_parts(e, dx_parts.const_data_ptr(), total.mutable_data_ptr(), full, dx.numel());
    if (apart) e.run.round(total.const_data_ptr(), dx.mutable_data_ptr(), dx.numel());
  }
  return {dx, dweights, dbiases};
}

}  // namespace
}  // namespace ensemble

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("ensemble_mlp", TORCH_BOX(&ensemble::ensemble_mlp));
  m.impl("ensemble_mlp_saved", TORCH_BOX(&ensemble::ensemble_mlp_saved));
  m.impl("ensemble_mlp_backward", TORCH_BOX(&ensemble::ensemble_mlp_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
