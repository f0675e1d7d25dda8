// Sinkhorn iterations on a dense cost matrix, in the log domain: the loop, its stopping rule, its
// memory and its threads. What an iteration computes is in dense_passes.h.
#include "dense_passes.h"

namespace solera {

struct SinkhornTable {
  void (*row_pass)(const SinkhornProblem&, void* buffer, int64_t first, int64_t last,
                   bool evaluate);
  void (*column_pass)(const SinkhornProblem&, int64_t first, int64_t last);
  double (*since_kept)(const SinkhornProblem&);
  int64_t lanes;
};
struct SinkhornTables {
  SinkhornTable float32, float64, general32, general64;
};

namespace SOLERA_ISA {

extern const SinkhornTables sinkhorn_tables;
const SinkhornTables sinkhorn_tables = {
    {row_pass<float, false>, column_pass<float, false>, since_kept<float>, kLanes<float>},
    {row_pass<double, false>, column_pass<double, false>, since_kept<double>, kLanes<double>},
    {row_pass<float, true>, column_pass<float, true>, since_kept<float>, kLanes<float>},
    {row_pass<double, true>, column_pass<double, true>, since_kept<double>, kLanes<double>},
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

// Rows whose column sums are added up before they meet those of the other blocks. A matter of the
// shape alone, so that the bits are; at most 256 blocks.
int64_t rows_per_block(int64_t n) {
  const int64_t even = (n + 255) / 256;
  return even <= 64 ? 64 : (even + 3) / 4 * 4;
}

// Runs body(worker, first, last) over [0, count): `workers` equal shares, at once or one after
// another.
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
  double rho_a, rho_b, momentum;  // rho: infinity for a hard marginal
  SinkhornSide rows, columns;

  bool balanced() const { return std::isinf(rho_a) && std::isinf(rho_b); }
  bool general() const { return !balanced() || momentum != 1; }
  // What is looked at for the tolerance, and what is returned, comes from a plain iteration.
  double momentum_at(int64_t iteration) const {
    const bool checked = tolerance > 0 && (iteration + 1) % check_every == 0;
    return checked || iteration + 1 == max_iterations ? 1 : momentum;
  }
  // The iterations that make, or evaluate, a state that may be returned.
  bool looked_at(int64_t iteration) const {
    const bool checked =
        tolerance > 0 && ((iteration + 1) % check_every == 0 || iteration % check_every == 0);
    return checked || iteration + 1 == max_iterations;
  }
  // Whether a matrix of n x m elements is worth keeping: used more than once, and not a burden.
  bool keeps(int64_t bytes) const {
    return max_iterations > 4 && (tolerance == 0 || check_every > 4) && bytes <= 1 << 28;
  }
};

// By how much, over epsilon a_i h_i, the dual value rises when a potential takes the step
// -lambda w L (natural logarithms): nonnegative near L = 0.
double dual_rise(double inverse, double lambda, double w, double L) {
  const double penalty =
      inverse > 0 ? std::expm1(w * lambda * inverse * L) / inverse : w * lambda * L;
  return std::exp(L) - std::exp(L * (1 - w * lambda)) - penalty;
}

// The side's constants, with the range of L around 0 in which the step by w raises the dual value.
SinkhornSide side_of(double epsilon, double rho, double w) {
  const double inverse = std::isinf(rho) ? 0 : epsilon / rho, lambda = 1 / (1 + inverse);
  const auto reach = [&](double sign) {
    double at = 0, step = 0.05;
    while (at < 60 && dual_rise(inverse, lambda, w, sign * (at + step)) >= 0) at += step;
    return sign * at * kLog2E;
  };
  return w == 1 ? SinkhornSide{inverse, lambda, 0, 0}
                : SinkhornSide{inverse, lambda, reach(-1), reach(1)};
}

// All that one problem needs besides its inputs, for `workers` threads: nothing grows with
// iterations.
template <class T>
struct SinkhornScratch {
  int64_t n, m, stride, block_rows, blocks, chunks, workers;
  Tensor memory;
  T *f[2], *g, *b, *log_a, *log_b, *partial, *buffer;
  T *kept, *f_kept, *g_kept, *u, *v, *bv;  // null if there is to be no kept matrix
  double *error, *mass;
  int64_t* dead;

