// Sinkhorn iterations between two clouds of points, in the log domain, the cost never stored: the
// loop, its stopping rule, its memory and its threads. What a pass computes is in
// streaming_passes.h.
#include "streaming_passes.h"

namespace solera {

struct StreamingTables {
  StreamingTable float32, float64;
};

namespace SOLERA_ISA {
namespace {

template <class T>
constexpr StreamingTable table() {
  return {
      {streaming_rows<T, Product<T>>, streaming_rows<T, ProductDistance<T>>,
       streaming_rows<T, Differences<T, 2, kSquared>>,
       streaming_rows<T, Differences<T, 3, kSquared>>,
       streaming_rows<T, Differences<T, 0, kSquared>>, streaming_rows<T, Differences<T, 2, kRoot>>,
       streaming_rows<T, Differences<T, 3, kRoot>>, streaming_rows<T, Differences<T, 0, kRoot>>,
       streaming_rows<T, Differences<T, 0, kAbsolute>>},
      streaming_columns<T>,
      kLanes<T>};
}

}  // namespace

extern const StreamingTables streaming_tables;
const StreamingTables streaming_tables = {table<float>(), table<double>()};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "streaming_points.h"

namespace solera {

SOLERA_PICK(StreamingTables, streaming_tables)

namespace {

struct StreamingOptions {
  const double* epsilons;
  int64_t steps, iterations;  // of the schedule; in all
  double rho_a, rho_b;        // negative: a hard marginal
  double momentum, tolerance;
  int64_t check_every;
  bool jacobi;
};

double tilt_of(double epsilon, double rho) { return rho < 0 ? 0 : epsilon / rho; }
double damping_of(double epsilon, double rho) { return 1 / (1 + tilt_of(epsilon, rho)); }

template <class T>
struct StreamingIo {
  const T *x, *y, *a, *b, *f_init, *g_init;  // y and b null: the cloud with itself
  T *f, *g, *value, *error;
  int64_t* iterations;
  bool* converged;
};

template <class T>
void solve(const StreamingTable& table, const StreamingOptions& o, const StreamingIo<T>& io,
           int64_t cost, int64_t n, int64_t m, int64_t d, int64_t workers) {
  const int64_t lanes = table.lanes;
  const bool alone = io.y == nullptr;
  const StreamingGeometry geometry = geometry_of(cost, d);
  const std::vector<double> centre =
      centre_of(io.x, n, alone ? io.x : io.y, alone ? n : m, d, cost);
  const Cloud<T> x(io.x, n, d, lanes, centre.data(), !geometry.product());
  std::unique_ptr<Cloud<T>> other;
  if (!alone) other.reset(new Cloud<T>(io.y, m, d, lanes, centre.data(), !geometry.product()));
  const Cloud<T>& y = alone ? x : *other;
  const T T0 = T(0), far = T(-1e30);
  const double first_kappa = kLog2E / o.epsilons[0];
  std::vector<T> F[2] = {padded_list(io.f_init, n, x.stride, T(first_kappa), far), {}};
  F[1] = F[0];
  std::vector<T> G =
      alone ? std::vector<T>() : padded_list(io.g_init, m, y.stride, T(first_kappa), far);
  const std::vector<T> a = padded_list(io.a, n, x.stride, T(1), T0), log_a = logarithms(a);
  const std::vector<T> b = alone ? a : padded_list(io.b, m, y.stride, T(1), T0);
  const std::vector<T> log_b = alone ? log_a : logarithms(b);
  const double total_a = total_weight(io.a, n), total_b = alone ? total_a : total_weight(io.b, m);
  const auto lift_by = [&](double kappa, double sign) {
    for (int64_t i = 0; i < n; ++i)
      F[0][size_t(i)] =
          T(double(F[0][size_t(i)]) + sign * kappa * geometry.lift * double(x.squares[size_t(i)]));
    for (int64_t j = 0; !alone && j < m; ++j)
      G[size_t(j)] =
          T(double(G[size_t(j)]) + sign * kappa * geometry.lift * double(y.squares[size_t(j)]));
  };
  lift_by(first_kappa, -1);

  const int64_t blocks = std::min<int64_t>(64, (n + 31) / 32);
  const int64_t block_rows = (n + blocks - 1) / blocks;
  std::vector<T> partial(size_t(alone ? 0 : blocks * y.stride));
  std::vector<double> errors(static_cast<size_t>(blocks)), masses(static_cast<size_t>(blocks));
  std::vector<int64_t> deads(static_cast<size_t>(blocks)), redo(static_cast<size_t>(m));
  Solver<T> solver(table, geometry, std::max(x.stride, y.stride), workers);
  for (auto& own : solver.memory) own.step = std::min(own.step, y.stride);

  StreamingProblem p{};
  p.x = x.points.data();
  p.yt = y.transposed.data();
  p.y = y.points.data();
  p.xx = x.squares.data();
  p.yy = y.squares.data();
  p.a = a.data();
  p.b = b.data();
  p.log_b = log_b.data();
  p.n = n;
  p.m = m;
  p.d = d;
  p.stride = y.stride;

  double error = NAN, mass = NAN, kappa = first_kappa, epsilon = o.epsilons[0];
  bool alive = total_a > 0 && total_b > 0;
  int64_t current = 0;
  const auto row_pass = [&](bool evaluate, bool exact, double relaxation) {
    p.alpha = geometry.factor * kappa;
    p.lift = geometry.lift * kappa;
    p.tilt = tilt_of(epsilon, o.rho_a);
    p.damping = damping_of(epsilon, o.rho_a);
    p.relaxation = relaxation;
    p.jacobi = o.jacobi;
    p.f_old = F[current].data();
    p.f_new = F[1 - current].data();
    p.g = alone ? F[current].data() : G.data();
    share(workers, blocks, [&](int64_t w, int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) {
        const size_t at = size_t(k);
        errors[at] = masses[at] = 0;
        deads[at] = 0;
        const int64_t row = std::min(n, k * block_rows), end = std::min(n, row + block_rows);
        T* sums = evaluate || alone ? nullptr : partial.data() + k * y.stride;
        solver.rows(p, solver.memory[size_t(w)], row, end, sums, exact, errors[at], masses[at],
                    deads[at]);
      }
    });
    error = mass = 0;
    for (size_t k = 0; k < size_t(blocks); ++k) {
      error += errors[k];
      mass += masses[k];
      if (deads[k]) alive = false;
    }
  };
  const auto column_pass = [&](double relaxation) {
    p.tilt = tilt_of(epsilon, o.rho_b);
    p.damping = damping_of(epsilon, o.rho_b);
    int64_t dead = 0;
    const int64_t count =
        table.columns(p, partial.data(), blocks, total_a, G.data(), 0, m, redo.data(), &dead);
    if (dead) alive = false;
    if (count == 0) return;
    // The columns whose sum is not believed, as rows of the transposed problem.
    std::vector<T> points(static_cast<size_t>(count * d)), squares(static_cast<size_t>(count));
    std::vector<T> out(static_cast<size_t>(count));
    for (int64_t c = 0; c < count; ++c) {
      std::memcpy(points.data() + c * d, y.points.data() + redo[size_t(c)] * d,
                  size_t(d) * sizeof(T));
      squares[size_t(c)] = y.squares[size_t(redo[size_t(c)])];
    }
    StreamingProblem q = p;
    q.x = points.data();
    q.xx = squares.data();
    q.yt = x.transposed.data();
    q.y = x.points.data();
    q.yy = x.squares.data();
    q.a = nullptr;
    q.b = a.data();
    q.log_b = log_a.data();
    q.g = F[o.jacobi ? current : 1 - current].data();
    q.f_old = nullptr;
    q.f_new = out.data();
    q.n = count;
    q.m = n;
    q.stride = x.stride;
    for (auto& own : solver.memory)
      own.step = std::min<int64_t>(own.buffer.size() / kStreamingGroup, x.stride);
    solver.softmin(q);
    for (auto& own : solver.memory)
      own.step = std::min<int64_t>(own.buffer.size() / kStreamingGroup, y.stride);
    for (int64_t c = 0; c < count; ++c) {
      T& held = G[size_t(redo[size_t(c)])];
      const double old = double(held);
      held = T(old + relaxation * (double(out[size_t(c)]) - old));
      if (!std::isfinite(held)) alive = false;
    }
  };

