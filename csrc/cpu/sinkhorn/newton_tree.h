// Conjugate gradients on the truncated Newton system, with its heaviest spanning forest as
// preconditioner. Included by newton_sparse.cpp alone, in its torch-facing half.
//
//   [diag p  S      ] [x]   [ra]
//   [S^T     diag q ] [y] = [rb],     S: `keep` entries a row of the plan, p and q its full sums
//
// Scaled to a unit diagonal. A plan with a small epsilon has entries over many orders of magnitude
// and is nearly a vertex of the polytope, whose support is a forest: where conjugate gradients with
// the diagonal alone take hundreds of iterations, or never end, the forest leaves about twenty.
// The preconditioner keeps the whole diagonal and the forest's entries: eliminated from the leaves
// it has no fill, so a solve is 3 (n + m) multiply-adds; an iteration is 2 n keep more.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace solera {
namespace {

class NewtonSystem {
 public:
  NewtonSystem(int64_t n, int64_t m, int64_t keep, const double* values, const int64_t* columns,
               const double* p, const double* q, double shift)
      : n_(n), m_(m), keep_(keep), diagonal_(1 + shift), scale_(n + m) {
    // A row without mass has nothing in S and stays where it is.
    for (int64_t i = 0; i < n; ++i) scale_[i] = p[i] > 0 ? 1 / std::sqrt(p[i]) : 0;
    for (int64_t j = 0; j < m; ++j) scale_[n + j] = q[j] > 0 ? 1 / std::sqrt(q[j]) : 0;
    entries_.resize(n * keep);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = i * keep; k < (i + 1) * keep; ++k)
        entries_[k] = values[k] * scale_[i] * scale_[n + columns[k]];
    span(values, columns);
  }

  // The number of iterations. Ends where the preconditioned residual norm has fallen by
  // `tolerance`; any iterate is a direction of ascent.
  int64_t solve(const double* ra, const double* rb, double* x, double* y, double tolerance,
                int64_t max_iterations) {
    const int64_t size = n_ + m_;
    std::vector<double> u(size, 0.0), r(size), z(size), d(size), w(size);
    for (int64_t i = 0; i < n_; ++i) r[place_[i]] = ra[i] * scale_[i];
    for (int64_t j = 0; j < m_; ++j) r[place_[n_ + j]] = rb[j] * scale_[n_ + j];
    precondition(r, z);
    d = z;
    double rz = dot(r, z);
    const double target = rz * tolerance * tolerance;
    int64_t k = 0;
    while (k < max_iterations && rz > target) {
      multiply(d, w);
      const double dw = dot(d, w);
      if (!(dw > 0)) break;  // a singular direction, or NaN
      const double step = rz / dw;
      for (int64_t i = 0; i < size; ++i) {
        u[i] += step * d[i];
        r[i] -= step * w[i];
      }
      precondition(r, z);
      const double next = dot(r, z);
      const double ratio = next / rz;
      for (int64_t i = 0; i < size; ++i) d[i] = z[i] + ratio * d[i];
      rz = next;
      ++k;
    }
    for (int64_t i = 0; i < n_; ++i) x[i] = u[place_[i]] * scale_[i];
    for (int64_t j = 0; j < m_; ++j) y[j] = u[place_[n_ + j]] * scale_[n_ + j];
    return k;
  }

 private:
  static double dot(const std::vector<double>& a, const std::vector<double>& b) {
    double sum[4] = {0, 0, 0, 0};
    size_t i = 0;
    for (; i + 4 <= a.size(); i += 4)
      for (int k = 0; k < 4; ++k) sum[k] += a[i + k] * b[i + k];
    for (; i < a.size(); ++i) sum[0] += a[i] * b[i];
    return (sum[0] + sum[2]) + (sum[1] + sum[3]);
  }

  void multiply(const std::vector<double>& d, std::vector<double>& w) const {
    for (size_t i = 0; i < w.size(); ++i) w[i] = diagonal_ * d[i];
    for (int64_t i = 0; i < n_; ++i) {
      double sum = 0;
      const double di = d[place_[i]];
      for (int64_t k = i * keep_; k < (i + 1) * keep_; ++k) {
        sum += entries_[k] * d[column_places_[k]];
        w[column_places_[k]] += entries_[k] * di;
      }
      w[place_[i]] += sum;
    }
  }

