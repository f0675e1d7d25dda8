// The passes of core scaling over a tall matrix of logits, for one instruction set. Included by
// scaling.cpp alone.
//
// In base 2: t_nk = scale * x_nk, row potentials F, column potentials G, row weights r (0: a padded
// row, never read).
//   column_parts  top and sum with sum_n r_n 2^(t_nk + F_n) = sum_k 2^(top_k), a share a row block
//   row_pass      F_n = -log2 sum_k 2^(t_nk + G_k), and the block's sum_n r_n 2^(F_n + t_nk + G_k)
//   assign        2^(F_n + t_nk + G_k), rows that sum to 1
// row_pass makes a whole iteration of one read from memory and one exponential an entry: the terms
// relative to the row's maximum stay in a buffer of one to four rows, and divided by their sum they
// are already the next column pass's terms. The maximum is a pass over the same four rows in L1:
// any logits have a row sum in [1, K]. Only a column in which nothing shows (its sum below 1e-20 of
// the total) has to be done again, by column_parts.
//
// Where the logits' range and the potentials' allow (kScalingReach: cosines / 0.05 need 58 of it),
// exponents are known to be in range: no maximum, no clamps. `near_start` is column_parts with the
// first row's maximum as its only shift, and finds the range.
//
// Below kScalingSkinny columns a row would leave most of a vector empty: the matrix is copied once
// into planes [k][n], and the lanes are rows.
#pragma once

#include "../exponential.h"

