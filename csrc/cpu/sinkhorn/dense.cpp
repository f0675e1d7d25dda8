// Sinkhorn iterations on a dense cost matrix, in the log domain.
//
// In base 2: K = log2(e) / epsilon, F = K f, G = K g, and E_ij = 2^(F_i + G_j - K C_ij); the plan is
// a_i b_j E_ij. One iteration of the textbook makes two passes with an exponential each:
//   F_i -= log2 sum_j b_j E_ij            G_j -= log2 sum_i a_i E_ij
// Here the row pass keeps w_ij = 2^(F_i + G_j - K C_ij) of the *old* F in a buffer of a few rows. Its sum
// s_i = sum_j b_j w_ij gives the new F_i, and w_ij / s_i is already E_ij for the new F, so the same pass
// adds (a_i / s_i) w_ij to the column sums: one exponential and one read of C for a whole iteration.
// sum_i a_i |s_i - 1| is the marginal error of the state before the pass, at no cost.
//
// The old potential is the shift, so there is no pass for a maximum. Where it is a bad one (s_i or a
// column sum c_j leaves a range in which nothing that matters can have underflowed) that row or column
// alone is done again as an exact log-sum-exp. Terms below 2^-126 count as 2^-126: at most 1e-28 of a
// row, and a column sum is believed only from 1e-20 of the total mass on.
//
// An iteration on n x m: reads n m elements of C, n m exponentials, 10 vector operations each or so; the
// buffers stay in L1/L2. Row blocks depend on the shape alone and their column sums are added in order:
// same bits for any number of threads, and for any batch.
#include "../exponential.h"

