// A row of logits, a vector at a time: what the cores member_logits, member_statistics,
// logit_mixture and distillation share.
#pragma once

#include "../natural.h"
#include "../strips.h"

namespace solera {

constexpr int64_t kLogitBlock = 1024;  // columns that stay in L1 between two passes over a block
constexpr int64_t kScratchSlack = 16;  // elements that a scratch is longer than its whole lines

namespace SOLERA_ISA {
namespace {

// 0, 1, 2, ... in a vector of integers as wide as A.
SOLERA_INLINE vi lane_numbers(float) {
  static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return bits_as<vi>(load((const float*)numbers));
}
SOLERA_INLINE vl lane_numbers(double) {
  static const int64_t numbers[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  return bits_as<vl>(load((const double*)numbers));
}

// Lanes at or past count set to `other`.
template <class T>
SOLERA_INLINE AccVec<T> keep_or(AccVec<T> v, int count, A<T> other) {
  if (count == kLanes<T>) return v;
  return lane_numbers(A<T>()) < count ? v : splat(other);
}

// As get and put, with one masked access for a row's last lanes where the machine has it.
template <class T>
SOLERA_INLINE AccVec<T> fetch(const T* p, int count) {
#if defined(__AVX512F__)
  if (count != kLanes<T>) {
    if constexpr (sizeof(T) == 2)
      return widen((vh)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p), T{});
    else
      return load_tail(p, count);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    if (count != kLanes<T>)
      return (vf)_mm256_maskload_ps(p, (__m256i)(lane_numbers(float()) < count));
  if constexpr (sizeof(T) == 8)
    if (count != kLanes<T>)
      return (vd)_mm256_maskload_pd(p, (__m256i)(lane_numbers(double()) < count));
#endif
  return get(p, count);
}
template <class T>
SOLERA_INLINE void deposit(T* p, AccVec<T> v, int count) {
#if defined(__AVX512F__)
  if (count != kLanes<T>) {
    if constexpr (sizeof(T) == 2)
      _mm256_mask_storeu_epi16(p, (__mmask16)((1u << count) - 1), (__m256i)narrow(v, T{}));
    else if constexpr (sizeof(T) == 4)
      _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
    else
      _mm512_mask_storeu_pd(p, (__mmask8)((1u << count) - 1), (__m512d)v);
    return;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4)
    if (count != kLanes<T>)
      return _mm256_maskstore_ps(p, (__m256i)(lane_numbers(float()) < count), (__m256)v);
  if constexpr (sizeof(T) == 8)
    if (count != kLanes<T>)
      return _mm256_maskstore_pd(p, (__m256i)(lane_numbers(double()) < count), (__m256d)v);
#endif
  put(p, v, count);
}

// lane_max without leaving the registers where there is such an instruction.
template <class V>
SOLERA_INLINE auto lane_top(V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(v[0]) == 4)
    return _mm512_reduce_max_ps((__m512)v);
  else
    return _mm512_reduce_max_pd((__m512d)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(v[0]) == 4) {
    const __m128 low = _mm256_castps256_ps128((__m256)v);
    const __m128 q = _mm_max_ps(low, _mm256_extractf128_ps((__m256)v, 1));
    const __m128 e = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(e, _mm_shuffle_ps(e, e, 1)));
  } else {
    const __m128d low = _mm256_castpd256_pd128((__m256d)v);
    const __m128d q = _mm_max_pd(low, _mm256_extractf128_pd((__m256d)v, 1));
    return _mm_cvtsd_f64(_mm_max_sd(q, _mm_unpackhi_pd(q, q)));
  }
#else
  return lane_max(v);
#endif
}

// Where a loop's values come from, so that it can ask for them in time: InCache has nothing to ask
// for. A row that is read once, in order, and with arithmetic in between waits for memory far
// longer than a bare read does: the machine's own prefetcher begins anew at each 4 KB page, and too
// few loads fit the window behind some twenty instructions each. So Lines asks for the lines 1 KB
// ahead of a loop, and the ones 6 KB ahead (past the next page's beginning) into L2. Beyond the end
// of a tensor that is no fault.
// (Not to be wrapped in a lambda: GCC takes a function of prefetches alone for one without effect.)
struct InCache {
  SOLERA_INLINE void operator()(int64_t, int) const {}
  SOLERA_INLINE InCache from(int64_t) const { return {}; }
};
template <class T>
struct Lines {
  const T* at;
  SOLERA_INLINE Lines from(int64_t j) const { return {at + j}; }
  SOLERA_INLINE void operator()(int64_t j, int count) const {
    const uintptr_t from = uintptr_t(at) + uintptr_t(j) * sizeof(T);
    for (int b = 0; b < count * int(sizeof(T)); b += 64) {
      __builtin_prefetch((const char*)(from + 1024 + b), 0, 3);
      __builtin_prefetch((const char*)(from + 6144 + b), 0, 2);
    }
  }
};

// The largest of value(offset, count) over a row of n, never below `lowest`; NaN is passed over.
template <class T, class F, class M = InCache>
SOLERA_INLINE A<T> row_max(int64_t n, A<T> lowest, const F& value, const M& ahead = M()) {
  constexpr int L = kLanes<T>;
  AccVec<T> m0 = splat(lowest), m1 = m0, m2 = m0, m3 = m0;
  int64_t j = 0;
  for (; j + 4 * L <= n; j += 4 * L) {
    ahead(j, 4 * L);
    m0 = vmax(m0, value(j, L));
    m1 = vmax(m1, value(j + L, L));
    m2 = vmax(m2, value(j + 2 * L, L));
    m3 = vmax(m3, value(j + 3 * L, L));
  }
  if (j < n) ahead(j, int(n - j));
  for (; j + L <= n; j += L) m0 = vmax(m0, value(j, L));
  if (j < n) m1 = vmax(m1, keep_or<T>(value(j, int(n - j)), int(n - j), lowest));
  return lane_top(vmax(vmax(m0, m1), vmax(m2, m3)));
}

// One bit a lane: where v is x, or where v is NaN.
template <class V, class S>
SOLERA_INLINE uint64_t equal_lanes(V v, S x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4)
    return _mm512_cmp_ps_mask((__m512)v, (__m512)splat(x), _CMP_EQ_OQ);
  else
    return _mm512_cmp_pd_mask((__m512d)v, (__m512d)splat(x), _CMP_EQ_OQ);
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4)
    return uint64_t(_mm256_movemask_ps((__m256)(v == splat(x))));
  else
    return uint64_t(_mm256_movemask_pd((__m256d)(v == splat(x))));
#else
  uint64_t bits = 0;
  for (unsigned i = 0; i < sizeof(V) / sizeof(S); ++i) bits |= uint64_t(v[i] == x) << i;
  return bits;
#endif
}
template <class V>
SOLERA_INLINE uint64_t nan_lanes(V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(v[0]) == 4)
    return _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  else
    return _mm512_cmp_pd_mask((__m512d)v, (__m512d)v, _CMP_UNORD_Q);
