// Rows of contiguous elements, a vector at a time: what most kernels are written with.
#pragma once

#include "simd.h"

namespace solera {
namespace SOLERA_ISA {
namespace {

template <class T>
using A = typename Acc<T>::type;

// Calls body(offset, count) over [0, n): whole vectors with a constant count, then one partial.
template <int kStep, class F>
SOLERA_INLINE void strips(int64_t n, const F& body) {
  int64_t j = 0;
  for (; j + kStep <= n; j += kStep) body(j, kStep);
  if (j < n) body(j, int(n - j));
}
template <class T>
SOLERA_INLINE AccVec<T> get(const T* p, int count) {
  return count == kLanes<T> ? load(p) : load_n(p, count);
}
template <class T>
SOLERA_INLINE void put(T* p, AccVec<T> v, int count, bool streaming = false) {
  if (count != kLanes<T>)
    store_n(p, v, count);
  else if (streaming)
    stream(p, v);
  else
    store(p, v);
}

// Sum over a row of term(offset): four independent accumulators hide the latency of the add. They
// start anew every 16384 terms: one float32 sum a lane over a longer row would be less exact than
// torch's, on narrow vectors above all.
template <class T, class F>
SOLERA_INLINE A<T> row_sum(int64_t n, const F& term) {
  constexpr int L = kLanes<T>;
  constexpr int64_t kRun = 16384;
  A<T> total = 0;
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t end = n - begin < kRun ? n : begin + kRun;
    AccVec<T> s0{}, s1{}, s2{}, s3{};
    int64_t j = begin;
    for (; j + 4 * L <= end; j += 4 * L) {
      s0 += term(j, L);
      s1 += term(j + L, L);
      s2 += term(j + 2 * L, L);
      s3 += term(j + 3 * L, L);
    }
    for (; j + L <= end; j += L) s0 += term(j, L);
    if (j < end) s1 += term(j, int(end - j));
    total += lane_sum((s0 + s1) + (s2 + s3));
  }
  return total;
}

// Lanes at or past count set to zero (a partial load gives 0, but 0 - mean is not 0).
template <class T>
SOLERA_INLINE AccVec<T> keep(AccVec<T> v, int count) {
  if (count == kLanes<T>) return v;
  for (int i = count; i < kLanes<T>; ++i) v[i] = 0;
  return v;
}

// out[j] = sum over chunks of partial[chunk][j], in order, in double.
template <class A>
void sum_chunks(const void* partial, void* out, int64_t chunks, int64_t columns, int64_t begin,
                int64_t end) {
  constexpr int kBlock = 64;
  for (int64_t j = begin; j < end; j += kBlock) {
    const int n = int(end - j < kBlock ? end - j : kBlock);
    double sum[kBlock] = {};
    for (int64_t c = 0; c < chunks; ++c) {
      const A* row = (const A*)partial + c * columns + j;
      for (int i = 0; i < n; ++i) sum[i] += double(row[i]);
    }
    for (int i = 0; i < n; ++i) ((A*)out)[j + i] = A(sum[i]);
  }
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
