// The elementwise work between the products of a network of shared-weight layers: what leaves a
// layer forward, what enters it backward, and the dropout masks. Used by batch_ensemble_mlp.cpp.
#pragma once
#include "tiles.h"

#include "../activation.h"
#include "../philox.h"
#include "../strips.h"

namespace solera {

// The mask of one layer: an element is kept if its 16 random bits reach `cut`, and then scaled.
struct NetworkDropout {
  uint64_t key;
  uint32_t layer, cut;  // cut 0: no dropout
  double scale;
};
// What happens to a layer's product h: z = s h + bias, a = act(z) times the mask.
struct NetworkLayer {
  EnsembleRows s, bias;
  int activation;
  NetworkDropout drop;
  int64_t columns;
};
// Rows [base, base + count) of the (B*K) rows.
struct NetworkSpan {
  int64_t base, count, padded, members;
  void* mask;  // a row of accumulators
};
// Where the rows of a layer's gradient go: sums (K, columns) in the accumulator's type, or null.
struct NetworkSums {
  void *dr, *ds, *db;
};

struct NetworkTable {
  // h (a tile, or the rows of `saved` themselves) to the next operand r a (a tile) or to y (rows).
  void (*leave)(EnsembleMatrix h, void* saved, const NetworkLayer&, const EnsembleRows* next_r,
                void* out, const NetworkSpan&);
  // The gradient of a (dy, rows; or d r, a tile, with the sum dr of d a and the operand u = r a) to
  // the tile e = s delta, or to the rows `bare` of delta itself.
  void (*enter)(const void* dy, EnsembleMatrix d, const EnsembleRows* r, const void* h,
                const NetworkLayer&, void* e, void* u, void* bare, NetworkSums, const NetworkSpan&);
  // The same at the network's input: dr, u and dx (rows, or sums of a shared x), each may be null.
  void (*input)(EnsembleMatrix d, EnsembleRows r, const void* x, bool shared, void* u, void* dr,
                void* dx, int64_t columns, const NetworkSpan&);
};
// By Dtype, and last bfloat16 with bfloat16 tiles.
struct NetworkTables {
  NetworkTable of[5];
};

namespace SOLERA_ISA {
namespace {

// The mask of row n: one Philox block for eight elements that lie 16 apart, so that a vector of
// blocks gives vectors of neighbours.
template <class Real>
void network_mask(const NetworkDropout& drop, int64_t n, int64_t columns, Real* mask) {
  constexpr int kWords = kLanes<float>, kGroup = 128, kBlocks = 16;
  const vu lane = lane_numbers();
  for (int64_t group = 0; group < columns; group += kGroup) {
    uint16_t bits[kGroup];
    for (int block = 0; block < kBlocks; block += kWords) {
      const PhiloxWords random =
          philox(lane + uint32_t(group / kGroup * kBlocks + block), uint32_t(n),
                 uint32_t(uint64_t(n) >> 32), drop.layer, drop.key);
      for (int w = 0; w < 4; ++w) {
        const vh low = truncate(random.word[w] & 0xffffu), high = truncate(random.word[w] >> 16);
        memcpy(bits + (2 * w) * kBlocks + block, &low, sizeof low);
        memcpy(bits + (2 * w + 1) * kBlocks + block, &high, sizeof high);
      }
    }
    const int64_t count = columns - group < kGroup ? columns - group : kGroup;
    for (int64_t i = 0; i < count; ++i)
      mask[group + i] = bits[i] >= drop.cut ? Real(drop.scale) : Real(0);
  }
}

template <class T>
SOLERA_INLINE AccVec<T> as_stored(AccVec<T> v) {
  if constexpr (sizeof(T) == 2)
    return widen(narrow(v, T{}), T{});
  else
    return v;
}

// T: how tensors are stored. C: the tile's type, in which products run.
template <class T, class C>
struct Network {
  typedef A<T> Real;
  typedef AccVec<T> V;

  static const Real* row(const EnsembleRows& rows, int64_t member) {
    return (const Real*)rows.data + member * rows.stride;
  }
  static Real* sums(void* p, int64_t member, int64_t columns) {
    return p ? (Real*)p + member * columns : nullptr;
  }
  SOLERA_INLINE static void add_to(Real* p, int64_t i, V v, int c) {
    put(p + i, get(p + i, c) + v, c);
  }
  static void zero_rest(C* tile, const NetworkSpan& n, int64_t columns) {
    memset((void*)(tile + n.count * columns), 0,
           size_t((n.padded - n.count) * columns) * sizeof(C));
  }
  static void fill_mask(const NetworkLayer& layer, int64_t n, void* mask) {
    if (layer.drop.cut) network_mask(layer.drop, n, layer.columns, (Real*)mask);
  }

