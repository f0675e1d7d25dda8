// Sorting projections and comparing them, for one instruction set. Included by sliced.cpp alone.
//
// A key is a float's bits made to order as an unsigned integer (a negative number's all flipped,
// else the sign alone: -inf < -0 < 0 < inf < NaN), packed with its index into one word; a radix
// sort from the low digit up, 8 bits at a time, is stable: equal values stay in the order of their
// indices, so the permutation is the one of a stable sort. Digits in which all keys agree are
// skipped. 4 passes of n words of 8 bytes (8 of 16 bytes in float64), in L1 up to some 2000 points.
#pragma once

#include "../simd.h"

namespace solera {

struct SlicedPair {
  const void *a, *b;           // projections, (n) and (m)
  int32_t *order_a, *order_b;  // where the i-th smallest stands
  int64_t n, m;
  double p;
};

namespace SOLERA_ISA {
namespace {

template <class A>
struct Key;
template <>
struct Key<float> {
  uint64_t word;
  static constexpr int digits = 4;
  SOLERA_INLINE static Key of(float x, int32_t index) {
    const uint32_t u = bits_as<uint32_t>(x);
    const uint32_t mask = uint32_t(int32_t(u) >> 31) | 0x80000000u;
    return {uint64_t(x == x ? u ^ mask : 0xffffffffu) << 32 | uint32_t(index)};
  }
  SOLERA_INLINE unsigned digit(int d) const { return unsigned(word >> (32 + 8 * d)) & 255; }
  SOLERA_INLINE int32_t index() const { return int32_t(uint32_t(word)); }
};
template <>
struct Key<double> {
  uint64_t word;
  int64_t at;
  static constexpr int digits = 8;
  SOLERA_INLINE static Key of(double x, int32_t index) {
    const uint64_t u = bits_as<uint64_t>(x);
    const uint64_t mask = uint64_t(int64_t(u) >> 63) | 0x8000000000000000ull;
    return {x == x ? u ^ mask : ~0ull, index};
  }
  SOLERA_INLINE unsigned digit(int d) const { return unsigned(word >> (8 * d)) & 255; }
  SOLERA_INLINE int32_t index() const { return int32_t(at); }
};

// Sorts n projections: `order` and, in `sorted`, the values in that order. `keys` holds 2 n keys.
template <class A>
void sort_projections(const A* x, int64_t n, int32_t* order, A* sorted, Key<A>* keys) {
  constexpr int D = Key<A>::digits;
  uint32_t count[D][256];
  memset(count, 0, sizeof count);
  Key<A>*from = keys, *to = keys + n;
  for (int64_t i = 0; i < n; ++i) {
    const Key<A> key = Key<A>::of(x[i], int32_t(i));
    from[i] = key;
    for (int d = 0; d < D; ++d) ++count[d][key.digit(d)];
  }
  for (int d = 0; d < D; ++d) {
    if (n > 0 && count[d][from[0].digit(d)] == uint32_t(n)) continue;
    uint32_t place[256], next = 0;
    for (int v = 0; v < 256; ++v) {
      place[v] = next;
      next += count[d][v];
    }
    for (int64_t i = 0; i < n; ++i) {
      const Key<A> key = from[i];
      to[place[key.digit(d)]++] = key;
    }
    Key<A>* swap = from;
    from = to;
    to = swap;
  }
  for (int64_t i = 0; i < n; ++i) {
    order[i] = from[i].index();
    sorted[i] = x[order[i]];
  }
}

// Calls piece(i, j, w) over the pieces of [0, 1] on which both quantile functions are constant, w
// their lengths: n + m - gcd(n, m) of them.
template <class F>
SOLERA_INLINE void over_pieces(int64_t n, int64_t m, const F& piece) {
  const double unit = 1.0 / (double(n) * double(m));
  int64_t i = 0, j = 0, at = 0;
  while (i < n && j < m) {
    const int64_t end_a = (i + 1) * m, end_b = (j + 1) * n;
    const int64_t end = end_a < end_b ? end_a : end_b;
    piece(i, j, double(end - at) * unit);
    at = end;
    i += end == end_a;
    j += end == end_b;
  }
}

// |d|^p, and p |d|^(p - 1) sign(d).
SOLERA_INLINE float power_of(float x, double p) { return __builtin_powf(x, float(p)); }
SOLERA_INLINE double power_of(double x, double p) { return __builtin_pow(x, p); }
template <class A>
SOLERA_INLINE A cost_of(A d, double p) {
  if (p == 2) return d * d;
  const A size = d < 0 ? -d : d;
  return p == 1 ? size : power_of(size, p);
}
template <class A>
SOLERA_INLINE A slope_of(A d, double p) {
  if (p == 2) return 2 * d;
  const A sign = d > 0 ? A(1) : d < 0 ? A(-1) : d;  // NaN stays
  if (p == 1 || d == 0) return sign;
  return sign * A(p) * power_of(sign * d, p - 1);
}

// int_0^1 |F_a^-1 - F_b^-1|^p of two sorted samples.
template <class A>
double compare_sorted(const SlicedPair& s) {
  constexpr int L = Vec<A>::lanes;
  const A *a = (const A*)s.a, *b = (const A*)s.b;
  if (s.n != s.m) {
    double total = 0;
    over_pieces(s.n, s.m, [&](int64_t i, int64_t j, double w) {
      total += w * double(cost_of<A>(a[i] - b[j], s.p));
    });
    return total;
  }
  typename Vec<A>::type sum{};
  double rest = 0;
  int64_t i = 0;
  if (s.p == 1 || s.p == 2)
    for (; i + L <= s.n; i += L) {
      const auto d = load(a + i) - load(b + i);
      if (s.p == 2)
        sum += d * d;
      else
        sum += d < A(0) ? -d : d;
    }
  for (; i < s.n; ++i) rest += double(cost_of<A>(a[i] - b[i], s.p));
  return (double(lane_sum(sum)) + rest) / double(s.n);
}

// grad * d cost / d projection, unsorted, into da (n) and db (m, negative), both written whole.
template <class A>
void compare_backward(const SlicedPair& s, double grad, A* da, A* db) {
  const A *a = (const A*)s.a, *b = (const A*)s.b;
  if (s.n == s.m) {
    const A scale = A(grad / double(s.n));
    for (int64_t i = 0; i < s.n; ++i) {
      const int32_t x = s.order_a[i], y = s.order_b[i];
      const A g = scale * slope_of<A>(a[x] - b[y], s.p);
      da[x] = g;
      db[y] = -g;
    }
    return;
  }
  memset((void*)da, 0, size_t(s.n) * sizeof(A));
  memset((void*)db, 0, size_t(s.m) * sizeof(A));
  over_pieces(s.n, s.m, [&](int64_t i, int64_t j, double w) {
    const int32_t x = s.order_a[i], y = s.order_b[j];
    const A g = A(grad * w) * slope_of<A>(a[x] - b[y], s.p);
    da[x] += g;
    db[y] -= g;
  });
}

template <class A>
void sort_rows(const void* x, int64_t n, int32_t* order, void* sorted, void* keys) {
  sort_projections<A>((const A*)x, n, order, (A*)sorted, (Key<A>*)keys);
}
template <class A>
void backward_pair(const SlicedPair& s, double grad, void* da, void* db) {
  compare_backward<A>(s, grad, (A*)da, (A*)db);
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