#elif defined(__AVX2__)
  if constexpr (sizeof(v[0]) == 4)
    return uint64_t(_mm256_movemask_ps((__m256)(v != v)));
  else
    return uint64_t(_mm256_movemask_pd((__m256d)(v != v)));
#else
  uint64_t bits = 0;
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) bits |= uint64_t(v[i] != v[i]) << i;
  return bits;
#endif
}

// The first column of n whose bit is set, n if there is none; 64 columns to a branch.
template <class T, class F>
SOLERA_INLINE int64_t first_column(const T* x, int64_t n, const F& bits) {
  constexpr int L = kLanes<T>, kGroup = L >= 8 ? 64 / L : 8;
  int64_t j = 0;
  uint64_t found = 0;
  for (; j + kGroup * L <= n; j += kGroup * L) {
    for (int i = 0; i < kGroup; ++i) found |= bits(load(x + j + i * L)) << (i * L);
    if (found) return j + __builtin_ctzll(found);
  }
  int at = 0;
  for (; j + at + L <= n; at += L) found |= bits(load(x + j + at)) << at;
  const int left = int(n - j - at);
  if (left > 0) found |= (bits(fetch(x + j + at, left)) & ((uint64_t(1) << left) - 1)) << at;
  return found ? j + __builtin_ctzll(found) : n;
}

// Calls body(first, count) over [0, width) in blocks.
template <class F>
SOLERA_INLINE void logit_blocks(int64_t width, const F& body) {
  for (int64_t first = 0; first < width; first += kLogitBlock)
    body(first, width - first < kLogitBlock ? width - first : kLogitBlock);
}

