// A network of layers with weights shared by K members, forward and backward, by tiles of rows:
//
//   u_l = r_l a_{l-1},   h_l = W_l u_l,   z_l = s_l h_l + b_l,   a_l = act(z_l) times a mask
//
// Operations: forward 2 B K I O a layer. Backward twice that (d = e W and dW = e^T u), less d of
// the first layer where only dr_1 would want it: there the member products of batch_ensemble.cpp
// give dW_1 and dr_1 together. Everything else is elementwise on tiles in cache, from the row
// formulas in batch_ensemble_mlp.py. Bytes, at least: forward x, the weights, y, and h of each
// layer once; backward dy, h of each layer, x, the weights, their gradients.
//
// Sums over rows are kept by chunks of rows whose number depends on the shapes only, and added in
// order: the thread count changes no bit.
#include "network_rows.h"

namespace solera {

namespace SOLERA_ISA {

extern const NetworkTables network_tables;
const NetworkTables network_tables = {{
    Network<float, float>::table(),
    Network<double, double>::table(),
    Network<bf16, float>::table(),
    Network<f16, float>::table(),
    Network<bf16, bf16>::table(),
}};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "batch_ensemble.h"

namespace solera {

SOLERA_PICK(NetworkTables, network_tables)

namespace ensemble {
namespace {

// Backward is cut into at most so many chunks of rows, each of at least kChunkRows.
constexpr int64_t kChunks = 8, kChunkRows = 256;
// From so many batch items on, the first layer's dr and dW come from member products.
constexpr int64_t kMemberItems = 64;

using Sizes = std::vector<int64_t>;

struct Layer {
  int64_t in, out;
  Tensor weight;  // in the tile's type
  OptTensor r_in, s_in, bias_in;
  Parameter r, s, bias;
  NetworkLayer rows;
};

struct NetworkCall {
  const Engine e;
  const NetworkTable& run;
  const Tensor x;
  int64_t items, members, rows, widest;
  bool shared;
  std::vector<Layer> layers;
  std::vector<Tensor> parameters;

  NetworkCall(const Tensor& x_in, const std::vector<Tensor>& parameters_in,
              const std::vector<int64_t>& kinds, double dropout, const OptTensor& seed)
      : e(x_in),
        run(pick_network_tables()
                .of[x_in.scalar_type() == ScalarType::BFloat16 && e.tile == ScalarType::BFloat16
                        ? 4
                        : int(dtype_of(x_in))]),
        x(dense(x_in)),
        items(x.size(0)),
        members(x.dim() == 3 ? x.size(1) : 0),
        widest(x.size(x.dim() - 1)),
        shared(x.dim() == 2),
        parameters(parameters_in) {
    const uint32_t cut = seed.has_value() ? uint32_t(dropout * 65536 + 0.5) : 0;
    const double scale = cut < 65536 ? 65536.0 / (65536 - double(cut)) : 0;
    const uint64_t key =
        seed.has_value() ? *static_cast<const uint64_t*>(dense(*seed).const_data_ptr()) : 0;
    size_t next = 0;
    for (size_t l = 0; l < kinds.size(); ++l) {
      const auto take = [&](int bit) {
        return kinds[l] & bit ? OptTensor(parameters.at(next++)) : std::nullopt;
      };
      const Tensor& weight = parameters.at(next++);
      const OptTensor r = take(8), s = take(16), bias = take(32);
      const int64_t in = weight.size(1), out = weight.size(0);
      for (const OptTensor* t : {&r, &s, &bias})
        if (!members && t->has_value() && (*t)->dim() == 2) members = (*t)->size(0);
      layers.push_back({in,
                        out,
                        as(weight, e.tile),
                        r,
                        s,
                        bias,
                        Parameter(r, x, in, 1),
                        Parameter(s, x, out, 1),
                        Parameter(bias, x, out, 0),
                        {}});
      Layer& layer = layers.back();
      layer.rows = {
          layer.s.rows, layer.bias.rows, int(kinds[l] & 7), {key, uint32_t(l), cut, scale}, out};
      widest = widest > out ? widest : out;
    }
    STD_TORCH_CHECK(members > 0, "batch_ensemble_mlp: a shared x needs an r, s or bias per member");
    STD_TORCH_CHECK(next == parameters.size() && !layers.empty(),
                    "batch_ensemble_mlp: kinds and parameters do not fit");
    rows = items * members;
  }

  EnsembleTile tile(int64_t begin, int64_t end) const {
    return {begin, 1, end - begin, e.padded(end - begin), members, layers[0].in, shared};
  }
  NetworkSpan span(int64_t begin, int64_t end, void* mask) const {
    return {begin, end - begin, e.padded(end - begin), members, mask};
  }
  Tensor mask_row() const { return e.scratch(x, widest, true); }

