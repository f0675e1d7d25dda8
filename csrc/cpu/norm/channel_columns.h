// The passes of channel_norm.cpp for K > 1: vectors along K; sums over M in registers, a block of
// columns at a time.
#pragma once

#include "channel_pieces.h"

namespace solera {
namespace SOLERA_ISA {
namespace {

// Calls body(Width<kW>, first column, lanes of its vectors): blocks of kWide whole vectors, then
// single vectors, the last one perhaps partial.
template <class T, int kWide, class F>
SOLERA_INLINE void column_blocks(int64_t columns, const F& body) {
  constexpr int L = kLanes<T>;
  int64_t k = 0;
  for (; k + kWide * L <= columns; k += kWide * L) body(Code<kWide>{}, k, L);
  for (; k + L <= columns; k += L) body(Code<1>{}, k, L);
  if (k < columns) body(Code<1>{}, k, int(columns - k));
}

// Calls term(row, vector of the block, accumulator) over a slab; a single vector takes four rows at
// once, since its one sum would wait for itself.
template <class T, int kW, class F>
SOLERA_INLINE void sum_rows(int64_t rows, AccVec<T> (&sum)[kW], const F& term) {
  int64_t m = 0;
  if constexpr (kW == 1) {
    AccVec<T> other[3] = {};
    for (; m + 4 <= rows; m += 4) {
      term(m, 0, sum[0]);
      for (int r = 0; r < 3; ++r) term(m + 1 + r, 0, other[r]);
    }
    sum[0] += other[0];
    sum[0] += other[1] + other[2];
  }
  for (; m < rows; ++m)
    for (int v = 0; v < kW; ++v) term(m, v, sum[v]);
}

// Rows summed before their sum joins the slab's: one sum over thousands of rows loses digits.
constexpr int64_t kRun = 32;

template <class T>
SOLERA_INLINE void moments_columns(const ChannelWork& w, const Piece& i) {
  constexpr int L = kLanes<T>;
  const A<T> count = A<T>(i.valid);
  column_blocks<T, 8>(i.columns, [&](auto width, int64_t k, int n) {
    constexpr int kW = decltype(width)::value;
    const T* x = (const T*)w.x + i.data + k;
    AccVec<T> mean[kW] = {}, square[kW] = {};
    sum_rows<T, kW>(i.valid, mean, [&](int64_t m, int v, AccVec<T>& sum) {
      sum += take(x + m * w.inner + v * L, n);
    });
    if (i.valid > 0 || w.finished)
      for (int v = 0; v < kW; ++v) mean[v] /= count;
    AccVec<T> rest[kW] = {};
    for (int64_t from = 0; from < i.valid; from += kRun) {
      const int64_t end = i.valid - from < kRun ? i.valid : from + kRun;
      AccVec<T> one[kW] = {}, other[kW] = {};
      for (int64_t m = from; m < end; ++m) {
        for (int v = 0; v < kW; ++v) {
          const AccVec<T> d = take(x + m * w.inner + v * L, n) - mean[v];
          one[v] += d;
          other[v] += d * d;
        }
      }
      for (int v = 0; v < kW; ++v) {
        rest[v] += one[v];
        square[v] += other[v];
      }
    }
    for (int v = 0; v < kW; ++v) {
      if (i.valid > 0) correct(mean[v], square[v], rest[v], count);
      if (w.finished) square[v] /= count;
      give((A<T>*)w.first + i.part + k + v * L, mean[v], n, false);
      give((A<T>*)w.second + i.part + k + v * L, square[v], n, false);
    }
  });
}

template <class T, int kAct, bool kResidual>
SOLERA_INLINE void affine_columns(const ChannelWork& w, const Piece& i) {
  const A<T>* c = (const A<T>*)w.center + i.stats;
  const A<T>* s = (const A<T>*)w.scale + i.stats;
  const A<T>* t = (const A<T>*)w.shift + i.stats;
  for (int64_t m = 0; m < i.valid; ++m) {
    const int64_t at = i.data + m * w.inner;
    const T* x = (const T*)w.x + at;
    const T* residual = (const T*)w.residual + (kResidual ? at : 0);
    T* y = (T*)w.first + at;
    const bool streaming = w.streaming && can_stream(y);
    strips<kLanes<T>>(i.columns, [&](int64_t k, int n) {
      AccVec<T> z = (take(x + k, n) - take(c + k, n)) * take(s + k, n) + take(t + k, n);
      if (kResidual) z += take(residual + k, n);
      give(y + k, act<T>(z, kAct), n, streaming);
    });
  }
  for (int64_t m = i.valid; m < i.rows; ++m)
    memset((void*)((T*)w.first + i.data + m * w.inner), 0, size_t(i.columns) * sizeof(T));
}

template <class T, int kAct, bool kResidual>
SOLERA_INLINE void reduce_columns(const ChannelWork& w, const Piece& i) {
  constexpr int L = kLanes<T>;
  column_blocks<T, 4>(i.columns, [&](auto width, int64_t k, int n) {
    constexpr int kW = decltype(width)::value;
    const T* x = (const T*)w.x + i.data + k;
    const T* dy = (const T*)w.dy + i.data + k;
    const T* residual = (const T*)w.residual + (kResidual ? i.data + k : 0);
    AccVec<T> c[kW], s[kW], t[kW], total[2 * kW] = {};
    for (int v = 0; v < kW; ++v) {
      c[v] = take((const A<T>*)w.center + i.stats + k + v * L, n);
      s[v] = take((const A<T>*)w.scale + i.stats + k + v * L, n);
      t[v] = take((const A<T>*)w.shift + i.stats + k + v * L, n);
    }
    for (int64_t from = 0; from < i.valid; from += kRun) {
      const int64_t end = i.valid - from < kRun ? i.valid : from + kRun;
      AccVec<T> sum[2 * kW] = {};
      for (int64_t m = from; m < end; ++m) {
        for (int v = 0; v < kW; ++v) {
          const int64_t at = m * w.inner + v * L;
          const AccVec<T> d = take(x + at, n) - c[v];
          AccVec<T> g = take(dy + at, n);
          if (kAct != kNone) {
            AccVec<T> z = d * s[v] + t[v];
            if (kResidual) z += take(residual + at, n);
            g = act_slope<A<T>>(g, z, kAct);
          }
          sum[v] += g;
          sum[kW + v] += g * d;
        }
      }
      for (int v = 0; v < 2 * kW; ++v) total[v] += sum[v];
    }
    for (int v = 0; v < kW; ++v) {
      give((A<T>*)w.first + i.part + k + v * L, total[v], n, false);
      give((A<T>*)w.second + i.part + k + v * L, total[kW + v], n, false);
    }
  });
}

template <class T, int kAct, bool kResidual>
SOLERA_INLINE void gradient_columns(const ChannelWork& w, const Piece& i) {
  const A<T>* c = (const A<T>*)w.center + i.stats;
  const A<T>* s = (const A<T>*)w.scale + i.stats;
  const A<T>* t = (const A<T>*)w.shift + i.stats;
  const A<T>* p = (const A<T>*)w.p + i.stats;
  const A<T>* q = (const A<T>*)w.q + i.stats;
  T* dx = w.first ? (T*)w.first + i.data : nullptr;
  T* dresidual = w.second ? (T*)w.second + i.data : nullptr;
  with_flag(dx != nullptr, [&](auto has_dx) {
    with_flag(dresidual != nullptr, [&](auto has_dresidual) {
      for (int64_t m = 0; m < i.valid; ++m) {
        const int64_t at = m * w.inner;
        const T* x = (const T*)w.x + i.data + at;
        const T* dy = (const T*)w.dy + i.data + at;
        const T* residual = (const T*)w.residual + (kResidual ? i.data + at : 0);
        T* to_x = has_dx.value ? dx + at : nullptr;
        T* to_residual = has_dresidual.value ? dresidual + at : nullptr;
        const bool streaming = w.streaming && can_stream(to_x) && can_stream(to_residual);
        strips<kLanes<T>>(i.columns, [&](int64_t k, int n) {
          AccVec<T> g = take(dy + k, n);
          const AccVec<T> d = take(x + k, n) - take(c + k, n), scale = take(s + k, n);
          if (kAct != kNone) {
            AccVec<T> z = d * scale + take(t + k, n);
            if (kResidual) z += take(residual + k, n);
            g = act_slope<T>(g, z, kAct);
          }
          if (has_dx.value)
            give(to_x + k, g * scale + (d * take(p + k, n) + take(q + k, n)), n, streaming);
          if (has_dresidual.value) give(to_residual + k, g, n, streaming);
        });
      }
    });
  });
  const size_t width = size_t(i.columns) * sizeof(T);
  for (int64_t m = i.valid; m < i.rows; ++m) {
    if (dx) memset((void*)(dx + m * w.inner), 0, width);
    if (dresidual) memset((void*)(dresidual + m * w.inner), 0, width);
  }
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
