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
#include <vector>

namespace solera {
namespace {

class NewtonSystem {
 public:
  NewtonSystem(int64_t n, int64_t m, int64_t keep, const double* values, const int64_t* columns,
               const double* p, const double* q, double shift)
      : n_(n), m_(m), keep_(keep), columns_(columns), diagonal_(1 + shift), scale_(n + m) {
    // A row without mass has nothing in S and stays where it is.
    for (int64_t i = 0; i < n; ++i) scale_[i] = p[i] > 0 ? 1 / std::sqrt(p[i]) : 0;
    for (int64_t j = 0; j < m; ++j) scale_[n + j] = q[j] > 0 ? 1 / std::sqrt(q[j]) : 0;
    entries_.resize(n * keep);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = i * keep; k < (i + 1) * keep; ++k)
        entries_[k] = values[k] * scale_[i] * scale_[n + columns[k]];
    span(values);
  }

  // The number of iterations. Ends where the preconditioned residual norm has fallen by
  // `tolerance`; any iterate is a direction of ascent.
  int64_t solve(const double* ra, const double* rb, double* x, double* y, double tolerance,
                int64_t max_iterations) {
    const int64_t size = n_ + m_;
    std::vector<double> u(size, 0.0), r(size), z(size), d(size), w(size);
    for (int64_t i = 0; i < n_; ++i) r[i] = ra[i] * scale_[i];
    for (int64_t j = 0; j < m_; ++j) r[n_ + j] = rb[j] * scale_[n_ + j];
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
    for (int64_t i = 0; i < n_; ++i) x[i] = u[i] * scale_[i];
    for (int64_t j = 0; j < m_; ++j) y[j] = u[n_ + j] * scale_[n_ + j];
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
      const double di = d[i];
      for (int64_t k = i * keep_; k < (i + 1) * keep_; ++k) {
        sum += entries_[k] * d[n_ + columns_[k]];
        w[n_ + columns_[k]] += entries_[k] * di;
      }
      w[i] += sum;
    }
  }

  // Kruskal's forest by the entries of the plan, then an order in which parents come first.
  void span(const double* values) {
    const int64_t size = n_ + m_;
    std::vector<int64_t> order, root(size), degree(size + 1, 0);
    for (int64_t k = 0; k < n_ * keep_; ++k)
      if (values[k] > 0) order.push_back(k);
    std::sort(order.begin(), order.end(), [&](int64_t s, int64_t t) {
      return values[s] != values[t] ? values[s] > values[t] : s < t;
    });
    for (int64_t i = 0; i < size; ++i) root[i] = i;
    const auto find = [&](int64_t i) {
      while (root[i] != i) i = root[i] = root[root[i]];
      return i;
    };
    std::vector<int64_t> edges;
    for (const int64_t k : order) {
      const int64_t s = find(k / keep_), t = find(n_ + columns_[k]);
      if (s == t) continue;
      root[s] = t;
      edges.push_back(k);
      ++degree[k / keep_];
      ++degree[n_ + columns_[k]];
      if (int64_t(edges.size()) == size - 1) break;
    }
    std::vector<int64_t> start(size + 1, 0), fill(size), near(2 * edges.size()),
        by(2 * edges.size());
    for (int64_t i = 0; i < size; ++i) start[i + 1] = start[i] + degree[i];
    std::copy(start.begin(), start.end() - 1, fill.begin());
    for (const int64_t k : edges) {
      const int64_t s = k / keep_, t = n_ + columns_[k];
      by[fill[s]] = by[fill[t]] = k;
      near[fill[s]++] = t;
      near[fill[t]++] = s;
    }
    parent_.assign(size, -1);
    weight_.assign(size, 0.0);
    order_.reserve(size);
    std::vector<char> seen(size, 0);
    for (int64_t first = 0; first < size; ++first) {
      if (seen[first]) continue;
      seen[first] = 1;
      order_.push_back(first);
      for (size_t head = order_.size() - 1; head < order_.size(); ++head) {
        const int64_t s = order_[head];
        for (int64_t e = start[s]; e < start[s + 1]; ++e) {
          const int64_t t = near[e];
          if (seen[t]) continue;
          seen[t] = 1;
          parent_[t] = s;
          weight_[t] = entries_[by[e]];
          order_.push_back(t);
        }
      }
    }
    // L D L^T from the leaves: D_s = 1 + shift - sum over children w^2 / D.
    pivot_.assign(size, diagonal_);
    for (int64_t at = size - 1; at >= 0; --at) {
      const int64_t t = order_[at];
      pivot_[t] = std::max(pivot_[t], 1e-15);
      const double w = weight_[t];
      weight_[t] = w / pivot_[t];
      if (parent_[t] >= 0) pivot_[parent_[t]] -= w * weight_[t];
    }
  }

  void precondition(const std::vector<double>& r, std::vector<double>& z) const {
    z = r;
    for (int64_t at = n_ + m_ - 1; at >= 0; --at) {
      const int64_t t = order_[at];
      if (parent_[t] >= 0) z[parent_[t]] -= weight_[t] * z[t];
    }
    for (const int64_t t : order_) {
      z[t] /= pivot_[t];
      if (parent_[t] >= 0) z[t] -= weight_[t] * z[parent_[t]];
    }
  }

  int64_t n_, m_, keep_;
  const int64_t* columns_;
  double diagonal_;
  std::vector<double> scale_, entries_, weight_, pivot_;
  std::vector<int64_t> order_, parent_;
};

}  // namespace
}  // namespace solera