  std::tuple<Tensor, std::vector<Tensor>> forward(bool save) const {
    std::vector<Tensor> products;
    for (const Layer& layer : layers)
      if (save) products.push_back(empty_like(x, Sizes{items, members, layer.out}));
    Tensor y = empty_like(x, Sizes{items, members, layers.back().out});
    // A product with the transposed copy is up to twice as fast on few rows, and the same bits.
    std::vector<Tensor> turned;
    std::vector<Right> right;
    for (const Layer& layer : layers) {
      right.push_back(
          e.prepare(x, {layer.weight.const_data_ptr(), layer.in, layer.out, 1, layer.in}));
      if (rows < 64 || e.fixed || right.back().is_packed) continue;
      turned.push_back(e.scratch(x, layer.in * layer.out));
      void* to = turned.back().mutable_data_ptr();
      parallel_for(0, ceil_div(layer.out, 16), 8, [&](int64_t begin, int64_t end) {
        e.run.transpose(layer.weight.const_data_ptr(), to, layer.out, layer.in, begin, end);
      });
      right.back().matrix = {to, layer.in, layer.out, layer.out, 1};
    }
    for_tiles(e, x, rows, 1, 2 * widest, [&](int64_t begin, int64_t end, void* scratch) {
      const Tensor mask = mask_row();
      const NetworkSpan at = span(begin, end, const_cast<void*>(mask.const_data_ptr()));
      void *u = scratch, *spare = e.at(scratch, at.padded * widest);
      e.run.scale(x.const_data_ptr(), layers[0].r.rows, u, tile(begin, end));
      for (size_t l = 0; l < layers.size(); ++l) {
        const Layer& layer = layers[l];
        const bool last = l + 1 == layers.size();
        void* kept = save ? const_cast<void*>(products[l].const_data_ptr()) : nullptr;
        const bool in_place = save && e.stored_as_tile && at.count == at.padded;
        const EnsembleMatrix h{in_place ? e.at(kept, begin * layer.out) : spare, layer.out};
        e.product(h, {u, at.padded, layer.in, layer.in, 1}, right[l]);
        run.leave(h, in_place ? nullptr : kept, layer.rows, last ? nullptr : &layers[l + 1].r.rows,
                  last ? const_cast<void*>(y.const_data_ptr()) : u, at);
      }
    });
    return {y, products};
  }
};

struct NetworkBackward {
  const NetworkCall& call;
  const void* dy;
  const std::vector<Tensor>& products;
  // What is asked for, by layer: sums of each chunk, null where a gradient is not.
  struct Wanted {
    void *dw, *dr, *ds, *db;
  };
  std::vector<Wanted> wanted;
  std::vector<Right> back;  // the weights of the products e W, those that are made
  size_t lowest;            // the first layer that anything is asked of
  void *dx, *bare;  // rows of x, or sums for a shared x; rows of the first layer's delta, or null

  // Rows [begin, end) of one chunk.
  void rows(int64_t chunk, int64_t begin, int64_t end, void* const* tiles, void* part,
            void* mask) const {
    const Engine& e = call.e;
    const int64_t K = call.members;
    const auto sums = [&](void* p, int64_t n) { return e.at_real(p, chunk * n); };
    const int64_t step = e.max_rows;
    for (int64_t row = begin; row < end; row += step) {
      const NetworkSpan at = call.span(row, row + step < end ? row + step : end, mask);
      void *next = tiles[0], *here = tiles[1], *d = tiles[2], *u = tiles[3];
      for (size_t l = call.layers.size(); l-- > lowest;) {
        const Layer& layer = call.layers[l];
        const Wanted& own = wanted[l];
        const bool top = l + 1 == call.layers.size();
        const bool last = l == lowest;
        void* rest = last && l == 0 ? bare : nullptr;
        const Wanted* above = top ? nullptr : &wanted[l + 1];
        const int64_t n = K * layer.out;
        call.run.enter(dy, {d, layer.out}, top ? nullptr : &call.layers[l + 1].r.rows,
                       products[l].const_data_ptr(), layer.rows, rest ? nullptr : here,
                       above && above->dw ? u : nullptr, rest,
                       {above ? sums(above->dr, n) : nullptr, sums(own.ds, n), sums(own.db, n)},
                       at);
        if (above && above->dw) weight_gradient(l + 1, chunk, row == begin, next, u, at, part);
        std::swap(next, here);  // next: e of layer l
        if (l > lowest || (l == 0 && !rest && (dx || own.dr)))
          e.product({d, layer.in}, {next, at.padded, layer.out, layer.out, 1}, back[l]);
      }
      if (lowest > 0) {
        // The operand of the lowest layer is the output of one that wants nothing.
        const Layer& layer = call.layers[lowest - 1];
        const Wanted& own = wanted[lowest];
        if (!own.dw && !own.dr) continue;
        if (own.dr)
          e.product({d, layer.out},
                    {next, at.padded, call.layers[lowest].out, call.layers[lowest].out, 1},
                    back[lowest]);
        call.run.enter(dy, {d, layer.out}, &call.layers[lowest].r.rows,
                       products[lowest - 1].const_data_ptr(), layer.rows, nullptr,
                       own.dw ? u : nullptr, nullptr,
                       {sums(own.dr, K * layer.out), nullptr, nullptr}, at);
        if (own.dw) weight_gradient(lowest, chunk, row == begin, next, u, at, part);
        continue;
      }
      if (bare) continue;
      const Wanted& own = wanted[0];
      const int64_t in = call.layers[0].in;
      if (!own.dw && !own.dr && !dx) continue;
      call.run.input({d, in}, call.layers[0].r.rows, call.x.const_data_ptr(), call.shared,
                     own.dw ? u : nullptr, sums(own.dr, K * in), dx, in, at);
      if (own.dw) weight_gradient(0, chunk, row == begin, next, u, at, part);
    }
  }

