// Norms and dots over lists of tensors, and gradients scaled in place by what came of them.
//
//   tensor_norms    ||x||_p of each tensor, entries above a threshold scaled: reads each byte once
//   tensor_dots     <a, a>, <a, b>, <b, b> of each pair, in double: reads both once
//   scale_tensors_  x <- f x: reads and writes the tensors whose factor is not 1
//   clip_units_     g_i <- g_i min(1, clip max(||w_i||, eps) / ||g_i||): reads both, writes what is
//                   clipped; a unit's second reading comes from the caches
//
// A few operations an element, far below the memory's rate. Sums are taken over tiles of 1024 in
// vector lanes, over the tiles of a piece and over the pieces in double, in order.
#include "grad_tiles.h"

namespace solera {

struct GradNormItem {
  const void* data;
  int dtype;
  double threshold, factor;  // entries above the first are multiplied by the second
  bool clip;
  int ord;  // 1, 2, or 0 for infinity
};
struct GradPairItem {
  void* a;  // the gradient, where one is written
  const void* b;
  int a_dtype, b_dtype;
  double clip, eps;  // of clip_units
  int ord;
};

struct GradNormTable {
  // Indexed by accumulator: 0 float, 1 double. Sum (or largest) over [begin, end) elements.
  double (*norm[2])(const GradNormItem&, int64_t begin, int64_t end);
  void (*dots[2])(const GradPairItem&, int64_t begin, int64_t end, double* sums);
  void (*scale[2])(const GradPairItem&, double factor, int64_t begin, int64_t end);
  void (*clip[2])(const GradPairItem&, int64_t columns, int64_t begin, int64_t end);
};

namespace SOLERA_ISA {
namespace {

template <class V>
SOLERA_INLINE V magnitude(V x) {
  return x < 0 ? -x : x;
}

// The largest |x|, or NaN if there is one.
template <class T>
double largest(const T* x, int n) {
  AccVec<T> most{}, bad{};
  strips<kLanes<T>>(n, [&](int64_t j, int m) {
    const AccVec<T> v = magnitude(get(x + j, m));
    most = v > most ? v : most;
    bad = v == v ? bad : v;
  });
  const T nan = lane_sum(bad);
  return nan == nan ? double(lane_max(most)) : double(nan);
}

template <class T>
double tile_norm(const T* x, int n, int ord) {
  if (ord == 0) return largest(x, n);
  if (ord == 1)
    return double(row_sum<T>(n, [&](int64_t j, int m) { return magnitude(get(x + j, m)); }));
  return double(row_sum<T>(n, [&](int64_t j, int m) {
    const AccVec<T> v = get(x + j, m);
    return v * v;
  }));
}

SOLERA_INLINE void join(double& total, double part, int ord) {
  if (ord != 0)
    total += part;
  else if (!(part <= total))  // also a NaN
    total = total != total ? total : part;
}

template <class T>
double norm(const GradNormItem& p, int64_t begin, int64_t end) {
  T tile[kGradTile];
  double total = 0;
  grad_tiles(begin, end, [&](int64_t at, int n) {
    const T* x = read_tile<T>(p.data, p.dtype, at, n, tile);
    if (p.clip) {
      const T threshold = T(p.threshold), factor = T(p.factor);
      strips<kLanes<T>>(n, [&](int64_t j, int m) {
        const AccVec<T> v = get(x + j, m);
        put(tile + j, magnitude(v) > threshold ? v * factor : v, m);
      });
      x = tile;
    }
    join(total, tile_norm(x, n, p.ord), p.ord);
  });
  return total;
}

SOLERA_INLINE vd widened(const double* p) { return load(p); }
SOLERA_INLINE vd widened(const float* p) {
  typedef float half_vector __attribute__((vector_size(SOLERA_VECTOR_BYTES / 2)));
  half_vector v;
  memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, vd);
}

template <class T>
void dots(const GradPairItem& p, int64_t begin, int64_t end, double* sums) {
  constexpr int L = Vec<double>::lanes;
  T a_tile[kGradTile], b_tile[kGradTile];
  vd aa{}, ab{}, bb{};
  grad_tiles(begin, end, [&](int64_t at, int n) {
    const T* a = read_tile<T>(p.a, p.a_dtype, at, n, a_tile);
    const T* b = read_tile<T>(p.b, p.b_dtype, at, n, b_tile);
    int j = 0;
    for (; j + L <= n; j += L) {
      const vd x = widened(a + j), y = widened(b + j);
      aa += x * x;
      ab += x * y;
      bb += y * y;
    }
    for (; j < n; ++j) {
      const double x = double(a[j]), y = double(b[j]);
      sums[0] += x * x;
      sums[1] += x * y;
      sums[2] += y * y;
    }
  });
  sums[0] += lane_sum(aa);
  sums[1] += lane_sum(ab);
  sums[2] += lane_sum(bb);
}

template <class T>
void scale(const GradPairItem& p, double factor, int64_t begin, int64_t end) {
  T tile[kGradTile];
  const T f = T(factor);
  grad_tiles(begin, end, [&](int64_t at, int n) {
    const T* x = read_tile<T>(p.a, p.a_dtype, at, n, tile);
    T* y = open_tile<T>(p.a, p.a_dtype, at, tile);
    strips<kLanes<T>>(n, [&](int64_t j, int m) { put(y + j, get(x + j, m) * f, m); });
    close_tile<T>(p.a, p.a_dtype, at, n, tile);
  });
}

constexpr int64_t kShortRow = 1024, kPrefetch = 1024;  // elements

// Asks for the cache lines of elements [begin, end); past the tensor's end it does nothing.
SOLERA_INLINE void fetch(const void* data, int dtype, int64_t begin, int64_t end) {
  const int64_t size = dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2;
  for (int64_t at = begin * size; at < end * size; at += 64)
    __builtin_prefetch((const char*)data + at);
}

template <class T>
void clip(const GradPairItem& p, int64_t columns, int64_t begin, int64_t end) {
  const GradNormItem g{p.a, p.a_dtype, 0, 0, false, p.ord};
  const GradNormItem w{p.b, p.b_dtype, 0, 0, false, p.ord};
  // Two streams in turns of a short row: the processor's own prefetch starts anew at each.
  const int64_t ahead = columns <= kShortRow ? kPrefetch : 0;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t from = row * columns, to = from + columns;
    if (ahead > 0) {
      fetch(p.a, p.a_dtype, from + ahead, to + ahead);
      fetch(p.b, p.b_dtype, from + ahead, to + ahead);
    }
    double of_g = norm<T>(g, from, to), of_w = norm<T>(w, from, to);
    if (p.ord == 2) of_g = __builtin_sqrt(of_g), of_w = __builtin_sqrt(of_w);
    const double limit = (of_w < p.eps ? p.eps : of_w) * p.clip;
    if (of_g < limit) continue;
    scale<T>(p, limit / (of_g < 1e-6 ? 1e-6 : of_g), from, to);
  }
}

}  // namespace

