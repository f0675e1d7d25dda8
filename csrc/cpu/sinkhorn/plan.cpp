// The transport plan of dual potentials, its relatives, and their gradient. With
//
//   E_ij = exp((f_i + g_j - C_ij) / epsilon)
//
// plan:      out_ij = E_ij (x_i b_j + a_i y_j)     x = a, y = 0 is the plan itself; other x and y
// give
//                                                  the gradients of the Sinkhorn map to its cost
// backward:  for a gradient D of the plan,  dC = -D a b E / epsilon,
//            row_sum_i = sum_j D_ij b_j E_ij,  column_sum_j = sum_i D_ij a_i E_ij
//
// from which the caller has every other gradient: da = row_sum, df = a row_sum / epsilon, and so
// on. Bytes: plan reads C, writes out; backward reads C and D, writes dC. One exponential an
// element.
#include "../exponential.h"

namespace solera {

struct SinkhornPlan {
  const void *cost, *a, *b, *f, *g;  // a (n), b (m), f (n), g (m)
  const void *x, *y;                 // out = E * (x b^T + a y^T); y may be null
  void* out;
  const void* grad;         // backward only: the gradient of the plan
  void *row_sum, *partial;  // sum_j grad b E (n); sum_i grad a E, [blocks][m]
  int64_t n, m, block_rows;
  int64_t rows;      // of the padded problem; beyond n and m the outputs are 0
  int64_t row_step;  // elements between rows: more than m where the problem is padded
  double kappa, epsilon;
};

struct PlanTable {
  void (*rows)(const SinkhornPlan&, int64_t first, int64_t last);
  void (*backward)(const SinkhornPlan&, int64_t first_block, int64_t last_block);
};
struct PlanTables {
  PlanTable float32, float64;
};
// Rows whose column sums are added up before they meet those of other blocks: a constant, so that
// the bits do not depend on the number of threads.
constexpr int64_t kPlanBlockRows = 64;

namespace SOLERA_ISA {
namespace {

template <class T>
using V = AccVec<T>;

// E, with what is below the normal numbers as 0, and no infinity (a zero weight times it is 0).
template <class T>
SOLERA_INLINE V<T> kernel_of(V<T> exponent) {
  const V<T> value = fast_exp2(at_most(T(Exponents<T>::largest - 1), exponent));
  return exponent < Exponents<T>::smallest ? V<T>{} : value;
}

template <class T>
void plan_rows(const SinkhornPlan& p, int64_t first, int64_t last) {
  constexpr int L = kLanes<T>;
  const T *f = (const T*)p.f, *g = (const T*)p.g, *a = (const T*)p.a, *b = (const T*)p.b;
  const T *x = (const T*)p.x, *y = (const T*)p.y;
  const FlushSubnormals flush;
  const T kappa = T(p.kappa);
  for (int64_t i = first; i < last; ++i) {
    const T* row = (const T*)p.cost + i * p.row_step;
    T* out = (T*)p.out + i * p.row_step;
    if (i >= p.n) {
      memset((void*)out, 0, size_t(p.row_step) * sizeof(T));
      continue;
    }
    memset((void*)(out + p.m), 0, size_t(p.row_step - p.m) * sizeof(T));
    const auto value = [&](V<T> c, V<T> gj, V<T> bj, V<T> yj) {
      const V<T> e = kernel_of<T>(kappa * ((f[i] - c) + gj));
      const V<T> first =
          x[i] * (bj * e);  // in this order a product of two tiny weights is never formed
      return y ? first + yj * (a[i] * e) : first;
    };
    int64_t j = 0;
    for (; j + L <= p.m; j += L)
      store(out + j, value(load(row + j), load(g + j), load(b + j), y ? load(y + j) : V<T>{}));
    if (j < p.m) {
      const int k = int(p.m - j);
      store_n(out + j,
              value(load_tail(row + j, k), load_tail(g + j, k), load_tail(b + j, k),
                    y ? load_tail(y + j, k) : V<T>{}),
              k);
    }
  }
}

template <class T>
void plan_blocks(const SinkhornPlan& p, int64_t first, int64_t last) {
  constexpr int L = kLanes<T>;
  const T *f = (const T*)p.f, *g = (const T*)p.g, *a = (const T*)p.a, *b = (const T*)p.b;
  const FlushSubnormals flush;
  const T kappa = T(p.kappa), slope = T(-1 / p.epsilon);
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * p.block_rows;
    const int64_t end = begin + p.block_rows < p.rows ? begin + p.block_rows : p.rows;
    T* partial = (T*)p.partial + block * p.row_step;
    memset((void*)partial, 0, size_t(p.row_step) * sizeof(T));
    for (int64_t i = begin; i < end; ++i) {
      const T* row = (const T*)p.cost + i * p.row_step;
      const T* grad = (const T*)p.grad + i * p.row_step;
      T* out = (T*)p.out + i * p.row_step;
      if (i >= p.n) {
        memset((void*)out, 0, size_t(p.row_step) * sizeof(T));
        ((T*)p.row_sum)[i] = 0;
        continue;
      }
      memset((void*)(out + p.m), 0, size_t(p.row_step - p.m) * sizeof(T));
      V<T> sum{};
      const auto value = [&](V<T> c, V<T> gj, V<T> bj, V<T> d, V<T>& column) {
        V<T> e = kernel_of<T>(kappa * ((f[i] - c) + gj));
        V<T> be = bj * e, ae = a[i] * e;
        sum += d * be;
        column += d * ae;
        return slope * (d * (a[i] * be));
      };
      int64_t j = 0;
      for (; j + L <= p.m; j += L) {
        V<T> column = load(partial + j);
        store(out + j, value(load(row + j), load(g + j), load(b + j), load(grad + j), column));
        store(partial + j, column);
      }
      if (j < p.m) {
        const int k = int(p.m - j);
        V<T> column = load_tail(partial + j, k);
        store_n(out + j,
                value(load_tail(row + j, k), load_tail(g + j, k), load_tail(b + j, k),
                      load_tail(grad + j, k), column),
                k);
        store_n(partial + j, column, k);
      }
      ((T*)p.row_sum)[i] = lane_sum(sum);
    }
  }
}

}  // namespace

extern const PlanTables plan_tables;
const PlanTables plan_tables = {
    {plan_rows<float>, plan_blocks<float>},
    {plan_rows<double>, plan_blocks<double>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "../parallel.h"

namespace solera {

SOLERA_PICK(PlanTables, plan_tables)

namespace {

// Inputs of the plan kernels, one problem after another, all dense.
struct PlanInputs {
  Tensor cost, a, b, f, g, lengths;
  int64_t batch, n, m, size;
  bool padded;
  const PlanTable* table;
  PlanInputs(const Tensor& cost_in, const Tensor& a_in, const Tensor& b_in, const Tensor& f_in,
             const Tensor& g_in, const OptTensor& lengths_in)
      : cost(dense(cost_in)),
        a(dense(a_in)),
        b(dense(b_in)),
        f(dense(f_in)),
        g(dense(g_in)),
        batch(cost.size(0)),
        n(cost.size(1)),
        m(cost.size(2)),
        size(cost.element_size()),
        padded(lengths_in.has_value()) {
    if (padded) lengths = dense(*lengths_in);
    const auto& tables = pick_plan_tables();
    table = dtype_of(cost) == kFloat64 ? &tables.float64 : &tables.float32;
  }
  SinkhornPlan at(int64_t k, double epsilon) const {
    SinkhornPlan p{};
    p.cost = row(cost, k, n * m);
    p.a = row(a, k, n);
    p.b = row(b, k, m);
    p.f = row(f, k, n);
    p.g = row(g, k, m);
    p.n = length(2 * k, n);
    p.m = length(2 * k + 1, m);
    if (p.n == 0 || p.m == 0) p.n = p.m = 0;
    p.rows = n;
    p.row_step = m;
    p.kappa = 1.4426950408889634074 / epsilon;
    p.epsilon = epsilon;
    return p;
  }
  int64_t length(int64_t at, int64_t most) const {
    if (!padded) return most;
    const int64_t given = static_cast<const int64_t*>(lengths.const_data_ptr())[at];
    return given > most ? most : given < 0 ? 0 : given;
  }
  const void* row(const Tensor& t, int64_t k, int64_t count) const {
    return static_cast<const char*>(t.const_data_ptr()) + k * count * size;
  }
  void* row(Tensor& t, int64_t k, int64_t count) const {
    return static_cast<char*>(t.mutable_data_ptr()) + k * count * size;
  }
};

Tensor sinkhorn_plan(const Tensor& cost, const Tensor& a, const Tensor& b, const Tensor& f,
                     const Tensor& g, const Tensor& x_in, OptTensor y_in, double epsilon,
                     OptTensor lengths) {
  const PlanInputs in(cost, a, b, f, g, lengths);
  const Tensor x = dense(x_in);
  Tensor y;
  if (y_in.has_value()) y = dense(*y_in);
  Tensor out = empty_like(in.cost, {in.batch, in.n, in.m});
  const int64_t n = in.n, m = in.m;
  parallel_for(0, in.batch * n, grain_for(m * in.size), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin / n; k * n < end; ++k) {
      SinkhornPlan p = in.at(k, epsilon);
      p.x = in.row(x, k, n);
      p.y = y_in.has_value() ? in.row(y, k, m) : nullptr;
      p.out = in.row(out, k, n * m);
      in.table->rows(p, begin > k * n ? begin - k * n : 0, end < (k + 1) * n ? end - k * n : n);
    }
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> sinkhorn_plan_backward(const Tensor& grad_in, const Tensor& cost,
                                                          const Tensor& a, const Tensor& b,
                                                          const Tensor& f, const Tensor& g,
                                                          double epsilon, OptTensor lengths) {
  const PlanInputs in(cost, a, b, f, g, lengths);
  const Tensor grad = dense(grad_in);
  const int64_t n = in.n, m = in.m, block_rows = kPlanBlockRows;
  const int64_t blocks = (n + block_rows - 1) / block_rows;
  Tensor dcost = empty_like(in.cost, {in.batch, n, m}),
         row_sum = empty_like(in.cost, {in.batch, n});
  Tensor column_sum = empty_like(in.cost, {in.batch, m});
  Tensor partial = empty_like(in.cost, {in.batch, blocks, m});
  parallel_for(0, in.batch * blocks, grain_for(block_rows * m * in.size),
               [&](int64_t begin, int64_t end) {
                 for (int64_t k = begin / blocks; k * blocks < end; ++k) {
                   SinkhornPlan p = in.at(k, epsilon);
                   p.grad = in.row(grad, k, n * m);
                   p.out = in.row(dcost, k, n * m);
                   p.row_sum = in.row(row_sum, k, n);
                   p.partial = in.row(partial, k, blocks * m);
                   p.block_rows = block_rows;
                   in.table->backward(p, begin > k * blocks ? begin - k * blocks : 0,
                                      end < (k + 1) * blocks ? end - k * blocks : blocks);
                 }
               });
  const auto add = [&](auto zero) {
    using T = decltype(zero);
    for (int64_t k = 0; k < in.batch; ++k) {
      const T* part = static_cast<const T*>(in.row(partial, k, blocks * m));
      T* out = static_cast<T*>(in.row(column_sum, k, m));
      for (int64_t j = 0; j < m; ++j) out[j] = part[j];
      for (int64_t c = 1; c < blocks; ++c)
        for (int64_t j = 0; j < m; ++j) out[j] += part[c * m + j];
    }
  };
  if (dtype_of(in.cost) == kFloat64)
    add(double(0));
  else
    add(float(0));
  return {dcost, row_sum, column_sum};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("sinkhorn_plan", TORCH_BOX(&sinkhorn_plan));
  m.impl("sinkhorn_plan_backward", TORCH_BOX(&sinkhorn_plan_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
