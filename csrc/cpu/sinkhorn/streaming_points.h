// The torch-facing half that streaming.cpp and streaming_apply.cpp share: two clouds of points,
// what their cost is made of, and how strips of rows are filled. Included under SOLERA_FRONT.
#pragma once

#include <cmath>

#include "../parallel.h"
#include "../tile_product.h"
#include "streaming_passes.h"

namespace solera {
namespace {

constexpr double kLog2E = 1.4426950408889634074;
constexpr int64_t kStripRows = 128;  // rows whose product with a tile of columns is taken at once
constexpr int64_t kDirectDimensions = 8;  // up to these many, squares come from differences

enum StreamingCost : int64_t { kSquareCost, kHalfSquareCost, kDotCost, kDistanceCost, kCityCost };

// What u is, alpha and the lift of the potentials as multiples of K.
struct StreamingGeometry {
  int source;
  double factor, lift;
  bool product() const { return source == kProduct || source == kProductDistance; }
};

inline StreamingGeometry geometry_of(int64_t cost, int64_t d, bool differences = false) {
  const bool direct = differences || d <= kDirectDimensions;
  switch (cost) {
    case kSquareCost:
    case kHalfSquareCost: {
      const double half = cost == kSquareCost ? 1 : 0.5;
      if (!direct) return {kProduct, 2 * half, half};
      return {d == 2 ? kSquare2 : d == 3 ? kSquare3 : kSquare, -half, 0};
    }
    case kDotCost:
      return {kProduct, 1, 0};
    case kDistanceCost:
      if (!direct) return {kProductDistance, -1, 0};
      return {d == 2 ? kDistance2 : d == 3 ? kDistance3 : kDistance, -1, 0};
    case kCityCost:
      return {kCity, -1, 0};
  }
  STD_TORCH_CHECK(false, "solera: unknown cost ", cost);
}

inline int64_t padded(int64_t count, int64_t lanes) { return (count + lanes - 1) / lanes * lanes; }

// Runs body(worker, first, last) over [0, count): `workers` equal shares, at once or in turn.
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

template <class T>
struct Cloud {
  int64_t count, d, stride;
  std::vector<T> points, transposed, squares;

  // `centre` (d numbers) is taken off; a transposed copy only where differences are taken.
  Cloud(const T* from, int64_t count, int64_t d, int64_t lanes, const double* centre, bool flip)
      : count(count), d(d), stride(padded(count, lanes)) {
    points.resize(size_t(count * d));
    squares.assign(size_t(stride), T(0));
    if (flip) transposed.assign(size_t(d * stride), T(0));
    for (int64_t i = 0; i < count; ++i) {
      double sum = 0;
      for (int64_t k = 0; k < d; ++k) {
        const T v = T(double(from[i * d + k]) - centre[k]);
        points[size_t(i * d + k)] = v;
        sum += double(v) * double(v);
        if (flip) transposed[size_t(k * stride + i)] = v;
      }
      squares[size_t(i)] = T(sum);
    }
  }
};

// The midpoint of the two clouds' means; zero where the cost is not one of differences.
template <class T>
std::vector<double> centre_of(const T* x, int64_t n, const T* y, int64_t m, int64_t d,
                              int64_t cost) {
  std::vector<double> centre(static_cast<size_t>(d), 0.0), other = centre;
  if (cost == kDotCost) return centre;
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = 0; k < d; ++k) centre[size_t(k)] += double(x[i * d + k]);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t k = 0; k < d; ++k) other[size_t(k)] += double(y[i * d + k]);
  for (size_t k = 0; k < size_t(d); ++k)
    centre[k] = 0.5 * (centre[k] / double(n) + other[k] / double(m));
  return centre;
}

// The memory that one thread's strips need: nothing of it grows with n, or with m beyond a limit.
template <class T>
struct StripMemory {
  int64_t step;
  std::vector<T> tile, buffer, lists;

  StripMemory(const StreamingGeometry& geometry, int64_t stride, int64_t lanes) {
    const int64_t most =
        geometry.product() ? 65536 / int64_t(sizeof(T)) : 524288 / int64_t(sizeof(T));
    step = std::min(stride, padded(most, lanes));
    if (geometry.product()) tile.assign(size_t(kStripRows * step), T(0));
    buffer.assign(size_t(kStreamingGroup * step), T(0));
    lists.assign(size_t(3 * kStripRows), T(0));
  }
};