extern const GradNormTable grad_norm_table;
const GradNormTable grad_norm_table = {
    {norm<float>, norm<double>},
    {dots<float>, dots<double>},
    {scale<float>, scale<double>},
    {clip<float>, clip<double>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include <cmath>

#include "grad_lists.h"

namespace solera {

SOLERA_PICK(GradNormTable, grad_norm_table)

namespace {

int order_code(double ord) {
  STD_TORCH_CHECK(ord == 1 || ord == 2 || std::isinf(ord), "solera: ord must be 1, 2 or inf");
  return std::isinf(ord) ? 0 : int(ord);
}

Tensor tensor_norms(const std::vector<Tensor>& tensors, OptTensor clip, double ord) {
  STD_TORCH_CHECK(!tensors.empty(), "tensor_norms: expected at least one tensor");
  const auto& table = pick_grad_norm_table();
  const int code = order_code(ord);
  const size_t count = tensors.size();
  std::vector<double> numbers;
  if (clip.has_value()) numbers = grad_numbers(*clip, 2 * int64_t(count));
  std::vector<GradMemory> memory;
  std::vector<GradNormItem> items;
  memory.reserve(count);
  items.reserve(count);
  GradPieces pieces;
  for (size_t l = 0; l < count; ++l) {
    memory.emplace_back(tensors[l], packed(tensors[l], 0), false);
    GradNormItem item{memory[l].data, memory[l].dtype, 0, 1, clip.has_value(), code};
    if (item.clip) item.threshold = numbers[l], item.factor = numbers[count + l];
    items.push_back(item);
    pieces.add(l, tensors[l].numel(), 1);
  }
  std::vector<double> partial(pieces.all().size()), found(count);
  pieces.parallel(4, [&](const GradPiece& p, size_t i) {
    const GradNormItem& item = items[p.item];
    partial[i] = table.norm[item.dtype == kFloat64](item, p.begin, p.end);
  });
  for (size_t i = 0; i < partial.size(); ++i) {
    double& total = found[pieces.all()[i].item];
    if (code != 0)
      total += partial[i];
    else if (!(partial[i] <= total) && !std::isnan(total))
      total = partial[i];
  }
  if (code == 2)
    for (double& value : found) value = std::sqrt(value);
  return grad_result(found, tensors[0], any_double(tensors));
}

Tensor tensor_dots(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  STD_TORCH_CHECK(!a.empty() && a.size() == b.size(),
                  "tensor_dots: expected two lists of one length");
  const auto& table = pick_grad_norm_table();
  const size_t count = a.size();
  std::vector<GradMemory> memory;
  std::vector<GradPairItem> items;
  memory.reserve(2 * count);
  items.reserve(count);
  GradPieces pieces;
  for (size_t l = 0; l < count; ++l) {
    STD_TORCH_CHECK(same_sizes(a[l], b[l]), "tensor_dots: two tensors of a pair differ in shape");
    memory.emplace_back(a[l], a[l].is_contiguous(), false);
    memory.emplace_back(b[l], b[l].is_contiguous(), false);
    const GradMemory &x = memory[2 * l], &y = memory[2 * l + 1];
    items.push_back({x.data, y.data, x.dtype, y.dtype, 0, 0, 0});
    pieces.add(l, a[l].numel(), 1);
  }
  std::vector<double> partial(3 * pieces.all().size());
  pieces.parallel(8, [&](const GradPiece& p, size_t i) {
    const GradPairItem& item = items[p.item];
    const bool wide = item.a_dtype == kFloat64 || item.b_dtype == kFloat64;
    table.dots[wide](item, p.begin, p.end, &partial[3 * i]);
  });
  const int64_t sizes[] = {3, int64_t(count)};
  Tensor out = empty_like(a[0], Sizes(sizes, 2), ScalarType::Double);
  double* found = static_cast<double*>(out.mutable_data_ptr());
  std::fill(found, found + 3 * count, 0.0);
  for (size_t i = 0; i < pieces.all().size(); ++i)
    for (size_t k = 0; k < 3; ++k) found[k * count + pieces.all()[i].item] += partial[3 * i + k];
  return out;
}

void scale_tensors_(const std::vector<Tensor>& tensors, const Tensor& factors_in) {
  const auto& table = pick_grad_norm_table();
  const std::vector<double> factors = grad_numbers(factors_in, int64_t(tensors.size()));
  std::vector<size_t> changed;
  for (size_t l = 0; l < tensors.size(); ++l)
    if (factors[l] != 1) changed.push_back(l);
  std::vector<GradMemory> memory;
  memory.reserve(changed.size());
  GradPieces pieces;
  for (size_t i = 0; i < changed.size(); ++i) {
    const Tensor& t = tensors[changed[i]];
    memory.emplace_back(t, packed(t, 0), true);
    pieces.add(i, t.numel(), 1);
  }
  pieces.parallel(8, [&](const GradPiece& p, size_t) {
    const GradMemory& m = memory[p.item];
    const GradPairItem item{m.data, nullptr, m.dtype, 0, 0, 0, 0};
    table.scale[m.dtype == kFloat64](item, factors[changed[p.item]], p.begin, p.end);
  });
  for (size_t i = 0; i < changed.size(); ++i) memory[i].put_back(tensors[changed[i]]);
}

void clip_units_(const std::vector<Tensor>& grads, const std::vector<Tensor>& parameters,
                 double clip, double eps, double ord) {
  STD_TORCH_CHECK(grads.size() == parameters.size(),
                  "clip_units_: expected as many parameters as gradients");
  const auto& table = pick_grad_norm_table();
  const int code = order_code(ord);
  std::vector<GradMemory> memory;
  std::vector<GradPairItem> items;
  std::vector<int64_t> columns;
  memory.reserve(2 * grads.size());
  items.reserve(grads.size());
  columns.reserve(grads.size());
  // A unit must lie in one stretch; what order it has inside does not matter to its norm.
  const auto units_in_order = [](const Tensor& t, int64_t rows, int64_t width) {
    return t.dim() < 2 ? t.is_contiguous() : packed(t, 1) && (rows <= 1 || t.strides()[0] == width);
  };
  GradPieces pieces;
  for (size_t l = 0; l < grads.size(); ++l) {
    const Tensor &g = grads[l], &w = parameters[l];
    STD_TORCH_CHECK(same_sizes(g, w), "clip_units_: parameter ", l,
                    " differs in shape from its gradient");
    const int64_t rows = g.dim() < 2 ? 1 : g.size(0);
    const int64_t width = rows > 0 ? g.numel() / rows : 0;
    memory.emplace_back(g, units_in_order(g, rows, width), true);
    memory.emplace_back(w, units_in_order(w, rows, width), false);
    const GradMemory &x = memory[2 * l], &y = memory[2 * l + 1];
    items.push_back({x.data, y.data, x.dtype, y.dtype, clip, eps, code});
    columns.push_back(width);
    pieces.add(l, rows, width);
  }
  pieces.parallel(12, [&](const GradPiece& p, size_t) {
    const GradPairItem& item = items[p.item];
    const bool wide = item.a_dtype == kFloat64 || item.b_dtype == kFloat64;
    table.clip[wide](item, columns[p.item], p.begin, p.end);
  });
  for (size_t l = 0; l < grads.size(); ++l) memory[2 * l].put_back(grads[l]);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("tensor_norms", TORCH_BOX(&tensor_norms));
  m.impl("tensor_dots", TORCH_BOX(&tensor_dots));
  m.impl("scale_tensors_", TORCH_BOX(&scale_tensors_));
  m.impl("clip_units_", TORCH_BOX(&clip_units_));
}

}  // namespace solera
#endif  // SOLERA_FRONT
