// The passes of scaling_passes.h on a matrix of few columns: planes [k][n], the lanes are rows.
// Each row's terms stay in registers. Included by scaling.cpp alone.
#pragma once

#include "scaling_passes.h"

namespace solera {
namespace SOLERA_ISA {
namespace {

template <class T>
void to_planes(const ScalingProblem& p, const void* logits, void* planes_, int64_t begin,
               int64_t end) {
  typedef typename Acc<T>::type A;
  const T* x = (const T*)logits;
  A* planes = (A*)planes_;
  for (int64_t i = begin; i < end; ++i)
    for (int64_t k = 0; k < p.k; ++k) {
      A value = 0;
      if (i < p.n) {
        if constexpr (sizeof(T) == 2)
          value = widen_one(x[i * p.k + k]);
        else
          value = x[i * p.k + k];
      }
      planes[k * p.rows + i] = value;
    }
}

// Calls body(i, weights) over whole vectors of the block's rows; weights of 0 beyond n.
template <class A, class F>
SOLERA_INLINE void over_row_vectors(const ScalingProblem& p, int64_t block, const F& body) {
  constexpr int L = Vec<A>::lanes;
  const A* weight = (const A*)p.weight;
  const int64_t begin = block * p.block_rows;
  const int64_t end = begin + p.block_rows < p.n ? begin + p.block_rows : p.n;
  for (int64_t i = begin; i < end; i += L) {
    const int lanes = int(end - i < L ? end - i : L);
    body(i, lanes == L ? load(weight + i) : load_n(weight + i, lanes), lanes);
  }
}

template <class A>
void skinny_column_parts(const ScalingProblem& p, void*, int64_t first, int64_t last) {
  constexpr int L = Vec<A>::lanes;
  const FlushSubnormals flush;
  const A scale = A(p.scale), *f = (const A*)p.f;
  for (int64_t block = first; block < last; ++block)
    for (int64_t k = 0; k < p.stride; ++k) {
      const A* x = (const A*)p.x + k * p.rows;
      Lanes<A> most = minus_infinity<A>(), sum{};
      const auto exponent = [&](int64_t i, Lanes<A> w, int lanes) {
        const Lanes<A> fi = lanes == L ? load(f + i) : load_n(f + i, lanes);
        return w == A(0) ? minus_infinity<A>() : scale * load(x + i) + fi;
      };
      if (k < p.k) {
        over_row_vectors<A>(p, block, [&](int64_t i, Lanes<A> w, int lanes) {
          most = vmax(exponent(i, w, lanes), most);
        });
        const A top = lane_max(most), shift = top == -A(__builtin_inf()) ? A(0) : top;
        most = splat(top);
        over_row_vectors<A>(p, block, [&](int64_t i, Lanes<A> w, int lanes) {
          sum += w * term<A>(exponent(i, w, lanes) - shift);
        });
      }
      ((A*)p.top)[block * p.stride + k] = most[0];
      ((A*)p.sum)[block * p.stride + k] = lane_sum(sum);
    }
}

// The terms of a vector of rows, their sum and their maximum; padded rows have terms of 1 and less.
template <class A>
SOLERA_INLINE Lanes<A> skinny_terms(const ScalingProblem& p, int64_t i, Lanes<A> weight,
                                    Lanes<A>* w, Lanes<A>& shift) {
  const A* g = (const A*)p.g;
  const A scale = A(p.scale);
  Lanes<A> top = minus_infinity<A>(), sum{};
  for (int64_t k = 0; k < p.k; ++k) {
    // A padded row may hold anything, NaN too.
    const Lanes<A> x = load((const A*)p.x + k * p.rows + i);
    w[k] = scale * (weight == A(0) ? Lanes<A>{} : x) + g[k];
    top = vmax(w[k], top);
  }
  shift = finite_shift<A>(top);
  for (int64_t k = 0; k < p.k; ++k) {
    w[k] = term<A>(w[k] - shift);
    sum += w[k];
  }
  return sum;
}

template <class A>
void skinny_row_pass(const ScalingProblem& p, void*, int64_t first, int64_t last) {
  const FlushSubnormals flush;
  A* f = (A*)p.f;
  for (int64_t block = first; block < last; ++block) {
    Lanes<A> total[kScalingSkinny] = {};
    over_row_vectors<A>(p, block, [&](int64_t i, Lanes<A> weight, int lanes) {
      Lanes<A> w[kScalingSkinny], shift;
      const Lanes<A> sum = skinny_terms<A>(p, i, weight, w, shift);
      const auto nothing = (sum == A(0)) | (weight == A(0));
      store_n(f + i, nothing ? minus_infinity<A>() : -(shift + log2_of_sum<A>(sum)), lanes);
      const Lanes<A> share = nothing ? Lanes<A>{} : weight / sum;
      for (int64_t k = 0; k < p.k; ++k) total[k] += share * w[k];
    });
    A* partial = (A*)p.sum + block * p.stride;
    for (int64_t k = 0; k < p.stride; ++k) partial[k] = k < p.k ? lane_sum(total[k]) : A(0);
  }
}

template <class T>
void skinny_assign(const ScalingProblem& p, void* out_, void*, int64_t first, int64_t last) {
  typedef typename Acc<T>::type A;
  const FlushSubnormals flush;
  T* out = (T*)out_;
  for (int64_t block = first; block < last; ++block)
    over_row_vectors<A>(p, block, [&](int64_t i, Lanes<A> weight, int lanes) {
      Lanes<A> w[kScalingSkinny], shift;
      const Lanes<A> sum = skinny_terms<A>(p, i, weight, w, shift);
      const Lanes<A> inverse = weight == A(0) ? Lanes<A>{} : 1 / sum;
      for (int64_t k = 0; k < p.k; ++k) {
        T lane[kLanes<T>];
        store(lane, w[k] * inverse);
        for (int r = 0; r < lanes; ++r) out[(i + r) * p.k + k] = lane[r];
      }
    });
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