namespace solera {

// One problem. Element pointers are float or double. `stride` is m rounded up to whole vectors; g, b and
// log_b are padded to it with values that give no weight.
struct SinkhornProblem {
  const void *cost, *a, *b, *log_a, *log_b;
  const void* f_old;
  void *f_new, *g;
  void* partial;           // [blocks][stride] column sums of a row block
  double *error, *mass;    // [blocks] sum_i a_i |s_i - 1| and sum_i a_i s_i of the state (f_old, g)
  int64_t* dead;           // [blocks + column chunks] set where no finite potential exists
  int64_t n, m, stride, block_rows, blocks;
  double kappa, total_a;
};
constexpr int64_t kSinkhornColumns = 256;  // columns finished at a time
constexpr int kSinkhornRows = 4;           // rows in flight, each with a buffer of `stride`
constexpr int kSinkhornGroup = 64;         // rows whose logarithms are taken together

struct SinkhornTable {
  void (*row_pass)(const SinkhornProblem&, void* buffer, int64_t first, int64_t last, bool evaluate);
  void (*column_pass)(const SinkhornProblem&, int64_t first, int64_t last);
  int64_t lanes;
};
struct SinkhornTables {
  SinkhornTable float32, float64;
};

namespace SOLERA_ISA {
namespace {

template <class T>
using V = AccVec<T>;

// Where a row sum or a column sum computed with the old potential as its shift is believed.
template <class T>
struct Range;
template <>
struct Range<float> {
  static constexpr float row_low = 1e-10f, row_high = 1e10f, column_low = 1e-20f, column_high = 1e20f;
  static constexpr float biggest = 3.4028234e38f;
};
template <>
struct Range<double> {
  static constexpr double row_low = 1e-100, row_high = 1e100, column_low = 1e-150, column_high = 1e150;
  static constexpr double biggest = 1.7976931348623157e308;
};

SOLERA_INLINE float log2_of(float x) { return __builtin_log2f(x); }
SOLERA_INLINE double log2_of(double x) { return __builtin_log2(x); }
SOLERA_INLINE double exp2_of(double x) { return __builtin_exp2(x); }

// lane_sum (the same order of additions) without leaving the registers.
SOLERA_INLINE float total_of(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  return lane_sum(v);
#endif
}
SOLERA_INLINE double total_of(vd v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_pd((__m512d)v);
#else
  return lane_sum(v);
#endif
}
template <class T>
SOLERA_INLINE V<T> splat_infinity() { return splat(T(__builtin_inf())); }

// Calls body(offset, vector of C's row) over the columns; the last vector may be partly zeros.
template <class T, class F>
SOLERA_INLINE void over_row(const T* row, int64_t m, const F& body) {
  constexpr int L = kLanes<T>;
  int64_t j = 0;
  for (; j + L <= m; j += L) body(j, load(row + j));
  if (j < m) body(j, load_tail(row + j, int(m - j)));
}

// One row as an exact log-sum-exp. Fills w with terms relative to the largest b_j 2^(..), returns their
// weighted sum and in `log_sum` the log2 of the true sum without F. A row without a term gives -inf.
template <class T>
__attribute__((noinline)) T exact_row(const SinkhornProblem& p, const T* row, T* w, T& log_sum) {
  const T *G = (const T*)p.g, *b = (const T*)p.b, *log_b = (const T*)p.log_b;
  const T kappa = T(p.kappa);
  V<T> top = -splat_infinity<T>();
  over_row(row, p.m, [&](int64_t j, V<T> c) {
    top = vmax(load(G + j) - kappa * c + load(log_b + j), top);
  });
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

template <class T, int R>
SOLERA_INLINE bool few_rows(const SinkhornProblem& p, int64_t i, T* sums, T* exact, T* buffer,
                            T* partial, double& error, double& mass, int64_t& dead, bool evaluate) {
  bool all_good = true;
  constexpr int L = kLanes<T>;
  const T *G = (const T*)p.g, *a = (const T*)p.a, *b = (const T*)p.b, *F = (const T*)p.f_old;
  const T kappa = T(p.kappa);
  const T* row[R];
  T old[R], sum[R], scale[R];
  V<T> total[R];
  for (int r = 0; r < R; ++r) {
    row[r] = (const T*)p.cost + (i + r) * p.m;
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
  for (int r = 0; r < R; ++r) {
    sum[r] = total_of(total[r]);
    const T weight = a[i + r];
    double state = double(sum[r]);
    sums[r] = sum[r];
    scale[r] = weight / sum[r];
    if (!(sum[r] > Range<T>::row_low && sum[r] < Range<T>::row_high)) {
      T log_sum;
      const T s = exact_row<T>(p, row[r], buffer + r * p.stride, log_sum);
      all_good = false;
      sums[r] = -1;
      scale[r] = weight / s;
      exact[r] = -log_sum;
      if (log_sum == -T(__builtin_inf()) && weight == 0) {
        // A padded row: no allowed pair and no mass. Its potential is 0 by convention.
        exact[r] = scale[r] = 0;
        state = 1;
      } else if (!(s > 0) || !(log_sum - log_sum == 0)) {
        dead = 1;
        exact[r] = T(__builtin_nan(""));
        state = __builtin_nan("");
      } else {
        const double exponent = double(old[r]) + double(log_sum);
        state = exp2_of(exponent > 126 ? 126 : exponent);
      }
    }
    error += double(weight) * __builtin_fabs(state - 1);
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

template <class T>
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
      for (; r + R <= count; r += R)
        good &= few_rows<T, R>(p, i + r, sums + r, exact + r, buffer, partial, error, mass, dead,
                               evaluate);
      for (; r < count; ++r)
        good &= few_rows<T, 1>(p, i + r, sums + r, exact + r, buffer, partial, error, mass, dead,
                               evaluate);
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
template <class T>
__attribute__((noinline)) int64_t exact_columns(const SinkhornProblem& p, const int64_t* column,
                                                int count) {
  constexpr int L = kLanes<T>;
  const T *F = (const T*)p.f_new, *a = (const T*)p.a, *log_a = (const T*)p.log_a;
  const T *b = (const T*)p.b, *cost = (const T*)p.cost;
  const T kappa = T(p.kappa), infinity = T(__builtin_inf());
  T* G = (T*)p.g;
  const auto term = [&](int64_t i) {
    T picked[L] = {};
    for (int k = 0; k < count; ++k) picked[k] = cost[i * p.m + column[k]];
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
    const T value = -(shift[k] + log2_of(T(sum[k])));
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

template <class T>
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
      const V<T> g = load(G + j), next = g - fast_log2(sum);
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
      dead |= exact_columns<T>(p, redo + k, count - k < L ? count - k : L);
    p.dead[p.blocks + chunk] = dead;
  }
}

}  // namespace

extern const SinkhornTables sinkhorn_tables;
const SinkhornTables sinkhorn_tables = {
    {row_pass<float>, column_pass<float>, kLanes<float>},
    {row_pass<double>, column_pass<double>, kLanes<double>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include <cmath>

#include "../parallel.h"

namespace solera {

SOLERA_PICK(SinkhornTables, sinkhorn_tables)

namespace {

constexpr double kLog2E = 1.4426950408889634074;

// Rows whose column sums are added up before they meet those of the other blocks. A matter of the shape
// alone, so that the bits are; at most 256 blocks.
int64_t rows_per_block(int64_t n) {
  const int64_t even = (n + 255) / 256;
  return even <= 64 ? 64 : (even + 3) / 4 * 4;
}

// Runs body(worker, first, last) over [0, count): `workers` equal shares, at once or one after another.
template <class F>
void share(int64_t workers, int64_t count, const F& body) {
  if (workers <= 1) {
    if (count > 0) body(0, int64_t(0), count);
    return;
  }
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      const int64_t first = count * w / workers, last = count * (w + 1) / workers;
      if (first < last) body(w, first, last);
    }
  });
}

struct SinkhornOptions {
  double epsilon, tolerance;
  int64_t max_iterations, check_every;
};

// All that one problem needs besides its inputs, for `workers` threads: nothing grows with iterations.
template <class T>
struct SinkhornScratch {
  int64_t n, m, stride, block_rows, blocks, chunks, workers;
  Tensor memory;
  T *f[2], *g, *b, *log_a, *log_b, *partial, *buffer;
  double *error, *mass;
  int64_t* dead;

  SinkhornScratch(const Tensor& like, int64_t n, int64_t m, int64_t lanes, int64_t workers)
      : n(n), m(m), stride((m + lanes - 1) / lanes * lanes), block_rows(rows_per_block(n)),
        blocks((n + block_rows - 1) / block_rows),
        chunks((m + kSinkhornColumns - 1) / kSinkhornColumns), workers(workers) {
    int64_t bytes = 0;
    const auto take = [&](int64_t count, int64_t size) {
      const int64_t at = bytes;
      bytes += (count * size + 63) / 64 * 64;
      return at;
    };
    const int64_t size = sizeof(T);
    const int64_t at[] = {take(n, size), take(n, size), take(stride, size), take(stride, size),
                          take(n, size), take(stride, size), take(blocks * stride, size),
                          take(workers * kSinkhornRows * stride, size), take(blocks, 8),
                          take(blocks, 8), take(blocks + chunks, 8)};
    memory = empty_like(like, {bytes / size + 1});
    char* base = static_cast<char*>(memory.mutable_data_ptr());
    T** const elements[] = {&f[0], &f[1], &g, &b, &log_a, &log_b, &partial, &buffer};
    for (int k = 0; k < 8; ++k) *elements[k] = reinterpret_cast<T*>(base + at[k]);
    error = reinterpret_cast<double*>(base + at[8]);
    mass = reinterpret_cast<double*>(base + at[9]);
    dead = reinterpret_cast<int64_t*>(base + at[10]);
  }
};

template <class T>
struct SinkhornIo {
  const T *cost, *a, *b, *f_init, *g_init;  // the potentials to start from may be null
  T *f, *g, *value, *error;
  int64_t* iterations;
  bool* converged;
};

// Total of a weight vector in double, or NaN if a weight is negative, NaN or infinite.
template <class T>
double total_weight(const T* weight, int64_t count) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += weight[i] >= 0 ? double(weight[i]) : NAN;
  return std::isfinite(total) ? total : NAN;
}

template <class T>
void solve(const SinkhornTable& table, const SinkhornOptions& options, const SinkhornIo<T>& io,
           SinkhornScratch<T>& s) {
  const int64_t n = s.n, m = s.m;
  const double kappa = kLog2E / options.epsilon;
  const double total_a = total_weight(io.a, n), total_b = total_weight(io.b, m);
  SinkhornProblem p{io.cost, io.a, s.b, s.log_a, s.log_b, nullptr, nullptr, s.g, s.partial, s.error,
                    s.mass, s.dead, n, m, s.stride, s.block_rows, s.blocks, kappa, total_a};
  for (int64_t i = 0; i < n; ++i) {
    s.f[0][i] = io.f_init ? T(kappa * io.f_init[i]) : T(0);
    s.log_a[i] = std::log2(io.a[i]);
  }
  for (int64_t j = 0; j < s.stride; ++j) {
    const bool real = j < m;
    s.g[j] = real ? (io.g_init ? T(kappa * io.g_init[j]) : T(0)) : T(-1e30);
    s.b[j] = real ? io.b[j] : T(0);
    s.log_b[j] = std::log2(s.b[j]);
  }

  // The error of the state before a row pass, or NaN where that pass found no finite potential.
  double error = NAN, mass = NAN;
  bool alive = total_a > 0 && total_b > 0;
  const auto row_pass = [&](int64_t old, bool evaluate) {
    p.f_old = s.f[old];
    p.f_new = s.f[1 - old];
    share(s.workers, s.blocks, [&](int64_t worker, int64_t first, int64_t last) {
      table.row_pass(p, s.buffer + worker * kSinkhornRows * s.stride, first, last, evaluate);
    });
    error = mass = 0;
    for (int64_t k = 0; k < s.blocks; ++k) {
      error += s.error[k];
      mass += s.mass[k];
      if (s.dead[k]) alive = false;
    }
  };
  int64_t current = 0, iteration = 0;
  bool evaluated = false;
  while (alive && iteration < options.max_iterations) {
    row_pass(current, false);
    if (options.tolerance > 0 && iteration > 0 && iteration % options.check_every == 0 &&
        error <= options.tolerance) {
      evaluated = true;  // f_old and g are the converged state: the new row potentials are dropped
      break;
    }
    if (!alive) break;
    // A few microseconds of sums are not worth waking the threads for.
    const int64_t workers = s.blocks * m < 65536 ? 1 : s.workers;
    share(workers, s.chunks, [&](int64_t, int64_t first, int64_t last) {
      table.column_pass(p, first, last);
    });
    for (int64_t k = 0; k < s.chunks; ++k)
      if (s.dead[s.blocks + k]) alive = false;
    current = 1 - current;
    ++iteration;
  }
  if (alive && !evaluated) row_pass(current, true);
  *io.iterations = iteration;
  if (!alive) {
    const T none = T(NAN);
    for (int64_t i = 0; i < n; ++i) io.f[i] = none;
    for (int64_t j = 0; j < m; ++j) io.g[j] = none;
    *io.value = *io.error = none;
    *io.converged = false;
    return;
  }
  // The gauge <a, f> = <b, g>, and the dual value <a, f> + <b, g> - epsilon (sum_ij P_ij - a_i b_j).
  const T* F = s.f[current];
  double af = 0, bg = 0;
  for (int64_t i = 0; i < n; ++i) af += double(io.a[i]) * double(F[i]);
  for (int64_t j = 0; j < m; ++j) bg += double(io.b[j]) * double(s.g[j]);
  const double shift = (bg - af) / (total_a + total_b);
  for (int64_t i = 0; i < n; ++i) io.f[i] = T((double(F[i]) + shift) / kappa);
  for (int64_t j = 0; j < m; ++j) io.g[j] = T((double(s.g[j]) - shift) / kappa);
  *io.value = T((af + bg + shift * (total_a - total_b)) / kappa -
                options.epsilon * (mass - total_a * total_b));
  *io.error = T(error);
  *io.converged = error <= options.tolerance;
}

template <class T>
void solve_all(const SinkhornTable& table, const SinkhornOptions& options, const Tensor& like,
               const SinkhornIo<T>& io, int64_t batch, int64_t n, int64_t m) {
  const auto item = [&](int64_t k) {
    return SinkhornIo<T>{io.cost + k * n * m, io.a + k * n, io.b + k * m,
                         io.f_init ? io.f_init + k * n : nullptr,
                         io.g_init ? io.g_init + k * m : nullptr,
                         io.f + k * n, io.g + k * m, io.value + k, io.error + k, io.iterations + k,
                         io.converged + k};
  };
  // Waking the threads at every iteration pays from some 128k elements on; a batch that gives every
  // thread problems of its own is split between problems instead. Neither changes a bit.
  const int64_t threads = int64_t(torch::stable::get_num_threads());
  const bool large = n * m >= 131072;
  if (large && batch < 2 * threads) {
    SinkhornScratch<T> scratch(like, n, m, table.lanes, threads);
    for (int64_t k = 0; k < batch; ++k) solve(table, options, item(k), scratch);
    return;
  }
  parallel_for(0, batch, grain_for(n * m * int64_t(sizeof(T))), [&](int64_t begin, int64_t end) {
    SinkhornScratch<T> scratch(like, n, m, table.lanes, 1);
    for (int64_t k = begin; k < end; ++k) solve(table, options, item(k), scratch);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn_dense(
    const Tensor& cost_in, const Tensor& a_in, const Tensor& b_in, OptTensor f_in, OptTensor g_in,
    double epsilon, int64_t max_iterations, double tolerance, int64_t check_every) {
  const Tensor cost = dense(cost_in), a = dense(a_in), b = dense(b_in);
  const int64_t batch = cost.size(0), n = cost.size(1), m = cost.size(2);
  Tensor f0, g0;
  if (f_in.has_value()) f0 = dense(*f_in);
  if (g_in.has_value()) g0 = dense(*g_in);
  Tensor f = empty_like(cost, {batch, n}), g = empty_like(cost, {batch, m});
  Tensor value = empty_like(cost, {batch}), error = empty_like(cost, {batch});
  Tensor iterations = empty_like(cost, {batch}, ScalarType::Long);
  Tensor converged = empty_like(cost, {batch}, ScalarType::Bool);
  const SinkhornOptions options{epsilon, tolerance, max_iterations, check_every};
  const auto run = [&](auto zero, const SinkhornTable& table) {
    using T = decltype(zero);
    const auto in = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
    const auto out = [](Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); };
    const SinkhornIo<T> io{in(cost), in(a), in(b), f_in.has_value() ? in(f0) : nullptr,
                           g_in.has_value() ? in(g0) : nullptr, out(f), out(g), out(value), out(error),
                           static_cast<int64_t*>(iterations.mutable_data_ptr()),
                           static_cast<bool*>(converged.mutable_data_ptr())};
    solve_all<T>(table, options, cost, io, batch, n, m);
  };
  if (dtype_of(cost) == kFloat64)
    run(double(0), pick_sinkhorn_tables().float64);
  else
    run(float(0), pick_sinkhorn_tables().float32);
  return {f, g, value, iterations, error, converged};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("sinkhorn_dense", TORCH_BOX(&sinkhorn_dense));
}

}  // namespace solera
#endif  // SOLERA_FRONT
