// The loss of an ensemble's row and its gradients in one pass, for the core member_logits; the
// formulas are in python/solera/ensemble/member_logits.py.
#pragma once

#include "member_rows.h"

namespace solera {

struct MemberLoss {
  MemberRows logits;
  const int64_t* target;
  const void *weights, *scale;      // may be null: 1 / K; 1
  void *loss, *dlogits, *dweights;  // gradients may be null
  int64_t row_step, member_step;
  int kind;     // as in COMBINATIONS
  bool shared;  // dlogits (N, 1, C): all members have one
  bool kept;    // the exponentials of K rows stay in the scratch
  bool streaming;
};
enum MemberKind : int { kMeanLogit = 0, kMeanProbability = 1, kMeanLoss = 2 };

constexpr int64_t kKeptRows = int64_t(4) << 20;  // bytes
// In the accumulator's type, of a thread: exponentials, each block's top, numbers of the members.
inline int64_t loss_scratch(int64_t members, int64_t width, bool kept) {
  const int64_t rows = kept ? members : 1, padded = (width + 15) / 16 * 16;
  return rows * (padded + width / kLogitBlock + 1) + 5 * members + kScratchSlack;
}

namespace SOLERA_ISA {
namespace {

// Asks for what a row's next block holds at this place: between the two lie the blocks of all other
// members, so the machine's own prefetcher sees no stream.
template <class T>
SOLERA_INLINE void next_block(const T* x) {
  const uintptr_t next = uintptr_t(x) + uintptr_t(kLogitBlock) * sizeof(T);
  __builtin_prefetch((const char*)next, 0, 2);
}

// The weighted sum over the members of `count` columns from `first` on, into `row`.
template <class T>
SOLERA_INLINE void weighted_block(const MemberRows& logits, const A<T>* weights, int64_t n,
                                  int64_t first, int64_t count, A<T>* row) {
  constexpr int L = kLanes<T>;
  int64_t k = 0;
  const auto add = [&](int64_t members) {
    const T *x0 = member_row<T>(logits, n, k) + first,
            *x1 = member_row<T>(logits, n, k + (members > 1)) + first;
    const A<T> w0 = weights[k], w1 = members > 1 ? weights[k + 1] : A<T>(0);
    strips<L>(count, [&](int64_t j, int lanes) {
      next_block(x0 + j);
      if (members > 1) next_block(x1 + j);
      AccVec<T> v = w0 * fetch(x0 + j, lanes);
      if (k > 0) v += fetch(row + j, lanes);
      if (members > 1) v += w1 * fetch(x1 + j, lanes);
      deposit(row + j, v, lanes);
    });
  };
  for (; k + 2 <= logits.members; k += 2) add(2);
  if (k < logits.members) add(1);
}

// The log-softmax of `picked` under a row's sum.
template <class T>
SOLERA_INLINE A<T> log_softmax(const RowSum<T>& row, A<T> picked) {
  return row.sum == 0 ? A<T>(__builtin_nan("")) : (picked - row.top) - natural_log_one(row.sum);
}

// Exponentials kept while `top` rose, all relative to where it ended.
template <class A>
SOLERA_INLINE void level(int64_t width, A top, const A* tops, A* e) {
  logit_blocks(width, [&](int64_t first, int64_t count) {
    const A before = *tops++;
    if (before == top) return;
    const A factor = natural_exp_one(before - top);
    strips<kLanes<A>>(count, [&](int64_t j, int lanes) {
      deposit(e + first + j, fetch(e + first + j, lanes) * factor, lanes);
    });
  });
}

// Of one row n: its loss and, from the exponentials kept in the scratch, its gradients.
template <class T>
struct LossRows {
  const MemberLoss& p;
  const int64_t members = p.logits.members, width = p.logits.width,
                blocks = width / kLogitBlock + 1;
  const A<T> scale, mean = A<T>(1) / A<T>(members);
  A<T>*e, *tops, *top, *sum, *logp, *uniform;
  int64_t n = 0, y = 0;
  const A<T>* w = nullptr;

  SOLERA_INLINE LossRows(const MemberLoss& given, void* scratch)
      : p(given), scale(given.scale == nullptr ? A<T>(1) : *(const A<T>*)given.scale) {
    const int64_t rows = p.kept ? members : 1;
    e = whole_lines<A<T>>(scratch);
    tops = e + rows * ((width + 15) / 16 * 16);
    top = tops + rows * blocks;
    sum = top + members;
    logp = sum + members;
    uniform = logp + members;
    for (int64_t k = 0; k < members; ++k) uniform[k] = mean;
  }
  SOLERA_INLINE T* out(int64_t k) const {
    return (T*)p.dlogits + n * p.row_step + k * p.member_step;
  }
  SOLERA_INLINE A<T>* dweights() const { return (A<T>*)p.dweights + n * members; }
  SOLERA_INLINE A<T>* kept(int64_t k) const {
    return e + (p.kept ? k : 0) * ((width + 15) / 16 * 16);
  }
  SOLERA_INLINE A<T>* kept_tops(int64_t k) const { return tops + (p.kept ? k : 0) * blocks; }

