// Weighted sums of a plan's density over both sides, from one look at the cost. With
//
//   E_ij = exp((f_i + g_j - C_ij) / epsilon),   K = E, or E * C by the element
//
//   rows_i    = sum_j K_ij x_j
//   columns_j = sum_i K_ij (w_i rows_i + y_i)
//
// so that with w = 0 it is both marginals of a plan, with y = 0 the product K^T diag(w) K x that
// conjugate gradients ask for. Reads C once, one exponential an element; the terms of four rows
// stay in a buffer until their sum is known, and column sums of a block of rows in L2. Nothing of
// the size of C is written.
#include "../exponential.h"

namespace solera {

struct PlanSums {
  const void *cost, *f, *g, *x, *w, *y;  // f, w, y (n), g, x (m); w may be null
  void *rows, *partial, *buffer;         // (n), [blocks][m], [4][stride]
  int64_t n, m, row_step, padded_rows, block_rows, stride;
  double kappa;
  bool by_cost;
};

struct PlanSumsTable {
  void (*blocks)(const PlanSums&, int64_t first_block, int64_t last_block);
  void (*add)(const void* partial, void* out, int64_t m, int64_t blocks, int64_t first,
              int64_t last);
};
struct PlanSumsTables {
  PlanSumsTable float32, float64;
};
constexpr int kPlanSumsRows = 4;  // in flight

namespace SOLERA_ISA {
namespace {

template <class T>
using V = AccVec<T>;

template <class T, bool ByCost>
SOLERA_INLINE V<T> density(V<T> c, T f, V<T> g, T kappa) {
  const V<T> exponent = kappa * ((f - c) + g);
  const V<T> value = fast_exp2(at_most(T(Exponents<T>::largest - 1), exponent));
  const V<T> e = exponent < Exponents<T>::smallest ? V<T>{} : value;
  if constexpr (ByCost) return c == T(__builtin_inf()) ? V<T>{} : e * c;
  return e;
}

// R rows from row i on. Two: with w, the column sums wait for the row sums.
template <class T, bool ByCost, bool Two, int R>
void few_rows(const PlanSums& p, int64_t i, T* partial) {
  constexpr int L = kLanes<T>;
  const T *f = (const T*)p.f + i, *g = (const T*)p.g, *x = (const T*)p.x, *y = (const T*)p.y + i;
  const T* cost = (const T*)p.cost + i * p.row_step;
  const T kappa = T(p.kappa);
  T* buffer = (T*)p.buffer;
  V<T> total[R] = {};
  const auto body = [&](int64_t j, V<T> gj, V<T> xj, V<T> column, const V<T>* c) {
    for (int r = 0; r < R; ++r) {
      const V<T> e = density<T, ByCost>(c[r], f[r], gj, kappa);
      total[r] += e * xj;
      if (Two)
        store(buffer + r * p.stride + j, e);
      else
        column += y[r] * e;
    }
    return column;
  };
  V<T> c[R];
  int64_t j = 0;
  for (; j + L <= p.m; j += L) {
    for (int r = 0; r < R; ++r) c[r] = load(cost + r * p.row_step + j);
    const V<T> column = body(j, load(g + j), load(x + j), Two ? V<T>{} : load(partial + j), c);
    if (!Two) store(partial + j, column);
  }
  if (j < p.m) {
    const int k = int(p.m - j);
    for (int r = 0; r < R; ++r) c[r] = load_tail(cost + r * p.row_step + j, k);
    const V<T> column = body(j, load_tail(g + j, k), load_tail(x + j, k),
                             Two ? V<T>{} : load_tail(partial + j, k), c);
    if (!Two) store_n(partial + j, column, k);
  }
  T u[R];
  for (int r = 0; r < R; ++r) {
    const T sum = lane_sum(total[r]);
    ((T*)p.rows)[i + r] = sum;
    u[r] = Two ? ((const T*)p.w)[i + r] * sum + y[r] : T(0);
  }
  if (!Two) return;
  const auto add = [&](int64_t at, V<T> column) {
    for (int r = 0; r < R; ++r) column += u[r] * load(buffer + r * p.stride + at);
    return column;
  };
  for (j = 0; j + L <= p.m; j += L) store(partial + j, add(j, load(partial + j)));
  if (j < p.m) {
    const int k = int(p.m - j);
    store_n(partial + j, add(j, load_tail(partial + j, k)), k);
  }
}

template <class T, bool ByCost, bool Two>
void blocks_of(const PlanSums& p, int64_t first, int64_t last) {
  const FlushSubnormals flush;
  for (int64_t block = first; block < last; ++block) {
    T* partial = (T*)p.partial + block * p.row_step;
    memset((void*)partial, 0, size_t(p.row_step) * sizeof(T));
    int64_t i = block * p.block_rows;
    const int64_t end = i + p.block_rows < p.padded_rows ? i + p.block_rows : p.padded_rows;
    const int64_t live = end < p.n ? end : p.n;
    for (; i + kPlanSumsRows <= live; i += kPlanSumsRows)
      few_rows<T, ByCost, Two, kPlanSumsRows>(p, i, partial);
    for (; i < live; ++i) few_rows<T, ByCost, Two, 1>(p, i, partial);
    for (; i < end; ++i) ((T*)p.rows)[i] = 0;
  }
}

template <class T>
void sum_blocks(const PlanSums& p, int64_t first, int64_t last) {
  if (p.by_cost)
    p.w ? blocks_of<T, true, true>(p, first, last) : blocks_of<T, true, false>(p, first, last);
  else
    p.w ? blocks_of<T, false, true>(p, first, last) : blocks_of<T, false, false>(p, first, last);
}

template <class T>
void add_blocks(const void* partial, void* out, int64_t m, int64_t blocks, int64_t first,
                int64_t last) {
  T* to = (T*)out;
  for (int64_t j = first; j < last; ++j) to[j] = ((const T*)partial)[j];
  for (int64_t c = 1; c < blocks; ++c)
    for (int64_t j = first; j < last; ++j) to[j] += ((const T*)partial)[c * m + j];
}

}  // namespace

extern const PlanSumsTables plan_sums_tables;
const PlanSumsTables plan_sums_tables = {
    {sum_blocks<float>, add_blocks<float>},
    {sum_blocks<double>, add_blocks<double>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include <algorithm>

#include "../parallel.h"

namespace solera {

SOLERA_PICK(PlanSumsTables, plan_sums_tables)

namespace {

// At most 64 blocks, of whole groups of rows; few rows of great length are shared out too. A matter
// of the shape alone.
int64_t plan_sums_block_rows(int64_t n, int64_t m) {
  const int64_t least = m >= 4096 ? kPlanSumsRows : 16, even = (n + 63) / 64;
  return std::max(least, (even + kPlanSumsRows - 1) / kPlanSumsRows * kPlanSumsRows);
}

std::tuple<Tensor, Tensor> sinkhorn_plan_sums(const Tensor& cost_in, const Tensor& f_in,
                                              const Tensor& g_in, const Tensor& x_in,
                                              OptTensor w_in, const Tensor& y_in, double epsilon,
                                              bool by_cost, OptTensor lengths_in) {
  const Tensor cost = dense(cost_in), f = dense(f_in), g = dense(g_in), x = dense(x_in),
               y = dense(y_in);
  Tensor w, lengths;
  if (w_in.has_value()) w = dense(*w_in);
  if (lengths_in.has_value()) lengths = dense(*lengths_in);
  const int64_t batch = cost.size(0), n = cost.size(1), m = cost.size(2),
                size = cost.element_size();
  const bool wide = dtype_of(cost) == kFloat64;
  const PlanSumsTables& tables = pick_plan_sums_tables();
  const PlanSumsTable& table = wide ? tables.float64 : tables.float32;
  const int64_t block_rows = plan_sums_block_rows(n, m);
  const int64_t blocks = (n + block_rows - 1) / block_rows;
  Tensor rows = empty_like(cost, {batch, n}), columns = empty_like(cost, {batch, m});
  Tensor partial = empty_like(cost, {batch, blocks, m});
  const auto from = [&](const Tensor& t, int64_t at) {
    return static_cast<const char*>(t.const_data_ptr()) + at * size;
  };
  const auto to = [&](Tensor& t, int64_t at) {
    return static_cast<char*>(t.mutable_data_ptr()) + at * size;
  };
  const auto length = [&](int64_t at, int64_t most) {
    if (!lengths_in.has_value()) return most;
    const int64_t given = static_cast<const int64_t*>(lengths.const_data_ptr())[at];
    return std::min(most, std::max(given, int64_t(0)));
  };
  const int64_t stride = (m + 15) / 16 * 16;
  parallel_for(0, batch * blocks, grain_for(block_rows * m * size),
               [&](int64_t begin, int64_t end) {
                 Tensor buffer;
                 if (w_in.has_value()) buffer = empty_like(cost, {kPlanSumsRows * stride});
                 for (int64_t k = begin / blocks; k * blocks < end; ++k) {
                   PlanSums p{};
                   p.cost = from(cost, k * n * m);
                   p.f = from(f, k * n);
                   p.g = from(g, k * m);
                   p.x = from(x, k * m);
                   p.w = w_in.has_value() ? from(w, k * n) : nullptr;
                   p.y = from(y, k * n);
                   p.rows = to(rows, k * n);
                   p.partial = to(partial, k * blocks * m);
                   if (w_in.has_value()) p.buffer = to(buffer, 0);
                   p.n = length(2 * k, n);
                   p.m = length(2 * k + 1, m);
                   if (p.m == 0) p.n = 0;
                   p.row_step = m;
                   p.padded_rows = n;
                   p.block_rows = block_rows;
                   p.stride = stride;
                   p.kappa = 1.4426950408889634074 / epsilon;
                   p.by_cost = by_cost;
                   table.blocks(p, std::max(int64_t(0), begin - k * blocks),
                                std::min(blocks, end - k * blocks));
                 }
               });
  parallel_for(0, batch, grain_for(blocks * m * size), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      table.add(from(partial, k * blocks * m), to(columns, k * m), m, blocks, 0, m);
  });
  return {rows, columns};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("sinkhorn_plan_sums", TORCH_BOX(&sinkhorn_plan_sums));
}

}  // namespace solera
#endif  // SOLERA_FRONT