  void weight_gradient(size_t l, int64_t chunk, bool first, const void* e_tile, const void* u,
                       const NetworkSpan& at, void* part) const {
    const Layer& layer = call.layers[l];
    call.e.accumulate(call.e.at_real(wanted[l].dw, chunk * layer.out * layer.in),
                      {e_tile, layer.out, at.count, 1, layer.out},
                      {u, at.count, layer.in, layer.in, 1}, first, part);
  }
};

Tensor batch_ensemble_mlp(const Tensor& x, const std::vector<Tensor>& parameters,
                          const std::vector<int64_t>& kinds, double dropout, OptTensor seed) {
  return std::get<0>(NetworkCall(x, parameters, kinds, dropout, seed).forward(false));
}

std::tuple<Tensor, std::vector<Tensor>> batch_ensemble_mlp_saved(
    const Tensor& x, const std::vector<Tensor>& parameters, const std::vector<int64_t>& kinds,
    double dropout, OptTensor seed) {
  return NetworkCall(x, parameters, kinds, dropout, seed).forward(true);
}

std::tuple<Tensor, std::vector<Tensor>> batch_ensemble_mlp_backward(
    const Tensor& dy_in, const Tensor& x, const std::vector<Tensor>& parameters,
    const std::vector<Tensor>& products_in, const std::vector<int64_t>& kinds, double dropout,
    OptTensor seed, bool need_x, std::vector<bool> needs) {
  const NetworkCall call(x, parameters, kinds, dropout, seed);
  const Engine& e = call.e;
  const Tensor dy = dense(dy_in);
  std::vector<Tensor> products, grads;
  for (const Tensor& t : products_in) products.push_back(dense(t));
  STD_TORCH_CHECK(needs.size() == parameters.size() && products.size() == kinds.size(),
                  "batch_ensemble_mlp_backward: wrong number of needs or products");
  for (size_t p = 0; p < parameters.size(); ++p)
    grads.push_back(empty_like(call.x, needs[p] ? sizes_of(parameters[p]) : Sizes{0}, e.real));
  Tensor dx = empty_like(call.x, need_x ? sizes_of(call.x) : Sizes{0});

  const int64_t unit = call.shared && need_x ? call.members : 1;
  int64_t chunk = ceil_div(call.rows, kChunks);
  chunk = round_up(chunk > kChunkRows ? chunk : kChunkRows, kRowQuantum);
  chunk = round_up(chunk, unit);
  const int64_t chunks = call.rows > 0 ? ceil_div(call.rows, chunk) : 0;

  // One sum of every gradient a chunk; with a single chunk the gradient itself.
  struct Sum {
    Tensor parts;
    size_t parameter;
    int64_t count, elements;
  };
  std::vector<Sum> all;
  NetworkBackward backward{call, dy.const_data_ptr(), products, {},
                           {},   call.layers.size(),  nullptr,  nullptr};
  size_t p = 0;
  const bool member_products =
      !need_x && call.items >= kMemberItems && call.layers[0].r.given && needs[1];
  for (size_t l = 0; l < call.layers.size(); ++l) {
    const Layer& layer = call.layers[l];
    const auto want = [&](bool given, int64_t elements, int64_t width, bool zeroed) -> void* {
      if (!given) return nullptr;
      const size_t own = p++;
      if (!needs[own]) return nullptr;
      if (backward.lowest > l) backward.lowest = l;
      // A bias that the members share is summed over them as well.
      const int64_t per_chunk = elements > 0 ? width / elements : 1;
      Tensor to =
          chunks == 1 && per_chunk == 1 ? grads[own] : e.scratch(call.x, chunks * width, true);
      if (zeroed && chunks * width > 0)
        std::memset(to.mutable_data_ptr(), 0, size_t(chunks * width * e.real_size));
      all.push_back({to, own, chunks * per_chunk, elements});
      return to.mutable_data_ptr();
    };
    const int64_t K = call.members;
    const bool apart = l == 0 && member_products;  // dW and dr of this layer are made below
    if (apart) {
      p += 2;
      backward.lowest = 0;
    }
    void* dw = apart ? nullptr : want(true, layer.out * layer.in, layer.out * layer.in, false);
    void* dr = apart ? nullptr : want(layer.r.given, K * layer.in, K * layer.in, true);
    void* ds = want(layer.s.given, K * layer.out, K * layer.out, true);
    const bool one_bias = layer.bias.given && layer.bias_in->dim() == 1;
    void* db = want(layer.bias.given, one_bias ? layer.out : K * layer.out, K * layer.out, true);
    backward.wanted.push_back({dw, dr, ds, db});
  }
  if (need_x) backward.lowest = 0;
  Tensor dx_sum = dx, bare = dx;
  if (need_x && call.shared) {
    if (call.x.scalar_type() != e.real)
      dx_sum = e.scratch(call.x, call.items * call.layers[0].in, true);
    if (dx.numel() > 0) std::memset(dx_sum.mutable_data_ptr(), 0, size_t(dx.numel() * e.real_size));
  }
  if (need_x) backward.dx = dx_sum.mutable_data_ptr();
  if (member_products) {
    bare = empty_like(call.x, Sizes{call.items, call.members, call.layers[0].out});
    backward.bare = bare.mutable_data_ptr();
  }

  for (size_t l = 0; l < call.layers.size(); ++l) {
    const Layer& layer = call.layers[l];
    const Matrix w{layer.weight.const_data_ptr(), layer.out, layer.in, layer.in, 1};
    const bool made = l >= backward.lowest && (l > 0 || !member_products);
    backward.back.push_back(made ? e.prepare(call.x, w) : Right(w));
  }

  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    const int64_t rows = e.padded(e.max_rows < chunk ? e.max_rows : chunk);
    Tensor scratch = e.scratch(call.x, 4 * rows * call.widest);
    Tensor mask = call.mask_row();
    int64_t largest = 0;
    for (const Layer& layer : call.layers)
      largest = layer.in * layer.out > largest ? layer.in * layer.out : largest;
    Tensor part = e.scratch(call.x, e.tile == e.real ? 0 : largest);
    void* tiles[4];
    for (int i = 0; i < 4; ++i) tiles[i] = e.at(scratch.mutable_data_ptr(), i * rows * call.widest);
    for (int64_t c = begin; c < end; ++c)
      backward.rows(c, c * chunk, (c + 1) * chunk < call.rows ? (c + 1) * chunk : call.rows, tiles,
                    part.mutable_data_ptr(), mask.mutable_data_ptr());
  });

  for (Sum& sum : all) {
    void* to = grads[sum.parameter].mutable_data_ptr();
    if (sum.parts.const_data_ptr() != to || sum.count == 0)
      sum_parts(e, sum.parts.const_data_ptr(), to, sum.count, sum.elements);
  }
  if (member_products) {
    const Layer& first = call.layers[0];
    auto made =
        batch_ensemble_backward(bare, call.x, parameters[0], first.r_in, first.s_in, std::nullopt,
                                0, false, false, needs[0], true, false, false);
    if (needs[0]) grads[0] = std::get<1>(made);
    grads[1] = std::get<2>(made);
  }
  if (need_x && call.shared && call.x.scalar_type() != e.real)
    e.run.round(dx_sum.const_data_ptr(), dx.mutable_data_ptr(), dx.numel());
  return {dx, grads};
}

}  // namespace
}  // namespace ensemble

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("batch_ensemble_mlp", TORCH_BOX(&ensemble::batch_ensemble_mlp));
  m.impl("batch_ensemble_mlp_saved", TORCH_BOX(&ensemble::batch_ensemble_mlp_saved));
  m.impl("batch_ensemble_mlp_backward", TORCH_BOX(&ensemble::batch_ensemble_mlp_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
