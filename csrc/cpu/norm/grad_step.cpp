// Steps over lists of parameters: AdamW of a gradient clipped and scaled as it is read, and Fira's
// residual scaled line by line.
//
//   adam_step_   g' = scale (|g| > threshold ? factor g : g)
//                m <- m + (1 - b1) (g' - m)     v <- b2 v + (1 - b2) g'^2
//                p <- decay p - step_size m / (sqrt(v) correction + eps)
//                reads p, g, m, v and writes p, m, v: 28 bytes an element in float32
//   fira_scale_  u <- u phi, phi = ||a|| / (||r|| + 1e-8) per column (or per row), and ||u||:
//                reads and writes u once; r and a are smaller by the rank
//
// Sums over tiles of 1024 in vector lanes, over the tiles of a piece and the pieces in double.
#include "grad_tiles.h"

namespace solera {

struct AdamStep {
  void *p, *m, *v;
  const void* g;
  int p_dtype, m_dtype, v_dtype, g_dtype;
  double threshold, factor, scale;
  double decay, step_size, beta1, beta2, eps, correction;
};
struct FiraLines {
  const void *reduced, *update;  // (rows, columns)
  int reduced_dtype, update_dtype;
  int64_t rows, columns;
  double* phi;  // of the columns, or of the rows
};
struct FiraResidual {
  void* u;  // (rows, columns)
  int dtype;
  int64_t columns;
  const double* phi;
  bool per_column;
};

struct GradStepTable {
  // Indexed by accumulator: 0 float, 1 double.
  void (*adam[2])(const AdamStep&, int64_t begin, int64_t end);
  void (*column_ratio[2])(const FiraLines&, int64_t begin, int64_t end);
  void (*row_ratio[2])(const FiraLines&, int64_t begin, int64_t end);
  double (*residual[2])(const FiraResidual&, int64_t begin, int64_t end);
};

namespace SOLERA_ISA {
namespace {

template <class T>
void adam(const AdamStep& s, int64_t begin, int64_t end) {
  T p_tile[kGradTile], m_tile[kGradTile], v_tile[kGradTile], g_tile[kGradTile];
  const T threshold = T(s.threshold), factor = T(s.factor), scale = T(s.scale);
  const T decay = T(s.decay), step_size = T(s.step_size), eps = T(s.eps);
  const T grow1 = T(1 - s.beta1), keep2 = T(s.beta2), grow2 = T(1 - s.beta2);
  const T correction = T(s.correction);
  grad_tiles(begin, end, [&](int64_t at, int n) {
    const T* p = read_tile<T>(s.p, s.p_dtype, at, n, p_tile);
    const T* m = read_tile<T>(s.m, s.m_dtype, at, n, m_tile);
    const T* v = read_tile<T>(s.v, s.v_dtype, at, n, v_tile);
    const T* g = read_tile<T>(s.g, s.g_dtype, at, n, g_tile);
    T* p_out = open_tile<T>(s.p, s.p_dtype, at, p_tile);
    T* m_out = open_tile<T>(s.m, s.m_dtype, at, m_tile);
    T* v_out = open_tile<T>(s.v, s.v_dtype, at, v_tile);
    strips<kLanes<T>>(n, [&](int64_t j, int k) {
      AccVec<T> x = get(g + j, k);
      const AccVec<T> size = x < 0 ? -x : x;
      x = (size > threshold ? x * factor : x) * scale;
      const AccVec<T> first = get(m + j, k) + grow1 * (x - get(m + j, k));
      const AccVec<T> second = keep2 * get(v + j, k) + grow2 * x * x;
      const AccVec<T> root = vector_root(second) * correction + eps;
      put(p_out + j, decay * get(p + j, k) - step_size * first / root, k);
      put(m_out + j, first, k);
      put(v_out + j, second, k);
    });
    close_tile<T>(s.p, s.p_dtype, at, n, p_tile);
    close_tile<T>(s.m, s.m_dtype, at, n, m_tile);
    close_tile<T>(s.v, s.v_dtype, at, n, v_tile);
  });
}

SOLERA_INLINE double fira_ratio(double update, double reduced) {
  return __builtin_sqrt(update) / (__builtin_sqrt(reduced) + 1e-8);
}

template <class T>
void column_ratio(const FiraLines& s, int64_t begin, int64_t end) {
  T r_tile[kGradTile], a_tile[kGradTile];
  double of_r[kGradTile], of_a[kGradTile];
  grad_tiles(begin, end, [&](int64_t at, int n) {
    for (int j = 0; j < n; ++j) of_r[j] = of_a[j] = 0;
    for (int64_t row = 0; row < s.rows; ++row) {
      const int64_t from = row * s.columns + at;
      const T* r = read_tile<T>(s.reduced, s.reduced_dtype, from, n, r_tile);
      const T* a = read_tile<T>(s.update, s.update_dtype, from, n, a_tile);
      for (int j = 0; j < n; ++j) {
        of_r[j] += double(r[j]) * double(r[j]);
        of_a[j] += double(a[j]) * double(a[j]);
      }
    }
    for (int j = 0; j < n; ++j) s.phi[at + j] = fira_ratio(of_a[j], of_r[j]);
  });
}

template <class T>
double square_sum(const void* data, int dtype, int64_t begin, int64_t end) {
  T tile[kGradTile];
  double total = 0;
  grad_tiles(begin, end, [&](int64_t at, int n) {
    const T* x = read_tile<T>(data, dtype, at, n, tile);
    total += double(row_sum<T>(n, [&](int64_t j, int m) { return get(x + j, m) * get(x + j, m); }));
  });
  return total;
}

template <class T>
void row_ratio(const FiraLines& s, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t from = row * s.columns, to = from + s.columns;
    s.phi[row] = fira_ratio(square_sum<T>(s.update, s.update_dtype, from, to),
                            square_sum<T>(s.reduced, s.reduced_dtype, from, to));
  }
}

template <class T>
double residual(const FiraResidual& s, int64_t begin, int64_t end) {
  T tile[kGradTile], phi[kGradTile];
  double total = 0;
  for (int64_t row = begin; row < end; ++row) {
    grad_tiles(0, s.columns, [&](int64_t column, int n) {
      const int64_t at = row * s.columns + column;
      const T* u = read_tile<T>(s.u, s.dtype, at, n, tile);
      T* out = open_tile<T>(s.u, s.dtype, at, tile);
      for (int j = 0; j < n; ++j) phi[j] = T(s.phi[s.per_column ? column + j : row]);
      total += double(row_sum<T>(n, [&](int64_t j, int m) {
        const AccVec<T> x = get(u + j, m) * get((const T*)phi + j, m);
        put(out + j, x, m);
        return x * x;
      }));
      close_tile<T>(s.u, s.dtype, at, n, tile);
    });
  }
  return total;
}

}  // namespace

extern const GradStepTable grad_step_table;
const GradStepTable grad_step_table = {
    {adam<float>, adam<double>},
    {column_ratio<float>, column_ratio<double>},
    {row_ratio<float>, row_ratio<double>},
    {residual<float>, residual<double>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include <cmath>

#include "grad_lists.h"

namespace solera {

SOLERA_PICK(GradStepTable, grad_step_table)

namespace {

void adam_step_(const std::vector<Tensor>& parameters, const std::vector<Tensor>& grads,
                const std::vector<Tensor>& exp_avg, const std::vector<Tensor>& exp_avg_sq,
                const Tensor& clip_in, const Tensor& scale_in, double decay, double step_size,
                double beta1, double beta2, double eps, double correction) {
  const size_t count = parameters.size();
  STD_TORCH_CHECK(grads.size() == count && exp_avg.size() == count && exp_avg_sq.size() == count,
                  "adam_step_: expected four lists of one length");
  const auto& table = pick_grad_step_table();
  const std::vector<double> clip = grad_numbers(clip_in, 2 * int64_t(count));
  const std::vector<double> scale = grad_numbers(scale_in, int64_t(count));
  std::vector<GradMemory> memory;
  std::vector<AdamStep> items;
  memory.reserve(4 * count);
  items.reserve(count);
  GradPieces pieces;
  for (size_t l = 0; l < count; ++l) {
    const Tensor* entry[] = {&parameters[l], &exp_avg[l], &exp_avg_sq[l], &grads[l]};
    for (int k = 0; k < 4; ++k) {
      STD_TORCH_CHECK(same_sizes(*entry[k], parameters[l]), "adam_step_: the tensors of entry ", l,
                      " differ in shape");
      memory.emplace_back(*entry[k], entry[k]->is_contiguous(), k < 3);
    }
    const GradMemory *p = &memory[4 * l], *m = p + 1, *v = p + 2, *g = p + 3;
    items.push_back({p->data, m->data, v->data, g->data, p->dtype, m->dtype, v->dtype, g->dtype,
                     clip[l], clip[count + l], scale[l], decay, step_size, beta1, beta2, eps,
                     correction});
    pieces.add(l, parameters[l].numel(), 1);
  }
  pieces.parallel(28, [&](const GradPiece& piece, size_t) {
    const AdamStep& s = items[piece.item];
    const bool wide = s.p_dtype == kFloat64 || s.m_dtype == kFloat64 || s.v_dtype == kFloat64 ||
                      s.g_dtype == kFloat64;
    table.adam[wide](s, piece.begin, piece.end);
  });
  for (size_t l = 0; l < count; ++l) {
    memory[4 * l].put_back(parameters[l]);
    memory[4 * l + 1].put_back(exp_avg[l]);
    memory[4 * l + 2].put_back(exp_avg_sq[l]);
  }
}

Tensor fira_scale_(const std::vector<Tensor>& residuals, const std::vector<Tensor>& reduced,
                   const std::vector<Tensor>& updates) {
  const size_t count = residuals.size();
  STD_TORCH_CHECK(count > 0 && reduced.size() == count && updates.size() == count,
                  "fira_scale_: expected three lists of one length, not empty");
  const auto& table = pick_grad_step_table();
  std::vector<GradMemory> memory;
  std::vector<FiraLines> lines;
  std::vector<FiraResidual> items;
  std::vector<std::vector<double>> phi(count);
  std::vector<bool> wide(count);
  memory.reserve(3 * count);
  GradPieces of_lines, pieces;
  for (size_t l = 0; l < count; ++l) {
    const Tensor &u = residuals[l], &r = reduced[l], &a = updates[l];
    STD_TORCH_CHECK(u.dim() == 2 && r.dim() == 2 && same_sizes(r, a),
                    "fira_scale_: residual, reduced and update do not fit");
    const bool per_column = r.size(0) < r.size(1);
    const int side = per_column ? 1 : 0;
    STD_TORCH_CHECK(u.size(side) == r.size(side),
                    "fira_scale_: residual, reduced and update do not fit");
    memory.emplace_back(u, u.is_contiguous(), true);
    memory.emplace_back(r, r.is_contiguous(), false);
    memory.emplace_back(a, a.is_contiguous(), false);
    const GradMemory *x = &memory[3 * l], *y = x + 1, *z = x + 2;
    phi[l].resize(size_t(u.size(side)));
    lines.push_back({y->data, z->data, y->dtype, z->dtype, r.size(0), r.size(1), phi[l].data()});
    items.push_back({x->data, x->dtype, u.size(1), phi[l].data(), per_column});
    wide[l] = x->dtype == kFloat64 || y->dtype == kFloat64 || z->dtype == kFloat64;
    of_lines.add(l, r.size(side), r.size(1 - side));
    pieces.add(l, u.size(0), u.size(1));
  }
  of_lines.parallel(8, [&](const GradPiece& piece, size_t) {
    const auto& kernels = items[piece.item].per_column ? table.column_ratio : table.row_ratio;
    kernels[wide[piece.item]](lines[piece.item], piece.begin, piece.end);
  });
  std::vector<double> partial(pieces.all().size()), found(count);
  pieces.parallel(8, [&](const GradPiece& piece, size_t i) {
    partial[i] = table.residual[wide[piece.item]](items[piece.item], piece.begin, piece.end);
  });
  for (size_t i = 0; i < partial.size(); ++i) found[pieces.all()[i].item] += partial[i];
  for (double& value : found) value = std::sqrt(value);
  for (size_t l = 0; l < count; ++l) memory[3 * l].put_back(residuals[l]);
  return grad_result(found, residuals[0],
                     any_double(residuals) || any_double(reduced) || any_double(updates));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("adam_step_", TORCH_BOX(&adam_step_));
  m.impl("fira_scale_", TORCH_BOX(&fira_scale_));
}

}  // namespace solera
#endif  // SOLERA_FRONT
