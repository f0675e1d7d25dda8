// One step of Sinkhorn-Newton-Sparse, in float64: the pass over the plan, and the sparse solve
// (newton_tree.h).
//
//   P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon)
//   pass: row sums, column sums, and of every row its `keep` largest entries with their columns
//
// The pass reads C once, takes one exponential an element and stores nothing of the size of C. The
// terms of a tile of a row stay in L1 for its selection. Their maxima over some 2 keep disjoint
// sets of columns are met first, in the same loop: the entries that belong into the list are no
// smaller than the keep-th largest maximum, so nearly every vector is passed over, and about 1.4
// keep entries are put into the sorted list, wherever the columns lie.
#include "../exponential.h"

namespace solera {

struct NewtonPass {
  const double *cost, *a, *b, *f, *g;
  double *row_sum, *partial, *values;  // (n), [blocks][m], (n, keep)
  int64_t* index;                      // (n, keep)
  int64_t n, m, keep;
  double kappa;
};
struct NewtonTable {
  void (*pass)(const NewtonPass&, int64_t first_block, int64_t last_block);
};
// Rows whose column sums are added up before they meet those of other blocks: a constant, so that
// the bits do not depend on the number of threads.
constexpr int64_t kNewtonBlockRows = 64;

namespace SOLERA_ISA {
namespace {

constexpr int L = kLanes<double>;

constexpr int64_t kTile = 512;  // columns whose terms are kept for the selection
constexpr int kSets = 64;       // of columns at most: for longer lists nothing is passed over

// A bit for every lane of v that is at least `floor`.
SOLERA_INLINE unsigned reaching(vd v, vd floor) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask((__m512d)v, (__m512d)floor, _CMP_GE_OQ);
#elif defined(__AVX2__)
  return unsigned(_mm256_movemask_pd((__m256d)(v >= floor)));
#else
  unsigned bits = 0;
  for (int k = 0; k < L; ++k) bits |= unsigned(v[k] >= floor[k]) << k;
  return bits;
#endif
}

// Puts (value, column) into a list sorted from the largest on; equal values stay in their order.
SOLERA_INLINE void insert(double* values, int64_t* index, int64_t keep, double value,
                          int64_t column) {
  int64_t at = keep - 1;
  for (; at > 0 && value > values[at - 1]; --at) {
    values[at] = values[at - 1];
    index[at] = index[at - 1];
  }
  values[at] = value;
  index[at] = column;
}

// The largest of the sets' maxima that `keep` of them reach; -1 if there are not so many.
SOLERA_INLINE double floor_of(const vd* most, int sets, int64_t keep) {
  vd floor = splat(-1.0);
  for (int s = 0; s < sets; ++s) {
    vl reached{};
    for (int t = 0; t < sets * L; ++t) reached -= ((const double*)most)[t] >= most[s];
    floor = vmax(reached >= keep ? most[s] : floor, floor);
  }
  return lane_max(floor);
}

// The entries of a tile, `vectors` of them, that belong into the list.
SOLERA_INLINE void select(const double* tile, int64_t vectors, int64_t column, const vd* most,
                          int sets, double* values, int64_t* index, int64_t keep) {
  vd floor = splat(floor_of(most, sets, keep));
  for (int64_t j = 0; j < vectors * L; j += L) {
    unsigned lanes = reaching(load(tile + j), floor);
    for (; __builtin_expect(lanes != 0, 0); lanes &= lanes - 1) {
      const int64_t at = j + __builtin_ctz(lanes);
      if (!(tile[at] > values[keep - 1])) continue;
      insert(values, index, keep, tile[at], column + at);
      floor = vmax(splat(values[keep - 1]), floor);
    }
  }
}

void pass(const NewtonPass& p, int64_t first, int64_t last) {
  const FlushSubnormals flush;
  const double* g = p.g;
  const vd kappa = splat(p.kappa);
  int sets = 1;  // vectors of sets, a power of two
  while (sets * L < 2 * p.keep && sets * L < kSets) sets *= 2;
  if (p.keep == 0 || sets * L < p.keep) sets = 0;
  double tile[kTile];
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * kNewtonBlockRows;
    const int64_t end = begin + kNewtonBlockRows < p.n ? begin + kNewtonBlockRows : p.n;
    double* partial = p.partial + block * p.m;
    memset((void*)partial, 0, size_t(p.m) * sizeof(double));
    for (int64_t i = begin; i < end; ++i) {
      const double* row = p.cost + i * p.m;
      double* values = p.values + i * p.keep;
      int64_t* index = p.index + i * p.keep;
      for (int64_t k = 0; k < p.keep; ++k) {
        values[k] = -1;  // below any entry of a plan: the first columns fill the list
        index[k] = k;
      }
      const double f = p.f[i], a = p.a[i];
      const auto entry = [&](vd c, vd gj, vd bj) {
        const vd x = kappa * ((f - c) + gj);
        const vd e = fast_exp2(at_most(Exponents<double>::largest - 1, x));
        return a * (bj * (x < Exponents<double>::smallest ? vd{} : e));
      };
      vd sum{};
      for (int64_t from = 0; from < p.m; from += kTile) {
        const int64_t to = from + kTile < p.m ? from + kTile : p.m;
        vd most[kSets / L];
        for (int s = 0; s < sets; ++s) most[s] = splat(-1.0);
        int64_t j = from, vector = 0;
        const auto take = [&](vd v) {
          store(tile + vector * L, v);
          if (sets > 0) {
            vd& now = most[vector & (sets - 1)];
            now = vmax(v, now);  // a NaN counts for nothing
          }
          ++vector;
        };
        for (; j + L <= to; j += L) {
          const vd v = entry(load(row + j), load(g + j), load(p.b + j));
          sum += v;
          store(partial + j, load(partial + j) + v);
          take(v);
        }
        if (j < to) {
          const int lanes = int(to - j);
          vd v =
              entry(load_tail(row + j, lanes), load_tail(g + j, lanes), load_tail(p.b + j, lanes));
          sum += v;
          store_n(partial + j, load_tail(partial + j, lanes) + v, lanes);
          for (int k = lanes; k < L; ++k) v[k] = -1;
          take(v);
        }
        if (p.keep > 0) select(tile, vector, from, most, sets, values, index, p.keep);
      }
      p.row_sum[i] = lane_sum(sum);
      for (int64_t k = 0; k < p.keep; ++k)
        if (values[k] < 0) values[k] = 0;  // a row of NaN selects nothing
    }
  }
}

}  // namespace