  template <bool kKeep>
  SOLERA_INLINE void scan(int64_t k) {
    const T* x = member_row<T>(p.logits, n, k);
    A<T>*to = kept(k), *each = kept_tops(k);
    RowSum<T> row;
    logit_blocks(width, [&](int64_t first, int64_t count) {
      add_block<kKeep>(
          row, count, to + first, [&](int64_t j, int lanes) { return fetch(x + first + j, lanes); },
          Lines<T>{x + first});
      if (kKeep) *each++ = row.top;
    });
    top[k] = row.top;
    sum[k] = row.sum;
    logp[k] = log_softmax(row, y < width ? get(x + y, 1)[0] : A<T>(__builtin_nan("")));
  }
  // factor (softmax - [c = y]) of member k.
  template <bool kKept>
  SOLERA_INLINE void write(int64_t k, A<T> factor) {
    if (kKept) {
      A<T>* from = kept(k);
      level<A<T>>(width, top[k], kept_tops(k), from);
      const A<T> f = factor / sum[k];
      write_row(out(k), width, p.streaming,
                [&](int64_t j, int lanes) { return fetch(from + j, lanes) * f; });
    } else {
      const T* x = member_row<T>(p.logits, n, k);
      const A<T> largest = top[k], log_total = natural_log_one(sum[k]);
      write_row(out(k), width, p.streaming, [&](int64_t j, int lanes) {
        return natural_exp((fetch(x + j, lanes) - largest) - log_total) * factor;
      });
    }
    if (y < width)
      put_one(out(k) + y, factor * A<T>(__builtin_expm1(double(logp[k]))), p.streaming);
  }
  SOLERA_INLINE A<T> mean_loss() {
    A<T> total = 0;
    for (int64_t k = 0; k < members; ++k) {
      if (p.dlogits != nullptr) {
        scan<true>(k);
        write<true>(k, scale * w[k]);
      } else {
        scan<false>(k);
      }
      total += w[k] * logp[k];
      if (p.dweights != nullptr) dweights()[k] = -scale * logp[k];
    }
    return -total;
  }
  SOLERA_INLINE A<T> mean_probability() {
    A<T> largest = lowest_of(A<T>()), total = 0;
    for (int64_t k = 0; k < members; ++k) {
      if (p.kept)
        scan<true>(k);
      else
        scan<false>(k);
      if (logp[k] > largest) largest = logp[k];
    }
    for (int64_t k = 0; k < members; ++k) total += w[k] * natural_exp_one(logp[k] - largest);
    for (int64_t k = 0; k < members; ++k) {
      const A<T> share = natural_exp_one(logp[k] - largest) / total;
      if (p.dweights != nullptr) dweights()[k] = -scale * share;
      if (p.dlogits == nullptr) continue;
      if (p.kept)
        write<true>(k, scale * w[k] * share);
      else
        write<false>(k, scale * w[k] * share);
    }
    return -(largest + natural_log_one(total));
  }
  SOLERA_INLINE A<T> mean_logit() {
    A<T> values[kLogitBlock], picked = A<T>(__builtin_nan(""));
    A<T>* each = tops;
    RowSum<A<T>> row;
    logit_blocks(width, [&](int64_t first, int64_t count) {
      weighted_block<T>(p.logits, w, n, first, count, values);
      if (y >= first && y < first + count) picked = values[y - first];
      add_block<true>(row, count, e + first,
                      [&](int64_t j, int lanes) { return fetch(values + j, lanes); });
      *each++ = row.top;
    });
    const A<T> found = log_softmax(row, picked);
    if (p.dlogits == nullptr && p.dweights == nullptr) return -found;
    level<A<T>>(width, row.top, tops, e);
    const A<T> f = scale / row.sum;
    strips<kLanes<A<T>>>(
        width, [&](int64_t j, int lanes) { deposit(e + j, fetch(e + j, lanes) * f, lanes); });
    if (y < width) e[y] = scale * A<T>(__builtin_expm1(double(found)));
    for (int64_t k = 0; k < members; ++k) {
      const A<T> factor = w[k], lowest = lowest_of(A<T>());
      if (p.dlogits != nullptr && (k == 0 || !p.shared))
        write_row(out(k), width, p.streaming,
                  [&](int64_t j, int lanes) { return fetch(e + j, lanes) * factor; });
      if (p.dweights == nullptr) continue;
      // <d, x> = <d, x - c> as d sums to 0; with the label's c its large term is gone.
      const T* x = member_row<T>(p.logits, n, k);
      const A<T> at_label = y < width ? get(x + y, 1)[0] : A<T>(0);
      const A<T> c = at_label >= lowest ? at_label : A<T>(0);
      dweights()[k] = row_sum<T>(width, [&](int64_t j, int lanes) {
        return fetch(e + j, lanes) * (at_least(lowest, fetch(x + j, lanes)) - c);
      });
    }
    return -found;
  }
  SOLERA_INLINE A<T> left_out() {
    for (int64_t k = 0; k < members; ++k) {
      if (p.dlogits != nullptr && (k == 0 || !p.shared))
        memset((void*)out(k), 0, size_t(width) * sizeof(T));
      if (p.dweights != nullptr) dweights()[k] = 0;
    }
    return 0;
  }
};

template <class T>
void loss(const MemberLoss& p, void* scratch, int64_t begin, int64_t end) {
  LossRows<T> rows(p, scratch);
  for (int64_t n = begin; n < end; ++n) {
    rows.n = n;
    rows.y = p.target[n];
    rows.w = p.weights == nullptr ? rows.uniform : (const A<T>*)p.weights + n * rows.members;
    const A<T> found = rows.y < 0                   ? rows.left_out()
                       : p.kind == kMeanLogit       ? rows.mean_logit()
                       : p.kind == kMeanProbability ? rows.mean_probability()
                                                    : rows.mean_loss();
    ((A<T>*)p.loss)[n] = found * rows.scale;
  }
  if (p.streaming) stream_fence();
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
