// Elementwise weights of two tensors, a range of elements at a time: what an op of its own and the
// tiles of a linear layer share.
//
//   mixout  W~ = kept ? U + (W - U) s : U,  s = 1 / (1 - p);  dW = kept ? s g : 0,  dU = g - dW
//   mask    W~ = M > a ? W : 0;                               dW = M > a ? g : 0,   dM = W g
#pragma once

#include "mask.h"
#include "../strips.h"

namespace solera {

enum ReparamKind : int { kMixout = 0, kMixoutColumn = 1, kMaskedWeight = 2 };

struct ReparamItem {
  int kind;
  const void* weight;
  const void* other;  // the anchor (null: zeros) or the score
  void* dweight;      // gradients of the same shape, or null
  void* dother;
  int64_t columns;  // elements that share one row of a column mask
  uint64_t seed;
  uint32_t key;
  const uint32_t* words;  // of a column mask
  uint64_t bound;         // an element is kept where its word is below
  double number;          // s, or the threshold a
  bool streaming;         // results past the caches; `built` only where it is the result
};

struct ReparamTable {
  // Over elements [begin, end). `built` gets the weights and `grad` holds their gradients, both
  // counted from `begin` and possibly null: in the weight's own type, or in its accumulator's.
  void (*own[4])(const ReparamItem&, int64_t begin, int64_t end, void* built, const void* grad);
  void (*tile[4])(const ReparamItem&, int64_t begin, int64_t end, void* built, const void* grad);
  void (*words)(uint64_t seed, uint32_t key, int64_t begin, int64_t end, uint32_t* out);
  void (*dropout[4])(const ReparamItem&, double eps, int64_t begin, int64_t end);
  void (*compand[4])(const void* v, double a, double b, int kind, void* out, bool streaming,
                     int64_t begin, int64_t end);
  void (*compand_backward[4])(const void* g, const void* v, double a, double b, int kind, void* dv,
                              double* sums, bool streaming, int64_t begin, int64_t end);
  // For float and double: sums over rows of columns [begin, end); to += from.
  void (*column_sums[2])(const void* rows, void* out, int64_t count, int64_t columns, int64_t begin,
                         int64_t end);
  void (*add[2])(const void* from, void* to, int64_t n);
};
constexpr int64_t kMaskChunkElements = 512;

namespace SOLERA_ISA {
namespace {

// Calls body(element, words, count) over [begin, end) in pieces; words are null where kind needs
// none.
template <class F>
SOLERA_INLINE void each_piece(const ReparamItem& item, int64_t begin, int64_t end, const F& body) {
  if (item.kind == kMaskedWeight) {
    body(begin, (const uint32_t*)nullptr, end - begin);
  } else if (item.kind == kMixoutColumn) {
    for (int64_t e = begin; e < end;) {
      const int64_t column = e % item.columns;
      const int64_t n = item.columns - column < end - e ? item.columns - column : end - e;
      body(e, item.words + column, n);
      e += n;
    }
  } else {
    alignas(64) uint32_t words[kMaskChunk];
    for (int64_t e = begin; e < end;) {
      const int64_t chunk = e / kMaskChunk, inside = e % kMaskChunk;
      const int64_t n = kMaskChunk - inside < end - e ? kMaskChunk - inside : end - e;
      mask_chunk(chunk, item.key, 0, item.seed, words);
      body(e, (const uint32_t*)words + inside, n);
      e += n;
    }
  }
}

// All bits set in the lanes of elements that are kept.
struct Kept {
  uint32_t last, any;  // word <= last, if any is kept at all
  SOLERA_INLINE explicit Kept(uint64_t bound)
      : last(uint32_t(bound - 1)), any(bound == 0 ? 0u : ~0u) {}
  SOLERA_INLINE vi lanes(const uint32_t* words, int n, float) const {
    vu w{};
    memcpy(&w, words, n == kLanes<float> ? sizeof w : size_t(n) * 4);
    return (vi)(w <= last) & (vi)(vu{} + any);
  }
  SOLERA_INLINE vl lanes(const uint32_t* words, int n, double) const {
    typedef uint32_t half __attribute__((vector_size(SOLERA_VECTOR_BYTES / 2)));
    half w{};
    memcpy(&w, words, n == kLanes<double> ? sizeof w : size_t(n) * 4);
    return (vl)(__builtin_convertvector(w, vl) <= int64_t(last)) & -int64_t(any != 0);
  }
};

template <class T, class B>
SOLERA_INLINE void mixout_piece(const ReparamItem& item, int64_t e, const uint32_t* words,
                                int64_t n, B* built, const B* grad) {
  typedef typename Acc<T>::type S;
  const Kept kept(item.bound);
  const S scale = S(item.number);
  const T* w = (const T*)item.weight + e;
  const T* u = item.other ? (const T*)item.other + e : nullptr;
  T* dw = item.dweight ? (T*)item.dweight + e : nullptr;
  T* du = item.dother ? (T*)item.dother + e : nullptr;
  const bool past = item.streaming && built && !grad && can_stream(built);
  const bool past_dw = item.streaming && dw && can_stream(dw);
  const bool past_du = item.streaming && du && can_stream(du);
  with_flag(u != nullptr, [&](auto anchored) {
    strips<kLanes<T>>(n, [&](int64_t j, int m) {
      const auto keep_lanes = kept.lanes(words + j, m, S{});
      if (built) {
        AccVec<T> base{}, x = get(w + j, m);
        if constexpr (decltype(anchored)::value) {
          base = get(u + j, m);
          x -= base;
        }
        const AccVec<T> moved = base + rounded(x * scale);
        put(built + j, keep_lanes ? moved : base, m, past);
      }
      if (grad && (dw || du)) {
        const AccVec<T> g = get(grad + j, m);
        const AccVec<T> d = keep_lanes ? rounded(g * scale) : AccVec<T>{};
        if (dw) put(dw + j, d, m, past_dw);
        if (du) put(du + j, g - d, m, past_du);
      }
    });
  });
}

template <class T, class B>
SOLERA_INLINE void masked_piece(const ReparamItem& item, int64_t e, int64_t n, B* built,
                                const B* grad) {
  typedef typename Acc<T>::type S;
  const AccVec<T> threshold = splat(S(item.number));
  const T* w = (const T*)item.weight + e;
  const T* score = (const T*)item.other + e;
  T* dw = item.dweight ? (T*)item.dweight + e : nullptr;
  T* dm = item.dother ? (T*)item.dother + e : nullptr;
  const bool past = item.streaming && built && !grad && can_stream(built);
  const bool past_dw = item.streaming && dw && can_stream(dw);
  const bool past_dm = item.streaming && dm && can_stream(dm);
  strips<kLanes<T>>(n, [&](int64_t j, int m) {
    if (built) put(built + j, get(score + j, m) > threshold ? get(w + j, m) : AccVec<T>{}, m, past);
    if (!grad) return;
    const AccVec<T> g = get(grad + j, m);
    if (dw) put(dw + j, get(score + j, m) > threshold ? g : AccVec<T>{}, m, past_dw);
    if (dm) put(dm + j, g * get(w + j, m), m, past_dm);
  });
}

template <class T, class B>
void reparam_run(const ReparamItem& item, int64_t begin, int64_t end, void* built_in,
                 const void* grad_in) {
  B* built = (B*)built_in;
  const B* grad = (const B*)grad_in;
  each_piece(item, begin, end, [&](int64_t e, const uint32_t* words, int64_t n) {
    B* at_built = built ? built + (e - begin) : nullptr;
    const B* at_grad = grad ? grad + (e - begin) : nullptr;
    if (item.kind == kMaskedWeight)
      masked_piece<T, B>(item, e, n, at_built, at_grad);
    else
      mixout_piece<T, B>(item, e, words, n, at_built, at_grad);
  });
  if (item.streaming) stream_fence();
}

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