extern const NewtonTable newton_table;
const NewtonTable newton_table = {pass};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "../parallel.h"
#include "newton_tree.h"

namespace solera {

SOLERA_PICK(NewtonTable, newton_table)

namespace {

double* at(Tensor& t, int64_t offset) { return (double*)t.mutable_data_ptr() + offset; }
const double* at(const Tensor& t, int64_t offset) {
  return (const double*)t.const_data_ptr() + offset;
}
void expect_double(const Tensor& t) {
  STD_TORCH_CHECK(dtype_of(t) == kFloat64, "solera: the Newton step is computed in float64");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sinkhorn_newton_pass(
    const Tensor& cost_in, const Tensor& a_in, const Tensor& b_in, const Tensor& f_in,
    const Tensor& g_in, double epsilon, int64_t keep) {
  expect_double(cost_in);
  const Tensor cost = dense(cost_in), a = dense(a_in), b = dense(b_in), f = dense(f_in),
               g = dense(g_in);
  const int64_t batch = cost.size(0), n = cost.size(1), m = cost.size(2);
  const int64_t blocks = (n + kNewtonBlockRows - 1) / kNewtonBlockRows;
  STD_TORCH_CHECK(keep >= 0 && keep <= m, "solera: keep must lie in [0, columns]");
  Tensor row_sum = empty_like(cost, {batch, n}), column_sum = empty_like(cost, {batch, m});
  Tensor partial = empty_like(cost, {batch, blocks, m});
  Tensor values = empty_like(cost, {batch, n, keep});
  Tensor index = empty_like(cost, {batch, n, keep}, ScalarType::Long);
  const NewtonTable& table = pick_newton_table();
  parallel_for(0, batch * blocks, grain_for(kNewtonBlockRows * m * 8),
               [&](int64_t begin, int64_t end) {
                 for (int64_t k = begin / blocks; k * blocks < end; ++k) {
                   const NewtonPass p{at(cost, k * n * m),
                                      at(a, k * n),
                                      at(b, k * m),
                                      at(f, k * n),
                                      at(g, k * m),
                                      at(row_sum, k * n),
                                      at(partial, k * blocks * m),
                                      at(values, k * n * keep),
                                      (int64_t*)index.mutable_data_ptr() + k * n * keep,
                                      n,
                                      m,
                                      keep,
                                      1.4426950408889634074 / epsilon};
                   table.pass(p, begin > k * blocks ? begin - k * blocks : 0,
                              end < (k + 1) * blocks ? end - k * blocks : blocks);
                 }
               });
  for (int64_t k = 0; k < batch; ++k) {
    const double* part = at(partial, k * blocks * m);
    double* out = at(column_sum, k * m);
    for (int64_t j = 0; j < m; ++j) out[j] = 0;
    for (int64_t c = 0; c < blocks; ++c)
      for (int64_t j = 0; j < m; ++j) out[j] += part[c * m + j];
  }
  return {row_sum, column_sum, values, index};
}

std::tuple<Tensor, Tensor, Tensor> sinkhorn_newton_solve(const Tensor& values_in,
                                                         const Tensor& index_in, const Tensor& p_in,
                                                         const Tensor& q_in, const Tensor& ra_in,
                                                         const Tensor& rb_in, double shift,
                                                         double tolerance, int64_t max_iterations) {
  expect_double(values_in);
  const Tensor values = dense(values_in), index = dense(index_in), p = dense(p_in), q = dense(q_in),
               ra = dense(ra_in), rb = dense(rb_in);
  const int64_t batch = values.size(0), n = values.size(1), keep = values.size(2), m = q.size(1);
  Tensor x = empty_like(values, {batch, n}), y = empty_like(values, {batch, m});
  Tensor iterations = empty_like(values, {batch}, ScalarType::Long);
  int64_t* count = (int64_t*)iterations.mutable_data_ptr();
  parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t* columns = (const int64_t*)index.const_data_ptr() + k * n * keep;
      NewtonSystem system(n, m, keep, at(values, k * n * keep), columns, at(p, k * n), at(q, k * m),
                          shift);
      count[k] = system.solve(at(ra, k * n), at(rb, k * m), at(x, k * n), at(y, k * m), tolerance,
                              max_iterations);
    }
  });
  return {x, y, iterations};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("sinkhorn_newton_pass", TORCH_BOX(&sinkhorn_newton_pass));
  m.impl("sinkhorn_newton_solve", TORCH_BOX(&sinkhorn_newton_solve));
}

}  // namespace solera
#endif  // SOLERA_FRONT
