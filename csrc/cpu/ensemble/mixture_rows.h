// Rows of K models' logits, as the cores logit_mixture and distillation read them: in blocks that
// stay in L1 between a block's maximum and its exponentials, so memory is read once.
#pragma once
#include "../natural.h"
#include "../strips.h"

namespace solera {

constexpr int64_t kMixtureBlock = 1024;

// K tensors (N, C), unit stride along C.
struct MixtureMembers {
  const void* const* data;
  const int64_t* stride;  // between rows, in elements
  int64_t count;
};

namespace SOLERA_ISA {
namespace {

template <class T>
SOLERA_INLINE const T* member_row(const MixtureMembers& z, int64_t m, int64_t row) {
  return (const T*)z.data[m] + row * z.stride[m];
}

// Calls body(first, count) over [0, width) in blocks.
template <class F>
SOLERA_INLINE void mixture_blocks(int64_t width, const F& body) {
  for (int64_t first = 0; first < width; first += kMixtureBlock)
    body(first, width - first < kMixtureBlock ? width - first : kMixtureBlock);
}

// The largest value(offset, count) of a block, at least the lowest finite number.
template <class T, class V>
SOLERA_INLINE A<T> block_max(int64_t count, const V& value) {
  constexpr int L = kLanes<T>;
  const A<T> lowest = lowest_of(A<T>());
  AccVec<T> m0 = splat(lowest), m1 = m0, m2 = m0, m3 = m0;
  int64_t j = 0;
  for (; j + 4 * L <= count; j += 4 * L) {
    m0 = vmax(m0, value(j, L));
    m1 = vmax(m1, value(j + L, L));
    m2 = vmax(m2, value(j + 2 * L, L));
    m3 = vmax(m3, value(j + 3 * L, L));
  }
  for (; j < count; j += L) {
    const int n = int(count - j < L ? count - j : L);
    AccVec<T> v = value(j, n);
    for (int i = n; i < L; ++i) v[i] = lowest;
    m0 = vmax(m0, v);
  }
  return lane_max(vmax(vmax(m0, m1), vmax(m2, m3)));
}

// A running sum of e^(v - top).
template <class T>
struct RowSum {
  A<T> top, sum;
  SOLERA_INLINE RowSum() : top(lowest_of(A<T>())), sum(0) {}
  // Raises top to `here`; returns the factor that sums so far were multiplied by.
  SOLERA_INLINE A<T> raise(A<T> here) {
    if (!(here > top)) return A<T>(1);
    const A<T> factor = natural_exp_one(top - here);
    sum *= factor;
    top = here;
    return factor;
  }
  SOLERA_INLINE A<T> log_total() const { return natural_log_one(sum); }
};

template <class T, class V>
SOLERA_INLINE void add_block(RowSum<T>& row, int64_t count, const V& value) {
  row.raise(block_max<T>(count, value));
  const A<T> top = row.top;
  row.sum += row_sum<T>(
      count, [&](int64_t j, int n) { return keep<T>(natural_exp(value(j, n) - top), n); });
}

// Maximum and sum of e^(scale x - maximum) of a row; scale > 0.
template <class T>
SOLERA_INLINE RowSum<T> sum_row(const T* x, int64_t width, A<T> scale) {
  RowSum<T> row;
  mixture_blocks(width, [&](int64_t first, int64_t count) {
    const T* from = x + first;
    add_block(row, count, [&](int64_t j, int n) { return get(from + j, n) * scale; });
  });
  return row;
}

template <class T>
SOLERA_INLINE A<T> row_max(const T* x, int64_t width) {
  A<T> top = lowest_of(A<T>());
  mixture_blocks(width, [&](int64_t first, int64_t count) {
    const T* from = x + first;
    const A<T> here = block_max<T>(count, [&](int64_t j, int n) { return get(from + j, n); });
    if (here > top) top = here;
  });
  return top;
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