namespace solera {

struct ScalingProblem {
  const void* x;           // [n][k] logits, or planes [k][rows] in the accumulation type
  const void *weight, *g;  // [n] and [stride]; g beyond k gives no weight
  void* f;                 // [n]
  void *top, *sum;         // [blocks][stride]
  int64_t n, k, stride, rows, block_rows, blocks;  // rows: n rounded up to whole vectors
  double scale, total;                             // total: sum of the weights
  double shift;                                    // of near_start
  void* extremes;  // [blocks][2] least and largest exponent that near_start met
  bool near;       // row_pass and assign: exponents are in range
};
constexpr double kScalingReach = 90.0;
constexpr double kScalingPad = -126.0;  // a padded column's potential there
constexpr int64_t kScalingSkinny = 16;
constexpr int kScalingRows = 4;   // rows in flight
constexpr int kScalingTile = 16;  // rows whose column maxima are taken before their exponentials

namespace SOLERA_ISA {
namespace {

template <class A>
using Lanes = typename Vec<A>::type;

// Below this share of the total weight a column's sum may have lost its terms to underflow.
SOLERA_INLINE float believed(float) { return 1e-20f; }
SOLERA_INLINE double believed(double) { return 1e-150; }
SOLERA_INLINE float log2_one(float x) { return __builtin_log2f(x); }
SOLERA_INLINE double log2_one(double x) { return __builtin_log2(x); }

template <class A>
SOLERA_INLINE Lanes<A> minus_infinity() {
  return splat(-A(__builtin_inf()));
}

// 2^t, 0 below the normal numbers.
template <class A>
SOLERA_INLINE Lanes<A> term(Lanes<A> t) {
  const Lanes<A> w = fast_exp2(t);
  return t < Exponents<A>::smallest ? Lanes<A>{} : w;
}
// 2^t for exponents between -kScalingReach and kScalingReach; what it gives outside is not used.
SOLERA_INLINE vf near_exp2(vf x) {
#if defined(__AVX512F__)
  const vf t = (vf)_mm512_reduce_ps((__m512)x, 1);
  return (vf)_mm512_scalef_ps((__m512)power(t), (__m512)x);
#else
  const vf shifted = x + 12582912.0f;
  const vf t = x - (shifted - 12582912.0f);
  return bits_as<vf>(bits_as<vu>(power(t)) + (bits_as<vu>(shifted) << 23));
#endif
}
SOLERA_INLINE vd near_exp2(vd x) { return fast_exp2(x); }
template <class A>
SOLERA_INLINE Lanes<A> finite_shift(Lanes<A> top) {
  return top == minus_infinity<A>() ? Lanes<A>{} : top;
}
template <class A>
SOLERA_INLINE Lanes<A> log2_of_sum(Lanes<A> sum) {
  const Lanes<A> value = fast_log2(sum);
  return sum == sum ? (sum > A(0) ? value : minus_infinity<A>()) : sum;
}

// Calls body(j, vectors of R rows at column j); the last vectors may be partly zeros.
template <class T, int R, class F>
SOLERA_INLINE void over_columns(const T* const* row, int64_t k, const F& body) {
  constexpr int L = kLanes<T>;
  AccVec<T> x[R];
  int64_t j = 0;
  for (; j + L <= k; j += L) {
    for (int r = 0; r < R; ++r) {
      x[r] = load(row[r] + j);
      // The next rows, into L2: no stream follows a page's end, and L1 is full of this row.
      __builtin_prefetch(row[r] + R * k + j, 0, 2);
    }
    body(j, x);
  }
  if (j < k) {
    for (int r = 0; r < R; ++r) x[r] = load_n(row[r] + j, int(k - j));
    body(j, x);
  }
}

// Calls few(row indices, Count<R>) over the rows with weight of [begin, end), R at a time.
template <int R>
struct Count {
  static constexpr int value = R;
};
template <class A, class F>
SOLERA_INLINE void over_live_rows(const A* weight, int64_t begin, int64_t end, const F& few,
                                  int most = kScalingRows) {
  int64_t live[kScalingRows];
  int count = 0;
  for (int64_t i = begin; i < end; ++i) {
    if (weight[i] == 0) continue;
    live[count++] = i;
    if (count < most) continue;
    if (most == kScalingRows)
      few(live, Count<kScalingRows>{});
    else if (most == 2)
      few(live, Count<2>{});
    else
      few(live, Count<1>{});
    count = 0;
  }
  for (int r = 0; r < count; ++r) few(live + r, Count<1>{});
}

// How many rows' terms lie in L1 together: 16 KiB of them, beside G and the column sums.
template <class A>
SOLERA_INLINE int rows_in_reach(const ScalingProblem& p) {
  const int64_t bytes = p.stride * int64_t(sizeof(A));
  return bytes <= 4096 ? 4 : bytes <= 8192 ? 2 : 1;
}

template <class T>
void column_parts(const ScalingProblem& p, void* scratch, int64_t first, int64_t last) {
  typedef typename Acc<T>::type A;
  constexpr int L = kLanes<T>;
  const FlushSubnormals flush;
  const T* x = (const T*)p.x;
  const A *weight = (const A*)p.weight, *f = (const A*)p.f;
  const A scale = A(p.scale);
  A* next = (A*)scratch;
  for (int64_t block = first; block < last; ++block) {
    A *top = (A*)p.top + block * p.stride, *sum = (A*)p.sum + block * p.stride;
    for (int64_t j = 0; j < p.stride; j += L) {
      store(top + j, minus_infinity<A>());
      store(sum + j, Lanes<A>{});
    }
    const int64_t begin = block * p.block_rows;
    const int64_t end = begin + p.block_rows < p.n ? begin + p.block_rows : p.n;
    for (int64_t i = begin; i < end; i += kScalingTile) {
      const int64_t stop = i + kScalingTile < end ? i + kScalingTile : end;
      memcpy(next, top, size_t(p.stride) * sizeof(A));
      over_live_rows(weight, i, stop, [&](const int64_t* at, auto count) {
        constexpr int R = decltype(count)::value;
        const T* row[R];
        for (int r = 0; r < R; ++r) row[r] = x + at[r] * p.k;
        over_columns<T, R>(row, p.k, [&](int64_t j, const Lanes<A>* v) {
          Lanes<A> most = load(next + j);
          for (int r = 0; r < R; ++r) most = vmax(scale * v[r] + f[at[r]], most);
          store(next + j, most);
        });
      });
      for (int64_t j = 0; j < p.stride; j += L) {
        const Lanes<A> now = load(next + j);
        store(sum + j, load(sum + j) * term<A>(load(top + j) - finite_shift<A>(now)));
        store(top + j, now);
      }
      over_live_rows(weight, i, stop, [&](const int64_t* at, auto count) {
        constexpr int R = decltype(count)::value;
        const T* row[R];
        for (int r = 0; r < R; ++r) row[r] = x + at[r] * p.k;
        over_columns<T, R>(row, p.k, [&](int64_t j, const Lanes<A>* v) {
          const Lanes<A> shift = finite_shift<A>(load(top + j));
          Lanes<A> s = load(sum + j);
          for (int r = 0; r < R; ++r) s += weight[at[r]] * term<A>(scale * v[r] + f[at[r]] - shift);
          store(sum + j, s);
        });
      });
    }
  }
}

// scale times the largest logit of the first row with weight, or NaN.
template <class T>
double first_maximum(const ScalingProblem& p) {
  typedef typename Acc<T>::type A;
  const A* weight = (const A*)p.weight;
  int64_t i = 0;
  while (i < p.n && weight[i] == 0) ++i;
  if (i == p.n) return __builtin_nan("");
  const T* row = (const T*)p.x + i * p.k;
  Lanes<A> top = minus_infinity<A>();
  over_columns<T, 1>(&row, p.k / kLanes<T> * kLanes<T>,
                     [&](int64_t, const Lanes<A>* x) { top = vmax(x[0], top); });
  return p.scale * double(lane_max(top));
}

template <class T>
void near_start(const ScalingProblem& p, void*, int64_t first, int64_t last) {
  typedef typename Acc<T>::type A;
  constexpr int L = kLanes<T>;
  const A *weight = (const A*)p.weight, scale = A(p.scale), shift = A(p.shift);
  for (int64_t block = first; block < last; ++block) {
    A *top = (A*)p.top + block * p.stride, *partial = (A*)p.sum + block * p.stride;
    for (int64_t j = 0; j < p.stride; j += L) {
      store(top + j, splat(shift));
      store(partial + j, Lanes<A>{});
    }
    const int64_t begin = block * p.block_rows;
    const int64_t end = begin + p.block_rows < p.n ? begin + p.block_rows : p.n;
    Lanes<A> low{}, high{}, check{};
    over_live_rows(weight, begin, end, [&](const int64_t* at, auto count) {
      constexpr int R = decltype(count)::value;
      const T* row[R];
      for (int r = 0; r < R; ++r) row[r] = (const T*)p.x + at[r] * p.k;
      over_columns<T, R>(row, p.k, [&](int64_t j, const Lanes<A>* x) {
        Lanes<A> sum = load(partial + j);
        for (int r = 0; r < R; ++r) {
          Lanes<A> t = scale * x[r] - shift;
          for (int64_t lane = p.k - j; lane < L; ++lane) t[lane] = 0;
          low = t < low ? t : low;
          high = vmax(t, high);
          check += t;  // a NaN shows here
          sum += weight[at[r]] * near_exp2(t);
        }
        store(partial + j, sum);
      });
    });
    A* extremes = (A*)p.extremes + 2 * block;
    const A total = lane_sum(check);
    extremes[0] = total - total == 0 ? -lane_max(-low) : A(__builtin_nan(""));
    extremes[1] = lane_max(high);
  }
}

// The terms of R rows relative to their maximum in `buffer`, and their sums; -> log2 of the
// maximum.
template <class T, int R, bool Near>
SOLERA_INLINE void row_terms(const ScalingProblem& p, const int64_t* at,
                             typename Acc<T>::type* buffer, typename Acc<T>::type* shift,
                             typename Acc<T>::type* sum) {
  typedef typename Acc<T>::type A;
  const A* g = (const A*)p.g;
  const A scale = A(p.scale);
  const T* row[R];
  Lanes<A> top[R], total[R];
  for (int r = 0; r < R; ++r) {
    row[r] = (const T*)p.x + at[r] * p.k;
    top[r] = minus_infinity<A>();
    total[r] = Lanes<A>{};
  }
  if (!Near)
    over_columns<T, R>(row, p.k, [&](int64_t j, const Lanes<A>* v) {
      const Lanes<A> gj = load(g + j);
      for (int r = 0; r < R; ++r) top[r] = vmax(scale * v[r] + gj, top[r]);
    });
  for (int r = 0; r < R; ++r) {
    shift[r] = lane_max(top[r]);
    if (Near || shift[r] == -A(__builtin_inf())) shift[r] = 0;
  }
  over_columns<T, R>(row, p.k, [&](int64_t j, const Lanes<A>* v) {
    const Lanes<A> gj = load(g + j);
    for (int r = 0; r < R; ++r) {
      const Lanes<A> w =
          Near ? near_exp2(scale * v[r] + gj) : term<A>(scale * v[r] + gj - shift[r]);
      total[r] += w;
      store(buffer + r * p.stride + j, w);
    }
  });
  for (int r = 0; r < R; ++r) sum[r] = lane_sum(total[r]);
}

template <class T, bool Near>
void row_pass(const ScalingProblem& p, void* scratch, int64_t first, int64_t last) {
  typedef typename Acc<T>::type A;
  constexpr int L = kLanes<T>;
  const FlushSubnormals flush;
  const A* weight = (const A*)p.weight;
  A *f = (A*)p.f, *buffer = (A*)scratch;
  for (int64_t block = first; block < last; ++block) {
    A* partial = (A*)p.sum + block * p.stride;
    memset((void*)partial, 0, size_t(p.stride) * sizeof(A));
    const int64_t begin = block * p.block_rows;
    const int64_t end = begin + p.block_rows < p.n ? begin + p.block_rows : p.n;
    over_live_rows(
        weight, begin, end,
        [&](const int64_t* at, auto count) {
          constexpr int R = decltype(count)::value;
          A shift[R], sum[R], share[R];
          row_terms<T, R, Near>(p, at, buffer, shift, sum);
          for (int r = 0; r < R; ++r) {
            // A row that allows nothing takes no part.
            f[at[r]] = sum[r] == 0 ? -A(__builtin_inf()) : -(shift[r] + log2_one(sum[r]));
            share[r] = sum[r] == 0 ? A(0) : weight[at[r]] / sum[r];
          }
          for (int64_t j = 0; j < p.stride; j += L) {
            Lanes<A> c = load(partial + j);
            for (int r = 0; r < R; ++r) c += share[r] * load(buffer + r * p.stride + j);
            store(partial + j, c);
          }
        },
        rows_in_reach<A>(p));
  }
}

template <class T, bool Near>
void assign(const ScalingProblem& p, void* out_, void* scratch, int64_t begin, int64_t end) {
  typedef typename Acc<T>::type A;
  constexpr int L = kLanes<T>;
  const FlushSubnormals flush;
  const A* weight = (const A*)p.weight;
  T* out = (T*)out_;
  A* buffer = (A*)scratch;
  const bool past_caches = p.n * p.k * int64_t(sizeof(T)) >= (int64_t(4) << 20);
  for (int64_t i = begin; i < end; ++i)
    if (weight[i] == 0) memset((void*)(out + i * p.k), 0, size_t(p.k) * sizeof(T));
  over_live_rows(
      weight, begin, end,
      [&](const int64_t* at, auto count) {
        constexpr int R = decltype(count)::value;
        A shift[R], sum[R];
        row_terms<T, R, Near>(p, at, buffer, shift, sum);
        for (int r = 0; r < R; ++r) {
          T* row = out + at[r] * p.k;
          const A* w = buffer + r * p.stride;
          const A inverse = 1 / sum[r];
          int64_t j = 0;
          if (past_caches && can_stream(row))
            for (; j + L <= p.k; j += L) stream(row + j, load(w + j) * inverse);
          for (; j + L <= p.k; j += L) store(row + j, load(w + j) * inverse);
          if (j < p.k) store_n(row + j, load(w + j) * inverse, int(p.k - j));
        }
      },
      rows_in_reach<A>(p));
  if (past_caches) stream_fence();
}

// ---- the column sums of all blocks, added in order ----

// log2 of the columns' sums from tops and sums.
template <class A>
void merge_columns(const ScalingProblem& p, void* out) {
  constexpr int L = Vec<A>::lanes;
  const FlushSubnormals flush;
  const A *top = (const A*)p.top, *sum = (const A*)p.sum;
  for (int64_t j = 0; j < p.stride; j += L) {
    Lanes<A> most = minus_infinity<A>(), total{};
    for (int64_t b = 0; b < p.blocks; ++b) most = vmax(load(top + b * p.stride + j), most);
    const Lanes<A> shift = finite_shift<A>(most);
    for (int64_t b = 0; b < p.blocks; ++b)
      total += load(sum + b * p.stride + j) * term<A>(load(top + b * p.stride + j) - shift);
    store((A*)out + j, shift + log2_of_sum<A>(total));
  }
}

// log2 of the columns' sums without G from the shares of row_pass; NaN where they are not believed.
// Returns how many of the k columns those are.
template <class A>
int64_t add_columns(const ScalingProblem& p, void* out) {
  constexpr int L = Vec<A>::lanes;
  const A low = A(believed(A(0)) * p.total), nan = A(__builtin_nan(""));
  int64_t bad = 0;
  for (int64_t j = 0; j < p.stride; j += L) {
    Lanes<A> total{};
    for (int64_t b = 0; b < p.blocks; ++b) total += load((const A*)p.sum + b * p.stride + j);
    const Lanes<A> value = fast_log2(total) - load((const A*)p.g + j);
    const auto good = (total > low) & (total < A(sizeof(A) == 4 ? 3e38 : 1e308));
    store((A*)out + j, good ? value : splat(nan));
    for (int r = 0; r < L && j + r < p.k; ++r) bad += !good[r];
  }
  return bad;
}

// dx = p * (c - <p, c>) with c = gradient - weight * y, rows at a time: softmax's gradient with the
// implicit part folded in.
template <class T>
void backward_rows(const void* q_, const void* grad_, const void* y_, const void* weight_,
                   void* out_, int64_t k, int64_t begin, int64_t end) {
  typedef typename Acc<T>::type A;
  constexpr int L = kLanes<T>;
  const A *y = (const A*)y_, *weight = (const A*)weight_;
  for (int64_t i = begin; i < end; ++i) {
    const T *q = (const T*)q_ + i * k, *grad = grad_ ? (const T*)grad_ + i * k : nullptr;
    T* out = (T*)out_ + i * k;
    Lanes<A> dot{};
    const auto take = [&](const T* from, int64_t j, int lanes) {
      return lanes == L ? load(from + j) : load_n(from + j, lanes);
    };
    const auto c = [&](int64_t j, int lanes) {
      const Lanes<A> yj = lanes == L ? load(y + j) : load_n(y + j, lanes);
      const Lanes<A> d = grad ? take(grad, j, lanes) : Lanes<A>{};
      return d - weight[i] * yj;
    };
    for (int64_t j = 0; j < k; j += L) {
      const int lanes = int(k - j < L ? k - j : L);
      dot += take(q, j, lanes) * c(j, lanes);
    }
    const A inner = lane_sum(dot);
    for (int64_t j = 0; j < k; j += L) {
      const int lanes = int(k - j < L ? k - j : L);
      const Lanes<A> d = take(q, j, lanes) * (c(j, lanes) - inner);
      if (lanes == L)
        store(out + j, d);
      else
        store_n(out + j, d, lanes);
    }
  }
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
