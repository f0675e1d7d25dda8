// The row pass and the column pass of Sinkhorn's iteration, for one instruction set. Included by
// dense.cpp alone.
//
// In base 2: K = log2(e) / epsilon, F = K f, G = K g, and E_ij = 2^(F_i + G_j - K C_ij); the plan
// is a_i b_j E_ij. One iteration of the textbook makes two passes with an exponential each:
//   F_i -= log2 sum_j b_j E_ij            G_j -= log2 sum_i a_i E_ij
// Here the row pass keeps w_ij = 2^(F_i + G_j - K C_ij) of the *old* F in a buffer of a few rows.
// Its sum s_i = sum_j b_j w_ij gives the new F_i, and w_ij / s_i is already E_ij for the new F, so
// the same pass adds (a_i / s_i) w_ij to the column sums: one exponential and one read of C for a
// whole iteration. sum_i a_i |s_i - 1| is the marginal error of the state before the pass, at no
// cost.
//
// The old potential is the shift, so there is no pass for a maximum. Where it is a bad one (s_i or
// a column sum c_j leaves a range in which nothing that matters can have underflowed) that row or
// column alone is done again as an exact log-sum-exp. Terms below 2^-126 count as 2^-126: at most
// 1e-28 of a row, and a column sum is believed only from 1e-20 of the total mass on.
//
// With a side's marginal only penalised (rho) and with over-relaxation (momentum w) the new F_i is
//   F_i - lambda w L_i,   L_i = log2(s_i / h_i),  h_i = 2^(-inverse F_i),
//   inverse = epsilon / rho,  lambda = 1 / (1 + inverse)
// where a h is the marginal that F asks for (h = 1, lambda = 1 for a hard side), and the factor of
// w_ij is 2^(new F_i - F_i) instead of 1 / s_i. Where L_i lies outside [low, high] the dual value
// could fall with w, so that row takes w = 1. These are the `General` passes.
//
// The w_ij of one pass can serve the following ones too: kept as W, with the potentials F0 and G0
// of that time, they are w_ij = u_i W_ij v_j for u = 2^(F - F0), v = 2^(G - G0): two
// multiplications and additions instead of an exponential. That holds to rounding while u and v
// stay within 2^10; then, before the error is looked at, and for what is returned, W is made anew
// (a `Fresh` pass).
//
// An iteration on n x m: reads n m elements of C or W, n m exponentials, 10 vector operations each
// or so; the buffers stay in L1/L2. Row blocks depend on the shape alone and their column sums are
// added in order: same bits for any number of threads, and for any batch.
#pragma once

#include "../exponential.h"

