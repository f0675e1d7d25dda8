// The density of a plan between two clouds of points, applied to columns without being stored:
//   out_ik = sum_j C_ij^power E_ij v_jk,   E_ij = exp((f_i + g_j - C_ij) / epsilon),
// and sum_j C_ij^power E_ij v_j sign(x_ik - y_jk), the gradient of a city-block distance. Tiles of
// 128 x 1024: one product for the cost, the densities, one product with v: 2 n m (d + k) flops and
// n m exponentials. Rows are independent of each other: any split of them gives the same bits.
#include "streaming_passes.h"

namespace solera {

struct StreamingApplyTable {
  void (*densities[kStreamingSources])(const StreamingProblem&, StreamingStrip&, int power);
  void (*signs)(const StreamingProblem&, StreamingStrip&, void* out);
  int64_t lanes;
};
struct StreamingApplyTables {
  StreamingApplyTable float32, float64;
};

namespace SOLERA_ISA {
namespace {

template <class T>
constexpr StreamingApplyTable table() {
  return {{streaming_densities<T, Product<T>>, streaming_densities<T, ProductDistance<T>>,
           streaming_densities<T, Differences<T, 2, kSquared>>,
           streaming_densities<T, Differences<T, 3, kSquared>>,
           streaming_densities<T, Differences<T, 0, kSquared>>,
           streaming_densities<T, Differences<T, 2, kRoot>>,
           streaming_densities<T, Differences<T, 3, kRoot>>,
           streaming_densities<T, Differences<T, 0, kRoot>>,
           streaming_densities<T, Differences<T, 0, kAbsolute>>},
          streaming_signs<T>,
          kLanes<T>};
}

}  // namespace

extern const StreamingApplyTables streaming_apply_tables;
const StreamingApplyTables streaming_apply_tables = {table<float>(), table<double>()};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "streaming_points.h"

namespace solera {

SOLERA_PICK(StreamingApplyTables, streaming_apply_tables)

namespace {

constexpr int64_t kTileColumns = 1024;

template <class T>
struct ApplyIo {
  const T *x, *y, *f, *g, *v;
  T* out;
  int64_t n, m, d, k;
};

template <class T>
void apply(const StreamingApplyTable& table, const ApplyIo<T>& io, int64_t cost, double epsilon,
           int power, bool signs, int64_t workers) {
  const int64_t n = io.n, m = io.m, d = io.d, width = signs ? d : io.k;
  const StreamingGeometry geometry = geometry_of(cost, d);
  const double kappa = kLog2E / epsilon;
  const std::vector<double> centre = centre_of(io.x, n, io.y, m, d, cost);
  const Cloud<T> x(io.x, n, d, table.lanes, centre.data(), false);
  const Cloud<T> y(io.y, m, d, table.lanes, centre.data(), !geometry.product());
  std::vector<T> F(static_cast<size_t>(n)), G(size_t(y.stride), T(-1e30));
  std::vector<T> weight(size_t(signs ? y.stride : 0), T(0));
  for (int64_t i = 0; i < n; ++i)
    F[size_t(i)] = T(kappa * (double(io.f[i]) - geometry.lift * double(x.squares[size_t(i)])));
  for (int64_t j = 0; j < m; ++j) {
    G[size_t(j)] = T(kappa * (double(io.g[j]) - geometry.lift * double(y.squares[size_t(j)])));
    if (signs) weight[size_t(j)] = io.v[j];
  }
  StreamingProblem p{};
  p.x = x.points.data();
  p.yt = y.transposed.data();
  p.y = y.points.data();
  p.xx = x.squares.data();
  p.yy = y.squares.data();
  p.b = weight.data();
  p.f_old = F.data();
  p.g = G.data();
  p.n = n;
  p.m = m;
  p.d = d;
  p.stride = y.stride;
  p.kappa = kappa;
  p.alpha = geometry.factor * kappa;
  p.lift = geometry.lift * kappa;
  const int64_t step = std::min(y.stride, kTileColumns), strips = (n + kStripRows - 1) / kStripRows;
  const ScalarType type = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  std::memset(io.out, 0, size_t(n * width) * sizeof(T));
  share(workers, strips, [&](int64_t, int64_t first, int64_t last) {
    std::vector<T> tile(size_t(kStripRows * step), T(0)), buffer = tile;
    for (int64_t strip = first; strip < last; ++strip) {
      StreamingStrip s{};
      s.tile = tile.data();
      s.buffer = buffer.data();
      s.step = step;
      s.row = strip * kStripRows;
      s.rows = std::min(kStripRows, n - s.row);
      for (s.column = 0; s.column < y.stride; s.column += step) {
        s.columns = std::min(step, y.stride - s.column);
        fill<T>(geometry, p, s);
        table.densities[geometry.source](p, s, power);
        if (signs) {
          table.signs(p, s, io.out);
          continue;
        }
        const int64_t real = std::min(s.columns, m - s.column);
        const tile_product::Matrix w{s.buffer, s.rows, real, step, 1};
        const tile_product::Matrix v{io.v + s.column * width, real, width, width, 1};
        tile_product::multiply(io.out + s.row * width, width, w, v, type, true);
      }
    }
  });
}

Tensor sinkhorn_points_apply(const Tensor& x_in, const Tensor& y_in, const Tensor& f_in,
                             const Tensor& g_in, const Tensor& v_in, int64_t cost, double epsilon,
                             int64_t power, bool signs) {
  const Tensor x = dense(x_in), y = dense(y_in), f = dense(f_in), g = dense(g_in), v = dense(v_in);
  const int64_t batch = x.size(0), n = x.size(1), d = x.size(2), m = y.size(1), k = v.size(2);
  const int64_t width = signs ? d : k;
  Tensor out = empty_like(x, {batch, n, width});
  const auto run = [&](auto zero, const StreamingApplyTable& table) {
    using T = decltype(zero);
    const auto in = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
    const auto one = [&](int64_t item, int64_t workers) {
      const ApplyIo<T> io{in(x) + item * n * d,
                          in(y) + item * m * d,
                          in(f) + item * n,
                          in(g) + item * m,
                          in(v) + item * m * k,
                          static_cast<T*>(out.mutable_data_ptr()) + item * n * width,
                          n,
                          m,
                          d,
                          k};
      apply<T>(table, io, cost, epsilon, int(power), signs, workers);
    };
    over_batch(batch, n * m, one);
  };
  if (dtype_of(x) == kFloat64)
    run(double(0), pick_streaming_apply_tables().float64);
  else
    run(float(0), pick_streaming_apply_tables().float32);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("sinkhorn_points_apply", TORCH_BOX(&sinkhorn_points_apply));
}

}  // namespace solera
#endif  // SOLERA_FRONT