  template <int kActivation>
  static void leave_as(EnsembleMatrix h, void* saved, const NetworkLayer& layer,
                       const EnsembleRows* next_r, void* out, const NetworkSpan& span) {
    const int64_t D = layer.columns;
    const Real* mask = layer.drop.cut ? (const Real*)span.mask : nullptr;
    for (int64_t j = 0; j < span.count; ++j) {
      const int64_t n = span.base + j, k = n % span.members;
      const C* from = (const C*)h.data + j * h.stride;
      const Real *s = row(layer.s, k), *bias = row(layer.bias, k);
      const Real* r = next_r ? row(*next_r, k) : nullptr;
      fill_mask(layer, n, span.mask);
      strips<kLanes<T>>(D, [&](int64_t i, int c) {
        const V product = as_stored<T>(get(from + i, c));
        if (saved) put((T*)saved + n * D + i, product, c);
        V a = activate(product * get(s + i, c) + get(bias + i, c), kActivation);
        if (mask) a *= get(mask + i, c);
        if (r)
          put((C*)out + j * D + i, a * get(r + i, c), c);
        else
          put((T*)out + n * D + i, a, c);
      });
    }
    if (next_r) zero_rest((C*)out, span, D);
  }
  static void leave(EnsembleMatrix h, void* saved, const NetworkLayer& layer,
                    const EnsembleRows* next_r, void* out, const NetworkSpan& span) {
    if (layer.activation == kRelu) return leave_as<kRelu>(h, saved, layer, next_r, out, span);
    if (layer.activation == kGelu) return leave_as<kGelu>(h, saved, layer, next_r, out, span);
    if (layer.activation == kSilu) return leave_as<kSilu>(h, saved, layer, next_r, out, span);
    leave_as<kNone>(h, saved, layer, next_r, out, span);
  }

  template <int kActivation>
  static void enter_as(const void* dy, EnsembleMatrix d, const EnsembleRows* r_rows, const void* h,
                       const NetworkLayer& layer, void* e, void* u, void* bare, NetworkSums to,
                       const NetworkSpan& span) {
    const int64_t D = layer.columns;
    const Real* mask = layer.drop.cut ? (const Real*)span.mask : nullptr;
    for (int64_t j = 0; j < span.count; ++j) {
      const int64_t n = span.base + j, k = n % span.members;
      const T* product_row = (const T*)h + n * D;
      const Real *s = row(layer.s, k), *bias = row(layer.bias, k);
      const Real* r = r_rows ? row(*r_rows, k) : nullptr;
      const C* d_row = (const C*)d.data + j * d.stride;
      Real *dr = sums(to.dr, k, D), *ds = sums(to.ds, k, D), *db = sums(to.db, k, D);
      fill_mask(layer, n, span.mask);
      strips<kLanes<T>>(D, [&](int64_t i, int c) {
        const V product = get(product_row + i, c), scale = get(s + i, c);
        const V z = product * scale + get(bias + i, c);
        V g;
        if (r) {
          g = get(d_row + i, c);
          const V by = get(r + i, c);
          if (dr || u) {
            V a = activate(z, kActivation);
            if (mask) a *= get(mask + i, c);
            if (dr) add_to(dr, i, g * a, c);
            if (u) put((C*)u + j * D + i, a * by, c);
          }
          g *= by;
        } else {
          g = get((const T*)dy + n * D + i, c);
        }
        if (mask) g *= get(mask + i, c);
        const V delta = kActivation == kNone ? g : slope(g, z, kActivation);
        if (ds) add_to(ds, i, delta * product, c);
        if (db) add_to(db, i, delta, c);
        if (bare)
          put((T*)bare + n * D + i, delta, c);
        else if (e)
          put((C*)e + j * D + i, delta * scale, c);
      });
    }
    if (e) zero_rest((C*)e, span, D);
  }
  static void enter(const void* dy, EnsembleMatrix d, const EnsembleRows* r, const void* h,
                    const NetworkLayer& layer, void* e, void* u, void* bare, NetworkSums to,
                    const NetworkSpan& span) {
    if (layer.activation == kRelu) return enter_as<kRelu>(dy, d, r, h, layer, e, u, bare, to, span);
    if (layer.activation == kGelu) return enter_as<kGelu>(dy, d, r, h, layer, e, u, bare, to, span);
    if (layer.activation == kSilu) return enter_as<kSilu>(dy, d, r, h, layer, e, u, bare, to, span);
    enter_as<kNone>(dy, d, r, h, layer, e, u, bare, to, span);
  }

  static void input(EnsembleMatrix d, EnsembleRows r_rows, const void* x, bool shared, void* u,
                    void* dr_sums, void* dx, int64_t D, const NetworkSpan& span) {
    for (int64_t j = 0; j < span.count; ++j) {
      const int64_t n = span.base + j, k = n % span.members;
      const T* from = (const T*)x + (shared ? n / span.members : n) * D;
      const Real* r = row(r_rows, k);
      const C* d_row = (const C*)d.data + j * d.stride;
      Real* dr = sums(dr_sums, k, D);
      Real* total = (Real*)dx + n / span.members * D;
      strips<kLanes<T>>(D, [&](int64_t i, int c) {
        const V a = get(from + i, c), by = get(r + i, c);
        if (u) put((C*)u + j * D + i, a * by, c);
        if (!dr && !dx) return;
        const V g = get(d_row + i, c);
        if (dr) add_to(dr, i, g * a, c);
        if (dx && shared)
          add_to(total, i, g * by, c);
        else if (dx)
          put((T*)dx + n * D + i, g * by, c);
      });
    }
  }

  static constexpr NetworkTable table() { return {leave, enter, input}; }
};

}  // namespace
}  // namespace SOLERA_ISA
}  // namespace solera