  // The layout that a problem of n x m alone would have, so that padding does not change a bit.
  void fit(int64_t rows, int64_t columns, int64_t lanes) {
    n = rows;
    m = columns;
    stride = (m + lanes - 1) / lanes * lanes;
    block_rows = rows_per_block(n);
    blocks = (n + block_rows - 1) / block_rows;
    chunks = (m + kSinkhornColumns - 1) / kSinkhornColumns;
  }

  SinkhornScratch(const Tensor& like, int64_t rows, int64_t columns, int64_t lanes, int64_t workers,
                  bool keep)
      : workers(workers) {
    fit(rows, columns, lanes);
    // The most blocks that a problem of at most so many rows has.
    const int64_t most = n < 256 * 64 ? blocks : 256;
    int64_t bytes = 0;
    const auto take = [&](int64_t count, int64_t size) {
      const int64_t at = bytes;
      bytes += (count * size + 63) / 64 * 64;
      return at;
    };
    const int64_t size = sizeof(T);
    const int64_t at[] = {take(n, size),
                          take(n, size),
                          take(stride, size),
                          take(stride, size),
                          take(n, size),
                          take(stride, size),
                          take(most * stride, size),
                          take(workers * kSinkhornRows * stride, size),
                          take(most, 8),
                          take(most, 8),
                          take(most + chunks, 8),
                          take(keep ? rows * stride : 0, size),
                          take(rows, size),
                          take(stride, size),
                          take(rows, size),
                          take(stride, size),
                          take(stride, size)};
    memory = empty_like(like, {bytes / size + 1});
    char* base = static_cast<char*>(memory.mutable_data_ptr());
    T** const elements[] = {&f[0], &f[1], &g, &b, &log_a, &log_b, &partial, &buffer};
    for (int k = 0; k < 8; ++k) *elements[k] = reinterpret_cast<T*>(base + at[k]);
    error = reinterpret_cast<double*>(base + at[8]);
    mass = reinterpret_cast<double*>(base + at[9]);
    dead = reinterpret_cast<int64_t*>(base + at[10]);
    T** const more[] = {&kept, &f_kept, &g_kept, &u, &v, &bv};
    for (int k = 0; k < 6; ++k) *more[k] = reinterpret_cast<T*>(base + at[11 + k]);
    if (!keep) kept = nullptr;
  }
};

template <class T>
struct SinkhornIo {
  const T *cost, *a, *b, *f_init, *g_init;  // the potentials to start from may be null
  T *f, *g, *value, *error;
  int64_t* iterations;
  bool* converged;
  int64_t n, m;        // of this problem
  int64_t rows, step;  // n and m of the padded batch
};

// <weight, phi(potential)> for phi(f) = f on a hard side, else -rho (exp(-f / rho) - 1).
template <class T>
double dual_part(const T* weight, const T* potential, int64_t count, double kappa, double rho) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double f = double(potential[i]) / kappa;
    if (weight[i] > 0)
      total += double(weight[i]) * (std::isinf(rho) ? f : -rho * std::expm1(-f / rho));
  }
  return total;
}

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
  const int64_t n = io.n, m = io.m;
  for (int64_t i = n; i < io.rows; ++i) io.f[i] = 0;
  for (int64_t j = m; j < io.step; ++j) io.g[j] = 0;
  if (n == 0 || m == 0) {
    for (int64_t i = 0; i < n; ++i) io.f[i] = 0;
    for (int64_t j = 0; j < m; ++j) io.g[j] = 0;
    *io.value = *io.error = 0;
    *io.iterations = 0;
    *io.converged = true;
    return;
  }
  s.fit(n, m, table.lanes);
  const double kappa = kLog2E / options.epsilon;
  const double total_a = total_weight(io.a, n), total_b = total_weight(io.b, m);
  SinkhornProblem p{io.cost,
                    io.a,
                    s.b,
                    s.log_a,
                    s.log_b,
                    nullptr,
                    nullptr,
                    s.g,
                    s.partial,
                    s.error,
                    s.mass,
                    s.dead,
                    n,
                    m,
                    s.stride,
                    s.block_rows,
                    s.blocks,
                    io.step,
                    kappa,
                    total_a,
                    1,
                    options.rows,
                    options.columns,
                    s.kept,
                    s.f_kept,
                    s.g_kept,
                    s.u,
                    nullptr,
                    s.bv};
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
    bool good = true;
    for (int64_t k = 0; k < s.blocks; ++k) {
      error += s.error[k];
      mass += s.mass[k];
      if (s.dead[k] & 1) alive = false;
      if (s.dead[k] & 2) good = false;
    }
    return good;
  };
  // A pass over the kept matrix if there is one that serves, else a fresh one, which leaves one
  // unless a row was done by an exact log-sum-exp.
  bool have_kept = false;
  const auto next_pass = [&](int64_t old, bool fresh) {
    p.f_old = s.f[old];
    if (have_kept && !fresh) {
      p.v = s.v;
      if (table.since_kept(p) <= 10 && row_pass(old, false)) return;
    }
    p.v = nullptr;
    for (int64_t i = 0; s.kept && i < n; ++i) s.f_kept[i] = s.f[old][i];
    for (int64_t j = 0; s.kept && j < s.stride; ++j) s.g_kept[j] = s.g[j];
    have_kept = row_pass(old, false) && s.kept;
  };
  int64_t current = 0, iteration = 0;
  bool evaluated = false;
  while (alive && iteration < options.max_iterations) {
    p.momentum = options.momentum_at(iteration);
    next_pass(current, options.looked_at(iteration));
    if (options.tolerance > 0 && iteration > 0 && iteration % options.check_every == 0 &&
        error <= options.tolerance) {
      evaluated = true;  // f_old and g are the converged state: the new row potentials are dropped
      break;
    }
    if (!alive) break;
    // A few microseconds of sums are not worth waking the threads for.
    const int64_t workers = s.blocks * m < 65536 ? 1 : s.workers;
    share(workers, s.chunks,
          [&](int64_t, int64_t first, int64_t last) { table.column_pass(p, first, last); });
    for (int64_t k = 0; k < s.chunks; ++k)
      if (s.dead[s.blocks + k]) alive = false;
    current = 1 - current;
    ++iteration;
  }
  p.v = nullptr;
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
  // The dual value; balanced, the gauge <a, f> = <b, g> too: a constant moves from one to the
  // other.
  const T* F = s.f[current];
  const double left = dual_part(io.a, F, n, kappa, options.rho_a);
  const double right = dual_part(io.b, s.g, m, kappa, options.rho_b);
  const double shift = options.balanced() ? (right - left) / (total_a + total_b) : 0;
  for (int64_t i = 0; i < n; ++i) io.f[i] = T(double(F[i]) / kappa + shift);
  for (int64_t j = 0; j < m; ++j) io.g[j] = T(double(s.g[j]) / kappa - shift);
  *io.value =
      T(left + right + shift * (total_a - total_b) - options.epsilon * (mass - total_a * total_b));
  *io.error = T(error);
  *io.converged = error <= options.tolerance;
}