  int64_t iteration = 0;
  bool evaluated = false;
  while (alive && iteration < o.iterations) {
    const double next = o.epsilons[std::min(iteration, o.steps - 1)];
    const bool moved = next != epsilon;
    if (moved) {
      const double ratio = epsilon / next;
      for (int64_t i = 0; i < n; ++i) F[current][size_t(i)] *= T(ratio);
      for (int64_t j = 0; !alone && j < m; ++j) G[size_t(j)] *= T(ratio);
      epsilon = next;
      kappa = kLog2E / next;
    }
    const double relaxation = !o.jacobi ? o.momentum : iteration == 0 ? 1.0 : 0.5;
    row_pass(false, moved || (iteration == 0 && io.f_init == nullptr), relaxation);
    if (o.tolerance > 0 && iteration >= o.steps && (iteration - o.steps + 1) % o.check_every == 0 &&
        error <= o.tolerance) {
      evaluated = true;
      break;
    }
    if (!alive) break;
    if (!alone) column_pass(relaxation);
    current = 1 - current;
    ++iteration;
  }
  if (alive && !evaluated && io.value) row_pass(true, false, 1);
  if (io.iterations) *io.iterations = iteration;
  if (!alive) {
    const T none = T(NAN);
    for (int64_t i = 0; i < n; ++i) io.f[i] = none;
    for (int64_t j = 0; !alone && j < m; ++j) io.g[j] = none;
    if (io.value) {
      *io.value = *io.error = none;
      *io.converged = false;
    }
    return;
  }
  // Unlifted, in the gauge <a, f> = <b, g> where a constant can be moved, and the dual value.
  const bool free = o.rho_a < 0 && o.rho_b < 0 && !alone && !o.jacobi;
  const auto potential = [&](const std::vector<T>& from, const Cloud<T>& cloud, int64_t i) {
    return (double(from[size_t(i)]) + kappa * geometry.lift * double(cloud.squares[size_t(i)])) /
           kappa;
  };
  double af = 0, bg = 0;
  for (int64_t i = 0; i < n; ++i) af += double(io.a[i]) * potential(F[current], x, i);
  for (int64_t j = 0; !alone && j < m; ++j) bg += double(io.b[j]) * potential(G, y, j);
  const double shift = free ? (bg - af) / (total_a + total_b) : 0;
  double left = 0, right = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double f = potential(F[current], x, i) + shift;
    io.f[i] = T(f);
    if (io.value) left += double(io.a[i]) * (o.rho_a < 0 ? f : o.rho_a * -std::expm1(-f / o.rho_a));
  }
  for (int64_t j = 0; !alone && j < m; ++j) {
    const double g = potential(G, y, j) - shift;
    io.g[j] = T(g);
    if (io.value)
      right += double(io.b[j]) * (o.rho_b < 0 ? g : o.rho_b * -std::expm1(-g / o.rho_b));
  }
  if (!io.value) return;
  *io.value = T(left + right - epsilon * (mass - total_a * total_b));
  *io.error = T(error);
  *io.converged = error <= o.tolerance;
}

template <class F>
void in_type(const Tensor& like, const F& run) {
  if (dtype_of(like) == kFloat64)
    run(double(0), pick_streaming_tables().float64);
  else
    run(float(0), pick_streaming_tables().float32);
}
template <class T>
const T* item(const OptTensor& t, int64_t k) {
  return t.has_value() ? static_cast<const T*>(t->const_data_ptr()) + k * t->size(1) : nullptr;
}
OptTensor dense_or_none(const OptTensor& t) {
  return t.has_value() ? OptTensor(dense(*t)) : OptTensor();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn_points(
    const Tensor& x_in, const Tensor& y_in, const Tensor& a_in, const Tensor& b_in, OptTensor f_in,
    OptTensor g_in, int64_t cost, std::vector<double> epsilons, double rho_a, double rho_b,
    double momentum, int64_t max_iterations, double tolerance, int64_t check_every) {
  const Tensor x = dense(x_in), y = dense(y_in), a = dense(a_in), b = dense(b_in);
  const OptTensor f0 = dense_or_none(f_in), g0 = dense_or_none(g_in);
  const int64_t batch = x.size(0), n = x.size(1), d = x.size(2), m = y.size(1);
  Tensor f = empty_like(x, {batch, n}), g = empty_like(x, {batch, m});
  Tensor value = empty_like(x, {batch}), error = empty_like(x, {batch});
  Tensor iterations = empty_like(x, {batch}, ScalarType::Long);
  Tensor converged = empty_like(x, {batch}, ScalarType::Bool);
  const int64_t steps = int64_t(epsilons.size());
  const StreamingOptions options{epsilons.data(), steps,       steps - 1 + max_iterations,
                                 rho_a,           rho_b,       momentum,
                                 tolerance,       check_every, false};
  in_type(x, [&](auto zero, const StreamingTable& table) {
    using T = decltype(zero);
    const auto in = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
    const auto out = [](Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); };
    over_batch(batch, n * m, [&](int64_t k, int64_t workers) {
      const StreamingIo<T> io{in(x) + k * n * d,
                              in(y) + k * m * d,
                              in(a) + k * n,
                              in(b) + k * m,
                              item<T>(f0, k),
                              item<T>(g0, k),
                              out(f) + k * n,
                              out(g) + k * m,
                              out(value) + k,
                              out(error) + k,
                              static_cast<int64_t*>(iterations.mutable_data_ptr()) + k,
                              static_cast<bool*>(converged.mutable_data_ptr()) + k};
      solve(table, options, io, cost, n, m, d, workers);
    });
  });
  return {f, g, value, iterations, error, converged};
}

// The averaged, parallel updates along a schedule: potentials of x with y, or of x with itself.
std::tuple<Tensor, Tensor> sinkhorn_points_symmetric(const Tensor& x_in, OptTensor y_in,
                                                     const Tensor& a_in, OptTensor b_in,
                                                     int64_t cost, std::vector<double> epsilons,
                                                     double rho) {
  const Tensor x = dense(x_in), a = dense(a_in);
  const OptTensor y = dense_or_none(y_in), b = dense_or_none(b_in);
  const int64_t batch = x.size(0), n = x.size(1), d = x.size(2);
  const int64_t m = y.has_value() ? y->size(1) : n;
  Tensor f = empty_like(x, {batch, n}), g = empty_like(x, {batch, y.has_value() ? m : 0});
  const int64_t steps = int64_t(epsilons.size());
  const StreamingOptions options{epsilons.data(), steps, steps, rho, rho, 1, 0, 1, true};
  in_type(x, [&](auto zero, const StreamingTable& table) {
    using T = decltype(zero);
    over_batch(batch, n * m, [&](int64_t k, int64_t workers) {
      StreamingIo<T> io{};
      io.x = static_cast<const T*>(x.const_data_ptr()) + k * n * d;
      io.y = y.has_value() ? static_cast<const T*>(y->const_data_ptr()) + k * m * d : nullptr;
      io.a = static_cast<const T*>(a.const_data_ptr()) + k * n;
      io.b = item<T>(b, k);
      io.f = static_cast<T*>(f.mutable_data_ptr()) + k * n;
      io.g = static_cast<T*>(g.mutable_data_ptr()) + (y.has_value() ? k * m : 0);
      solve(table, options, io, cost, n, m, d, workers);
    });
  });
  return {f, g};
}

// f_i = -epsilon log sum_j b_j exp((g_j - C_ij) / epsilon).
Tensor sinkhorn_points_softmin(const Tensor& x_in, const Tensor& y_in, const Tensor& g_in,
                               const Tensor& b_in, int64_t cost, double epsilon) {
  const Tensor x = dense(x_in), y = dense(y_in), g = dense(g_in), b = dense(b_in);
  const int64_t batch = x.size(0), n = x.size(1), d = x.size(2), m = y.size(1);
  Tensor f = empty_like(x, {batch, n});
  const StreamingGeometry geometry = geometry_of(cost, d);
  const double kappa = kLog2E / epsilon;
  in_type(x, [&](auto zero, const StreamingTable& table) {
    using T = decltype(zero);
    const auto in = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
    over_batch(batch, n * m, [&](int64_t k, int64_t workers) {
      const T *from = in(x) + k * n * d, *to = in(y) + k * m * d;
      const std::vector<double> centre = centre_of(from, n, to, m, d, cost);
      const Cloud<T> left(from, n, d, table.lanes, centre.data(), false);
      const Cloud<T> right(to, m, d, table.lanes, centre.data(), !geometry.product());
      std::vector<T> G = padded_list(in(g) + k * m, m, right.stride, T(kappa), T(-1e30));
      for (int64_t j = 0; j < m; ++j)
        G[size_t(j)] =
            T(double(G[size_t(j)]) - kappa * geometry.lift * double(right.squares[size_t(j)]));
      const std::vector<T> weight = padded_list(in(b) + k * m, m, right.stride, T(1), T(0));
      const std::vector<T> log_weight = logarithms(weight);
      std::vector<T> out(static_cast<size_t>(n));
      StreamingProblem p{};
      p.x = left.points.data();
      p.yt = right.transposed.data();
      p.y = right.points.data();
      p.xx = left.squares.data();
      p.yy = right.squares.data();
      p.b = weight.data();
      p.log_b = log_weight.data();
      p.g = G.data();
      p.f_new = out.data();
      p.n = n;
      p.m = m;
      p.d = d;
      p.stride = right.stride;
      p.alpha = geometry.factor * kappa;
      p.lift = geometry.lift * kappa;
      p.relaxation = 1;
      Solver<T> solver(table, geometry, right.stride, workers);
      solver.softmin(p);
      T* result = static_cast<T*>(f.mutable_data_ptr()) + k * n;
      for (int64_t i = 0; i < n; ++i)
        result[i] = T((double(out[size_t(i)]) + p.lift * double(left.squares[size_t(i)])) / kappa);
    });
  });
  return f;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("sinkhorn_points", TORCH_BOX(&sinkhorn_points));
  m.impl("sinkhorn_points_symmetric", TORCH_BOX(&sinkhorn_points_symmetric));
  m.impl("sinkhorn_points_softmin", TORCH_BOX(&sinkhorn_points_softmin));
}

}  // namespace solera
#endif  // SOLERA_FRONT