  // The positive values' positions, largest first by exponent and eleven more bits (a forest is as
  // good by weights to 1/2048), then by position: two counting sorts of (those bits, position).
  static std::vector<uint64_t> heaviest_first(const double* values, int64_t count) {
    constexpr int kBits = 11, kPosition = 64 - 2 * kBits;
    constexpr uint64_t kBuckets = uint64_t(1) << kBits;
    std::vector<uint64_t> from, to;
    std::vector<int64_t> starts[2];
    from.reserve(count);
    for (auto& s : starts) s.assign(kBuckets + 1, 0);
    for (int64_t k = 0; k < count; ++k) {
      if (!(values[k] > 0)) continue;
      uint64_t bits;
      std::memcpy(&bits, values + k, sizeof bits);
      const uint64_t key = kBuckets * kBuckets - 1 - (bits >> (52 - kBits));
      ++starts[0][key % kBuckets + 1];
      ++starts[1][key / kBuckets + 1];
      from.push_back(key << kPosition | uint64_t(k));
    }
    to.resize(from.size());
    for (int digit = 0; digit < 2; ++digit) {
      int64_t* start = starts[digit].data();
      for (uint64_t i = 0; i < kBuckets; ++i) start[i + 1] += start[i];
      for (const uint64_t e : from) to[start[(e >> (kPosition + digit * kBits)) % kBuckets]++] = e;
      from.swap(to);
    }
    for (uint64_t& e : from) e &= (uint64_t(1) << kPosition) - 1;
    return from;
  }

  // Kruskal's forest by the entries of the plan, then an order of elimination: leaves first, round
  // by round, so that what is added to a variable comes from places far apart. From then on a
  // variable goes by its place in that order.
  void span(const double* values, const int64_t* columns) {
    const int64_t size = n_ + m_;
    std::vector<int64_t> root(size), degree(size, 0), edges(size, 0);
    for (int64_t i = 0; i < size; ++i) root[i] = i;
    const auto find = [&](int64_t i) {
      while (root[i] != i) i = root[i] = root[root[i]];
      return i;
    };
    int64_t left = size - 1;
    for (const uint64_t e : heaviest_first(values, n_ * keep_)) {
      const int64_t k = int64_t(e), i = k / keep_, j = n_ + columns[k], s = find(i), t = find(j);
      if (s == t) continue;
      root[s] = t;
      for (const int64_t end : {i, j}) {
        ++degree[end];
        edges[end] ^= k;  // with one edge left that is the edge
      }
      if (--left == 0) break;
    }
    std::vector<int64_t> order;
    order.reserve(size);
    place_.resize(size);
    parent_.resize(size);
    weight_.assign(size, 0.0);
    for (int64_t s = 0; s < size; ++s)
      if (degree[s] <= 1) order.push_back(s);
    for (int64_t at = 0; at < size; ++at) {
      const int64_t s = order[at];
      place_[s] = at;
      parent_[at] = s;  // a root is its own, by nothing
      if (degree[s] == 0) continue;
      const int64_t k = edges[s], i = k / keep_, j = n_ + columns[k], t = s == i ? j : i;
      parent_[at] = t;
      weight_[at] = entries_[k];
      edges[t] ^= k;
      if (--degree[t] == 1) order.push_back(t);
    }
    for (int64_t& parent : parent_) parent = place_[parent];
    column_places_.resize(n_ * keep_);
    for (int64_t k = 0; k < n_ * keep_; ++k) column_places_[k] = place_[n_ + columns[k]];
    // L D L^T from the leaves: D_s = 1 + shift - sum over children w^2 / D.
    inverse_.assign(size, diagonal_);
    for (int64_t at = 0; at < size; ++at) {
      inverse_[at] = 1 / std::max(inverse_[at], 1e-15);
      const double w = weight_[at];
      weight_[at] = w * inverse_[at];
      if (parent_[at] != at) inverse_[parent_[at]] -= w * weight_[at];
    }
  }

  void precondition(const std::vector<double>& r, std::vector<double>& z) const {
    z = r;
    const int64_t size = n_ + m_;
    for (int64_t at = 0; at < size; ++at) z[parent_[at]] -= weight_[at] * z[at];
    for (int64_t at = size - 1; at >= 0; --at)
      z[at] = inverse_[at] * z[at] - weight_[at] * z[parent_[at]];
  }

  int64_t n_, m_, keep_;
  double diagonal_;
  std::vector<double> scale_, entries_, weight_, inverse_;  // inverse_: of D
  std::vector<int64_t> place_, parent_, column_places_;
};

}  // namespace
}  // namespace solera