namespace solera {

// How one side's marginal is held: see above. Hard and plain: {0, 1, ...}.
struct SinkhornSide {
  double inverse, lambda, low, high;
};

// One problem. Element pointers are float or double. `stride` is m rounded up to whole vectors; g,
// b and log_b are padded to it with values that give no weight.
struct SinkhornProblem {
  const void *cost, *a, *b, *log_a, *log_b;
  const void* f_old;
  void *f_new, *g;
  void* partial;         // [blocks][stride] column sums of a row block
  double *error, *mass;  // [blocks] sum_i a_i |s_i - h_i| and sum_i a_i s_i of the state (f_old, g)
  int64_t* dead;         // [blocks + column chunks] 1: no finite potential exists; 2: see above
  int64_t n, m, stride, block_rows, blocks;
  int64_t row_step;  // elements between rows of C: more than m where the problem is padded
  double kappa, total_a, momentum;
  SinkhornSide rows, columns;
  void *kept, *f_kept, *g_kept;  // W [n][stride], F0, G0; null where none is kept
  void *u, *v, *bv;              // as above, and b v; v is null in a fresh pass
};
constexpr int64_t kSinkhornColumns = 256;  // columns finished at a time
constexpr int kSinkhornRows = 4;           // rows in flight, each with a buffer of `stride`
constexpr int kSinkhornGroup = 64;         // rows whose logarithms are taken together

namespace SOLERA_ISA {
namespace {

template <class T>
using V = AccVec<T>;

// Where a row sum or a column sum computed with the old potential as its shift is believed.
template <class T>
struct Range;
template <>
struct Range<float> {
  static constexpr float row_low = 1e-10f, row_high = 1e10f, column_low = 1e-20f,
                         column_high = 1e20f, most_move = 33;
  static constexpr float biggest = 3.4028234e38f;
};
template <>
struct Range<double> {
  static constexpr double row_low = 1e-100, row_high = 1e100, column_low = 1e-150,
                          column_high = 1e150, most_move = 330;
  static constexpr double biggest = 1.7976931348623157e308;
};

SOLERA_INLINE float log2_of(float x) { return __builtin_log2f(x); }
SOLERA_INLINE double log2_of(double x) { return __builtin_log2(x); }
SOLERA_INLINE double exp2_of(double x) { return __builtin_exp2(x); }

template <class T>
SOLERA_INLINE V<T> splat_infinity() {
  return splat(T(__builtin_inf()));
}

// Calls body(offset, vector of C's row) over the columns; the last vector may be partly zeros.
template <class T, class F>
SOLERA_INLINE void over_row(const T* row, int64_t m, const F& body) {
  constexpr int L = kLanes<T>;
  int64_t j = 0;
  for (; j + L <= m; j += L) body(j, load(row + j));
  if (j < m) body(j, load_tail(row + j, int(m - j)));
}

// One row as an exact log-sum-exp. Fills w with terms relative to the largest b_j 2^(..), returns
// their weighted sum and in `log_sum` the log2 of the true sum without F. A row without a term
// gives -inf.
template <class T>
__attribute__((noinline)) T exact_row(const SinkhornProblem& p, const T* row, T* w, T& log_sum) {
  const T *G = (const T*)p.g, *b = (const T*)p.b, *log_b = (const T*)p.log_b;
  const T kappa = T(p.kappa);
  V<T> top = -splat_infinity<T>();
  over_row(row, p.m,
           [&](int64_t j, V<T> c) { top = vmax(load(G + j) - kappa * c + load(log_b + j), top); });
  const T largest = lane_max(top);
  const T shift = largest == -T(__builtin_inf()) ? T(0) : largest;
  V<T> sum{};
  over_row(row, p.m, [&](int64_t j, V<T> c) {
    V<T> term = fast_exp2(load(G + j) - kappa * c - shift);
    store(w + j, term);
    V<T> finite = term > Range<T>::biggest ? splat(Range<T>::biggest) : term;
    sum += load(b + j) * finite;
  });
  const T s = lane_sum(sum);
  log_sum = largest == -T(__builtin_inf()) && s == s ? largest : shift + log2_of(s);
  return s;
}

// A step of the potential F whose row or column sum relative to what F asks for is 2^L.
template <class W>
SOLERA_INLINE W step_of(const SinkhornSide& side, double momentum, W L) {
  typedef __typeof__(L[0] + 0) T;
  const W w = (L >= T(side.low)) & (L <= T(side.high)) ? splat(T(momentum)) : splat(T(1));
  return -T(side.lambda) * w * L;
}
// The new potential from the log2 of the exact sum without F.
template <class T>
SOLERA_INLINE T exact_potential(const SinkhornSide& side, double momentum, T old, T log_sum) {
  const double L = double(log_sum) + double(old) * (1 + side.inverse);
  if (momentum == 1 || !(L >= side.low && L <= side.high)) return -T(side.lambda * double(log_sum));
  return T(double(old) - side.lambda * momentum * L);
}

// R rows' new potentials, the factors that make their w_ij the new E_ij, and the sums h that the
// old potentials ask for.
template <class T, int R>
SOLERA_INLINE void general_rows(const SinkhornProblem& p, const T* old, const T* sum, T* next,
                                T* factor, T* wanted) {
  constexpr int L = kLanes<T>, N = (R + L - 1) / L * L;
  T o[N] = {}, s[N];
  for (int r = 0; r < N; ++r) s[r] = T(1);
  for (int r = 0; r < R; ++r) o[r] = old[r], s[r] = sum[r];
  for (int r = 0; r < R; r += L) {
    const V<T> F = load(o + r), asked = T(p.rows.inverse) * F;
    const V<T> step = step_of(p.rows, p.momentum, fast_log2(load(s + r)) + asked);
    const int lanes = R - r < L ? R - r : L;
    store_n(next + r, F + step, lanes);
    store_n(factor + r, fast_exp2(step), lanes);
    store_n(wanted + r, fast_exp2(-asked), lanes);
  }
}

// u, v and b v for the potentials of now; the largest |log2| of the first two.
template <class T>
double since_kept(const SinkhornProblem& p) {
  constexpr int L = kLanes<T>;
  const FlushSubnormals flush;
  V<T> most{};
  const auto ratio = [&](const void* now, const void* then, void* out, int64_t count) {
    for (int64_t i = 0; i < count; i += L) {
      const int lanes = count - i < L ? int(count - i) : L;
      const V<T> x = load_tail((const T*)now + i, lanes) - load_tail((const T*)then + i, lanes);
      most = vmax(most, vmax(x, -x));
      store_n((T*)out + i, fast_exp2(x), lanes);
    }
  };
  ratio(p.f_old, p.f_kept, p.u, p.n);
  ratio(p.g, p.g_kept, p.v, p.stride);
  for (int64_t j = 0; j < p.stride; j += L)
    store((T*)p.bv + j, load((const T*)p.b + j) * load((const T*)p.v + j));
  return double(lane_max(most));
}

// R rows of a pass over W; false where a row has to be done again by an exact log-sum-exp.
template <class T, int R, bool General>
SOLERA_INLINE bool kept_rows(const SinkhornProblem& p, int64_t i, T* sums, T* exact, T* partial,
                             double& error, double& mass) {
  constexpr int L = kLanes<T>;
  const T *bv = (const T*)p.bv, *a = (const T*)p.a, *F = (const T*)p.f_old, *u = (const T*)p.u;
  const T* W = (const T*)p.kept + i * p.stride;
  V<T> total[R] = {};
  for (int64_t j = 0; j < p.stride; j += L) {
    const V<T> weight = load(bv + j);
    for (int r = 0; r < R; ++r) total[r] += weight * load(W + r * p.stride + j);
  }
  T old[R], sum[R], scale[R], next[R], factor[R], wanted[R];
  bool good = true;
  for (int r = 0; r < R; ++r) {
    sum[r] = u[i + r] * lane_sum(total[r]);
    old[r] = F[i + r];
    good = good && sum[r] > Range<T>::row_low && sum[r] < Range<T>::row_high;
  }
  if constexpr (General) general_rows<T, R>(p, old, sum, next, factor, wanted);
  for (int r = 0; r < R; ++r) {
    sums[r] = sum[r];
    if constexpr (General) {
      good = good && __builtin_fabs(double(next[r] - old[r])) < Range<T>::most_move;
      exact[r] = next[r];
      scale[r] = a[i + r] * factor[r] * u[i + r];
      error += double(a[i + r]) * __builtin_fabs(double(sum[r]) - double(wanted[r]));
    } else {
      scale[r] = a[i + r] / sum[r] * u[i + r];
      error += double(a[i + r]) * __builtin_fabs(double(sum[r]) - 1);
    }
    mass += double(a[i + r]) * double(sum[r]);
  }
  for (int64_t j = 0; j < p.stride; j += L) {
    V<T> c = load(partial + j);
    for (int r = 0; r < R; ++r) c += scale[r] * load(W + r * p.stride + j);
    store(partial + j, c);
  }
  return good;
}

template <class T, int R, bool General>
SOLERA_INLINE bool few_rows(const SinkhornProblem& p, int64_t i, T* sums, T* exact, T* buffer,
                            T* partial, double& error, double& mass, int64_t& dead, bool evaluate) {
  bool all_good = true;
  if (p.kept && !evaluate) buffer = (T*)p.kept + i * p.stride;
  constexpr int L = kLanes<T>;
  const T *G = (const T*)p.g, *a = (const T*)p.a, *b = (const T*)p.b, *F = (const T*)p.f_old;
  const T kappa = T(p.kappa);
  const T* row[R];
  T old[R], sum[R], scale[R];
  V<T> total[R];
  for (int r = 0; r < R; ++r) {
    row[r] = (const T*)p.cost + (i + r) * p.row_step;
    old[r] = F[i + r];
    total[r] = V<T>{};
  }
  const auto one = [&](int64_t j, const V<T>* c) {
    const V<T> g = load(G + j), weight = load(b + j);
    for (int r = 0; r < R; ++r) {
      V<T> w = fast_exp2((g - kappa * c[r]) + old[r]);
      total[r] += weight * w;
      store(buffer + r * p.stride + j, w);
    }
  };
  int64_t j = 0;
  for (; j + L <= p.m; j += L) {
    V<T> c[R];
    for (int r = 0; r < R; ++r) c[r] = load(row[r] + j);
    one(j, c);
  }
  if (j < p.m) {
    V<T> c[R];
    for (int r = 0; r < R; ++r) c[r] = load_tail(row[r] + j, int(p.m - j));
    one(j, c);
  }
  for (int r = 0; r < R; ++r) sum[r] = lane_sum(total[r]);
  T next[R], factor[R], wanted[R];
  if constexpr (General) general_rows<T, R>(p, old, sum, next, factor, wanted);
  for (int r = 0; r < R; ++r) {
    const T weight = a[i + r];
    double state = double(sum[r]), asked = General ? double(wanted[r]) : 1;
    bool good = sum[r] > Range<T>::row_low && sum[r] < Range<T>::row_high;
    sums[r] = sum[r];
    if constexpr (General) {
      good = good && __builtin_fabs(double(next[r] - old[r])) < Range<T>::most_move;
      exact[r] = next[r];
      scale[r] = weight * factor[r];
    } else {
      scale[r] = weight / sum[r];
    }
    if (!good) {
      T log_sum;
      const T s = exact_row<T>(p, row[r], buffer + r * p.stride, log_sum);
      all_good = false;
      sums[r] = -1;
      scale[r] = weight / s;
      exact[r] = -log_sum;
      if constexpr (General) {
        exact[r] = exact_potential(p.rows, p.momentum, old[r], log_sum);
        scale[r] *= T(exp2_of(double(exact[r]) + double(log_sum)));
        const double exponent = -p.rows.inverse * double(old[r]);
        asked = exp2_of(exponent > 126 ? 126 : exponent);
      }
      if (log_sum == -T(__builtin_inf()) && weight == 0) {
        // A padded row: no allowed pair and no mass. Its potential is 0 by convention.
        exact[r] = scale[r] = 0;
        state = 1;
      } else if (!(s > 0) || !(log_sum - log_sum == 0) || !(exact[r] - exact[r] == 0)) {
        dead = 1;
        exact[r] = T(__builtin_nan(""));
        state = __builtin_nan("");
      } else {
        const double exponent = double(old[r]) + double(log_sum);
        state = exp2_of(exponent > 126 ? 126 : exponent);
      }
    }
    error += double(weight) * __builtin_fabs(state - asked);
    mass += double(weight) * state;
  }
  if (evaluate) return all_good;
  for (int64_t j = 0; j < p.stride; j += L) {
    V<T> c = load(partial + j);
    for (int r = 0; r < R; ++r) c += scale[r] * load(buffer + r * p.stride + j);
    store(partial + j, c);
  }
  return all_good;
}

template <class T, bool General>
void row_pass(const SinkhornProblem& p, void* buffer_, int64_t first, int64_t last, bool evaluate) {
  constexpr int R = kSinkhornRows, L = kLanes<T>;
  const FlushSubnormals flush;
  T* buffer = (T*)buffer_;
  for (int64_t block = first; block < last; ++block) {
    int64_t i = block * p.block_rows;
    const int64_t end = i + p.block_rows < p.n ? i + p.block_rows : p.n;
    T* partial = (T*)p.partial + block * p.stride;
    double error = 0, mass = 0;
    int64_t dead = 0;
    memset((void*)partial, 0, size_t(p.stride) * sizeof(T));
    while (i < end) {
      // The sums of a group first, then their logarithms a vector at a time.
      T sums[kSinkhornGroup], exact[kSinkhornGroup];
      const int count = int(end - i < kSinkhornGroup ? end - i : kSinkhornGroup);
      bool good = true;
      int r = 0;
      if (p.v && !evaluate) {
        for (; r + R <= count; r += R)
          good &= kept_rows<T, R, General>(p, i + r, sums + r, exact + r, partial, error, mass);
        for (; r < count; ++r)
          good &= kept_rows<T, 1, General>(p, i + r, sums + r, exact + r, partial, error, mass);
        dead |= good ? 0 : 2;  // not lost: to be done again
        good = true;
      }
      for (; r + R <= count; r += R)
        good &= few_rows<T, R, General>(p, i + r, sums + r, exact + r, buffer, partial, error, mass,
                                        dead, evaluate);
      for (; r < count; ++r)
        good &= few_rows<T, 1, General>(p, i + r, sums + r, exact + r, buffer, partial, error, mass,
                                        dead, evaluate);
      if constexpr (General) {
        for (r = 0; r < count; ++r) ((T*)p.f_new)[i + r] = exact[r];
        i += count;
        continue;
      }
      for (r = 0; r < count; r += L) {
        const int lanes = count - r < L ? count - r : L;
        store_n((T*)p.f_new + i + r,
                load_tail((const T*)p.f_old + i + r, lanes) - fast_log2(load_tail(sums + r, lanes)),
                lanes);
      }
      for (r = 0; !good && r < count; ++r)
        if (sums[r] < 0) ((T*)p.f_new)[i + r] = exact[r];
      i += count;
    }
    p.error[block] = error;
    p.mass[block] = mass;
    p.dead[block] = dead;
  }
}

// `count` columns (at most a vector) as exact log-sum-exps over the rows with mass.
template <class T, bool General>
__attribute__((noinline)) int64_t exact_columns(const SinkhornProblem& p, const int64_t* column,
                                                int count) {
  constexpr int L = kLanes<T>;
  const T *F = (const T*)p.f_new, *a = (const T*)p.a, *log_a = (const T*)p.log_a;
  const T *b = (const T*)p.b, *cost = (const T*)p.cost;
  const T kappa = T(p.kappa), infinity = T(__builtin_inf());
  T* G = (T*)p.g;
  const auto term = [&](int64_t i) {
    T picked[L] = {};
    for (int k = 0; k < count; ++k) picked[k] = cost[i * p.row_step + column[k]];
    return (log_a[i] + F[i]) - kappa * load(picked);
  };
  V<T> top = -splat_infinity<T>();
  for (int64_t i = 0; i < p.n; ++i)
    if (a[i] > 0) top = vmax(term(i), top);
  const V<T> shift = top == -infinity ? V<T>{} : top;
  V<T> sum{};
  for (int64_t i = 0; i < p.n; ++i)
    if (a[i] > 0) sum += fast_exp2(term(i) - shift);
  int64_t dead = 0;
  for (int k = 0; k < count; ++k) {
    const int64_t j = column[k];
    const T log_sum = shift[k] + log2_of(T(sum[k]));
    const T value = General ? exact_potential(p.columns, p.momentum, G[j], log_sum) : -log_sum;
    if (top[k] == -infinity && sum[k] == sum[k]) {
      G[j] = 0;
      dead |= b[j] != 0;
    } else {
      G[j] = value;
      dead |= !(value - value == 0);
    }
  }
  return dead;
}

template <class T, bool General>
void column_pass(const SinkhornProblem& p, int64_t first, int64_t last) {
  constexpr int L = kLanes<T>;
  const FlushSubnormals flush;
  const T low = T(Range<T>::column_low * p.total_a), high = Range<T>::column_high;
  T* G = (T*)p.g;
  for (int64_t chunk = first; chunk < last; ++chunk) {
    int64_t redo[kSinkhornColumns];
    int count = 0;
    const int64_t begin = chunk * kSinkhornColumns;
    const int64_t end = begin + kSinkhornColumns < p.m ? begin + kSinkhornColumns : p.m;
    for (int64_t j = begin; j < end; j += L) {
      V<T> sum{};
      for (int64_t k = 0; k < p.blocks; ++k) sum += load((const T*)p.partial + k * p.stride + j);
      if (p.v) sum *= load((const T*)p.v + j);
      const V<T> g = load(G + j);
      V<T> next;
      if constexpr (General)
        next = g + step_of(p.columns, p.momentum, fast_log2(sum) + T(p.columns.inverse) * g);
      else
        next = g - fast_log2(sum);
      const int lanes = int(end - j < L ? end - j : L);
      const auto good = (sum > low) & (sum < high);
      int bad = 0;
      for (int k = 0; k < lanes; ++k) {
        redo[count] = j + k;
        const int b = !good[k];
        count += b;
        bad += b;
      }
      store(G + j, lanes == L && !bad ? next : (good ? next : g));
    }
    int64_t dead = 0;
    for (int k = 0; k < count; k += L)
      dead |= exact_columns<T, General>(p, redo + k, count - k < L ? count - k : L);
    p.dead[p.blocks + chunk] = dead;
  }
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