// A running sum of e^(v - top), block by block. `top` is the first block's largest value and is
// raised only where a block goes past it by kSlack: a pass over each block for its maximum alone
// would wait for memory and then leave it idle. Within the slack a sum keeps its accuracy (it is
// relative) and its logarithm the binade that a vocabulary's sum is in anyway.
template <class T>
struct RowSum {
  static constexpr A<T> kSlack = A<T>(4);
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
  SOLERA_INLINE bool fits(A<T> here) const { return !(here > top + kSlack); }
  SOLERA_INLINE A<T> log_total() const { return natural_log_one(sum); }
};

// Adds a block; kKeep: its exponentials, relative to the top it leaves, go to e, in whole vectors.
template <bool kKeep, class T, class F, class M = InCache>
SOLERA_INLINE void add_block(RowSum<T>& row, int64_t n, A<T>* e, const F& value,
                             const M& ahead = M()) {
  constexpr int L = kLanes<T>;
  const A<T> lowest = lowest_of(A<T>());
  if (row.top == lowest) row.raise(row_max<T>(n, lowest, value));
  for (;;) {
    const A<T> top = row.top;
    AccVec<T> s0{}, s1{}, s2{}, s3{}, m0 = splat(lowest), m1 = m0, m2 = m0, m3 = m0;
    const auto add = [&](int64_t j, AccVec<T>& s, AccVec<T>& m) {
      const AccVec<T> v = value(j, L), x = natural_exp(v - top);
      if (kKeep) store(e + j, x);
      s += x;
      m = vmax(m, v);
    };
    int64_t j = 0;
    for (; j + 4 * L <= n; j += 4 * L) {
      ahead(j, 4 * L);
      add(j, s0, m0);
      add(j + L, s1, m1);
      add(j + 2 * L, s2, m2);
      add(j + 3 * L, s3, m3);
    }
    for (; j + L <= n; j += L) add(j, s0, m0);
    if (j < n) {
      const int left = int(n - j);
      const AccVec<T> v = value(j, left), x = keep_or<T>(natural_exp(v - top), left, 0);
      if (kKeep) store(e + j, x);
      s1 += x;
      m1 = vmax(m1, keep_or<T>(v, left, lowest));
    }
    const A<T> here = lane_top(vmax(vmax(m0, m1), vmax(m2, m3)));
    if (row.fits(here)) {
      row.sum += lane_sum((s0 + s1) + (s2 + s3));
      return;
    }
    row.raise(here);
  }
}

// Scratch from the first whole line on: a vector across two lines costs two accesses.
template <class A>
SOLERA_INLINE A* whole_lines(void* scratch) {
  return (A*)((uintptr_t(scratch) + 63) / 64 * 64);
}

// The sum of a whole row of value(offset, count).
template <class T, class F, class M = InCache>
SOLERA_INLINE RowSum<T> sum_of_row(int64_t width, const F& value, const M& ahead = M()) {
  RowSum<T> row;
  logit_blocks(width, [&](int64_t first, int64_t n) {
    add_block<false>(
        row, n, (A<T>*)nullptr, [&](int64_t j, int count) { return value(first + j, count); },
        ahead.from(first));
  });
  return row;
}

// Writes value(offset, count) over a row, past the caches if asked, whatever the row's alignment.
template <class T, class F, class M = InCache>
SOLERA_INLINE void write_row(T* out, int64_t width, bool streaming, const F& value,
                             const M& ahead = M()) {
  constexpr int L = kLanes<T>, kGroup = L * int(sizeof(T)) < 64 ? 64 / (L * int(sizeof(T))) : 1;
  int64_t j = 0;
  const auto groups = [&](const auto& put_vector) {  // a line's vectors at a time
    for (; j + kGroup * L <= width; j += kGroup * L) {
      ahead(j, kGroup * L);
      for (int i = 0; i < kGroup; ++i) put_vector(j + i * L);
    }
    for (; j + L <= width; j += L) put_vector(j);
  };
  if (streaming) {
    constexpr uintptr_t bytes = L * sizeof(T);
    const int64_t head = int64_t((bytes - uintptr_t(out) % bytes) % bytes / sizeof(T));
    if (head > 0 && head <= width) {
      deposit(out, value(0, int(head)), int(head));
      j = head;
    }
    groups([&](int64_t i) { stream(out + i, value(i, L)); });
  } else {
    groups([&](int64_t i) { store(out + i, value(i, L)); });
  }
  if (j < width) deposit(out + j, value(j, int(width - j)), int(width - j));
}

// One element of a row that may just have been streamed.
template <class T>
SOLERA_INLINE void put_one(T* out, A<T> value, bool streaming) {
  if (streaming) stream_fence();
  AccVec<T> v{};
  v[0] = value;
  put(out, v, 1);
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