template <class T>
void solve_all(const SinkhornTable& table, const SinkhornOptions& options, const Tensor& like,
               const SinkhornIo<T>& io, const int64_t* lengths, int64_t batch, int64_t n,
               int64_t m) {
  const auto length = [&](int64_t at, int64_t most) {
    return !lengths || lengths[at] > most ? most : lengths[at] < 0 ? 0 : lengths[at];
  };
  const auto item = [&](int64_t k) {
    return SinkhornIo<T>{io.cost + k * n * m,
                         io.a + k * n,
                         io.b + k * m,
                         io.f_init ? io.f_init + k * n : nullptr,
                         io.g_init ? io.g_init + k * m : nullptr,
                         io.f + k * n,
                         io.g + k * m,
                         io.value + k,
                         io.error + k,
                         io.iterations + k,
                         io.converged + k,
                         length(2 * k, n),
                         length(2 * k + 1, m),
                         n,
                         m};
  };
  // Waking the threads at every iteration pays from some 128k elements on; a batch that gives every
  // thread problems of its own is split between problems instead. Neither changes a bit.
  const int64_t threads = int64_t(torch::stable::get_num_threads());
  const bool large = n * m >= 131072;
  const bool keep = options.keeps(n * m * int64_t(sizeof(T)));
  if (large && batch < 2 * threads) {
    SinkhornScratch<T> scratch(like, n, m, table.lanes, threads, keep);
    for (int64_t k = 0; k < batch; ++k) solve(table, options, item(k), scratch);
    return;
  }
  parallel_for(0, batch, grain_for(n * m * int64_t(sizeof(T))), [&](int64_t begin, int64_t end) {
    SinkhornScratch<T> scratch(like, n, m, table.lanes, 1, keep);
    for (int64_t k = begin; k < end; ++k) solve(table, options, item(k), scratch);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn_dense(
    const Tensor& cost_in, const Tensor& a_in, const Tensor& b_in, OptTensor f_in, OptTensor g_in,
    double epsilon, int64_t max_iterations, double tolerance, int64_t check_every,
    std::optional<double> rho_a, std::optional<double> rho_b, double momentum, OptTensor lengths) {
  const Tensor cost = dense(cost_in), a = dense(a_in), b = dense(b_in);
  const int64_t batch = cost.size(0), n = cost.size(1), m = cost.size(2);
  Tensor f0, g0;
  if (f_in.has_value()) f0 = dense(*f_in);
  if (g_in.has_value()) g0 = dense(*g_in);
  Tensor f = empty_like(cost, {batch, n}), g = empty_like(cost, {batch, m});
  Tensor value = empty_like(cost, {batch}), error = empty_like(cost, {batch});
  Tensor iterations = empty_like(cost, {batch}, ScalarType::Long);
  Tensor converged = empty_like(cost, {batch}, ScalarType::Bool);
  const double hard = INFINITY, ra = rho_a.value_or(hard), rb = rho_b.value_or(hard);
  const SinkhornOptions options{epsilon,
                                tolerance,
                                max_iterations,
                                check_every,
                                ra,
                                rb,
                                momentum,
                                side_of(epsilon, ra, momentum),
                                side_of(epsilon, rb, momentum)};
  Tensor bounds;
  if (lengths.has_value()) bounds = dense(*lengths);
  const auto run = [&](auto zero, const SinkhornTable& table) {
    using T = decltype(zero);
    const auto in = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
    const auto out = [](Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); };
    const SinkhornIo<T> io{in(cost),
                           in(a),
                           in(b),
                           f_in.has_value() ? in(f0) : nullptr,
                           g_in.has_value() ? in(g0) : nullptr,
                           out(f),
                           out(g),
                           out(value),
                           out(error),
                           static_cast<int64_t*>(iterations.mutable_data_ptr()),
                           static_cast<bool*>(converged.mutable_data_ptr()),
                           n,
                           m,
                           n,
                           m};
    const void* at = lengths.has_value() ? bounds.const_data_ptr() : nullptr;
    solve_all<T>(table, options, cost, io, static_cast<const int64_t*>(at), batch, n, m);
  };
  const auto& tables = pick_sinkhorn_tables();
  if (dtype_of(cost) == kFloat64)
    run(double(0), options.general() ? tables.general64 : tables.float64);
  else
    run(float(0), options.general() ? tables.general32 : tables.float32);
  return {f, g, value, iterations, error, converged};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) { m.impl("sinkhorn_dense", TORCH_BOX(&sinkhorn_dense)); }

}  // namespace solera
#endif  // SOLERA_FRONT