// The product of a strip of x's rows with a tile of y's columns, where u is one.
template <class T>
void fill(const StreamingGeometry& geometry, const StreamingProblem& p, StreamingStrip& s) {
  if (!geometry.product()) return;
  const int64_t columns = std::min(s.columns, p.m - s.column), d = p.d;
  const tile_product::Matrix x{static_cast<const T*>(p.x) + s.row * d, s.rows, d, d, 1};
  const tile_product::Matrix y{static_cast<const T*>(p.y) + s.column * d, columns, d, d, 1};
  tile_product::multiply(s.tile, s.step, x, y.transposed(),
                         sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float, false);
}

// A potential or a weight, padded to whole vectors.
template <class T>
std::vector<T> padded_list(const T* from, int64_t count, int64_t stride, T scale, T padding) {
  std::vector<T> out(static_cast<size_t>(stride), padding);
  for (int64_t i = 0; i < count; ++i) out[size_t(i)] = from ? T(scale * from[i]) : T(0);
  return out;
}
template <class T>
std::vector<T> logarithms(const std::vector<T>& weights) {
  std::vector<T> out(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) out[i] = std::log2(weights[i]);
  return out;
}

// Total of the weights in double, or NaN if one is negative, NaN or infinite.
template <class T>
double total_weight(const T* weight, int64_t count) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += weight[i] >= 0 ? double(weight[i]) : NAN;
  return std::isfinite(total) ? total : NAN;
}

template <class T>
struct Solver {
  const StreamingTable& table;
  const StreamingGeometry geometry;
  const int64_t workers;
  std::vector<StripMemory<T>> memory;

  Solver(const StreamingTable& table, const StreamingGeometry& geometry, int64_t stride,
         int64_t workers)
      : table(table), geometry(geometry), workers(workers) {
    for (int64_t w = 0; w < workers; ++w) memory.emplace_back(geometry, stride, table.lanes);
  }

  // Rows [first, last) of p; their column sums into `partial` where there is one.
  void rows(const StreamingProblem& p, StripMemory<T>& own, int64_t first, int64_t last, T* partial,
            bool exact, double& error, double& mass, int64_t& dead) const {
    const auto kernel = table.rows[geometry.source];
    if (partial) std::memset(partial, 0, size_t(p.stride) * sizeof(T));
    for (int64_t row = first; row < last; row += kStripRows) {
      StreamingStrip s{};
      s.tile = own.tile.data();
      s.buffer = own.buffer.data();
      s.shift = own.lists.data();
      s.sum = own.lists.data() + kStripRows;
      s.scale = own.lists.data() + 2 * kStripRows;
      s.partial = partial;
      s.step = own.step;
      s.row = row;
      s.rows = std::min(kStripRows, last - row);
      s.exact = exact;
      const auto stage = [&](int which) {
        s.stage = which;
        for (s.column = 0; s.column < p.stride; s.column += own.step) {
          s.columns = std::min(own.step, p.stride - s.column);
          fill<T>(geometry, p, s);
          kernel(p, s, s.column == 0);
        }
      };
      if (own.step == p.stride) {
        stage(kWhole);
      } else {
        for (;;) {
          if (s.exact) stage(kTop);
          stage(kSum);
          s.stage = kFinish;
          s.error = s.mass = 0;
          s.bad = s.dead = 0;
          kernel(p, s, false);
          if (s.exact || !s.bad) break;
          s.exact = true;
        }
        if (partial) stage(kColumns);
      }
      error += s.error;
      mass += s.mass;
      dead |= s.dead;
    }
  }

  // The potential of every row of p, exactly; p.a is null.
  void softmin(const StreamingProblem& p) {
    const int64_t strips = (p.n + kStripRows - 1) / kStripRows;
    share(workers, strips, [&](int64_t w, int64_t first, int64_t last) {
      double error = 0, mass = 0;
      int64_t dead = 0;
      rows(p, memory[size_t(w)], first * kStripRows, std::min(p.n, last * kStripRows), nullptr,
           true, error, mass, dead);
    });
  }
};

// Threads inside a problem that is worth waking them, between the problems of a batch otherwise.
template <class F>
void over_batch(int64_t batch, int64_t work, const F& body) {
  const int64_t threads = int64_t(torch::stable::get_num_threads());
  if (work >= 131072 && batch < 2 * threads) {
    for (int64_t k = 0; k < batch; ++k) body(k, threads);
    return;
  }
  parallel_for(0, batch, grain_for(work * 4), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) body(k, int64_t(1));
  });
}

}  // namespace
}  // namespace solera
