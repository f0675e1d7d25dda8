// The elementwise work around the products of the ensemble ops: scales, bias, activation and their
// derivatives on tiles of rows. What the ops do with it stands in batch_ensemble.cpp and
// member_linear.cpp.
#include "tiles.h"

#include "../activation.h"
#include "../strips.h"

namespace solera {

namespace SOLERA_ISA {
namespace {

template <int n>
struct EnsembleCount {
  static constexpr int value = n;
};

template <class T>
SOLERA_INLINE AccVec<T> delta_at(const T* dy, const T* saved, int n, int activation) {
  AccVec<T> g = get(dy, n);
  return activation == kNone ? g : slope(g, get(saved, n), activation);
}

// T: how tensors are stored. C: the tile's type, in which products run.
template <class T, class C>
struct Ensemble {
  typedef A<T> Real;
  typedef AccVec<T> V;

  static const Real* row(EnsembleRows rows, int64_t member) {
    return (const Real*)rows.data + member * rows.stride;
  }
  static void zero_rest(C* tile, const EnsembleTile& t) {
    memset((void*)(tile + t.count * t.columns), 0,
           size_t((t.padded - t.count) * t.columns) * sizeof(C));
  }

  static void scale(const void* x, EnsembleRows r, void* out, const EnsembleTile& t) {
    const int64_t D = t.columns;
    C* tile = (C*)out;
    for (int64_t j = 0; j < t.count; ++j) {
      const int64_t n = t.base + j * t.step;
      const T* from = (const T*)x + (t.shared ? n / t.members : n) * D;
      const Real* by = row(r, n % t.members);
      strips<kLanes<T>>(D, [&](int64_t i, int c) {
        put(tile + j * D + i, get(from + i, c) * get(by + i, c), c);
      });
    }
    zero_rest(tile, t);
  }

  template <int kActivation>
  static void finish_as(EnsembleMatrix h, EnsembleRows s, EnsembleRows bias, void* y, void* z,
                        const EnsembleTile& t) {
    for (int64_t j = 0; j < t.count; ++j) {
      const int64_t n = t.base + j * t.step, at = n * t.columns;
      const C* from = (const C*)h.data + j * h.stride;
      const Real *by = row(s, n % t.members), *plus = row(bias, n % t.members);
      strips<kLanes<T>>(t.columns, [&](int64_t i, int c) {
        V v = get(from + i, c) * get(by + i, c) + get(plus + i, c);
        if (z) put((T*)z + at + i, v, c);
        put((T*)y + at + i, activate(v, kActivation), c);
      });
    }
  }
  static void finish(EnsembleMatrix h, EnsembleRows s, EnsembleRows bias, void* y, void* z,
                     const EnsembleTile& t, int activation) {
    if (activation == kRelu) return finish_as<kRelu>(h, s, bias, y, z, t);
    if (activation == kGelu) return finish_as<kGelu>(h, s, bias, y, z, t);
    if (activation == kSilu) return finish_as<kSilu>(h, s, bias, y, z, t);
    finish_as<kNone>(h, s, bias, y, z, t);
  }

  static void delta(const void* dy, const void* saved, EnsembleRows s, void* out,
                    const EnsembleTile& t, int activation) {
    const int64_t D = t.columns;
    C* tile = (C*)out;
    for (int64_t j = 0; j < t.count; ++j) {
      const int64_t n = t.base + j * t.step;
      const Real* by = row(s, n % t.members);
      const T *g = (const T*)dy + n * D, *v = (const T*)saved + n * D;
      strips<kLanes<T>>(D, [&](int64_t i, int c) {
        put(tile + j * D + i, delta_at(g + i, v + i, c, activation) * get(by + i, c), c);
      });
    }
    zero_rest(tile, t);
  }

  // dx = d * r; of a shared x the sum over members, added to dx in the accumulator's type.
  static void finish_dx(EnsembleMatrix d, EnsembleRows r, void* dx, const EnsembleTile& t) {
    for (int64_t j = 0; j < t.count; ++j) {
      const int64_t n = t.base + j * t.step;
      const C* from = (const C*)d.data + j * d.stride;
      const Real* by = row(r, n % t.members);
      Real* sum = (Real*)dx + n / t.members * t.columns;
      T* to = (T*)dx + n * t.columns;
      strips<kLanes<T>>(t.columns, [&](int64_t i, int c) {
        V v = get(from + i, c) * get(by + i, c);
        if (t.shared)
          put(sum + i, get(sum + i, c) + v, c);
        else
          put(to + i, v, c);
      });
    }
  }

  // delta of one member, columns [first, first + width), as a dense tile; dbias += its sum over the
  // batch.
  static void gather_delta(const void* dy, const void* saved, void* out, void* dbias,
                           const EnsembleSpan& span, int64_t columns, int64_t first, int64_t width,
                           int activation) {
    constexpr int64_t kRows = 16;  // summed in registers before they join dbias
    for (int64_t b = span.begin; b < span.end; b += kRows) {
      const int64_t rows = span.end - b < kRows ? span.end - b : kRows;
      const int64_t at = (b * span.members + span.member) * columns + first;
      C* tile = (C*)out + (b - span.begin) * width;
      strips<kLanes<T>>(width, [&](int64_t o, int c) {
        V sum{};
        for (int64_t j = 0; j < rows; ++j) {
          const int64_t from = at + j * span.members * columns + o;
          V d = delta_at((const T*)dy + from, (const T*)saved + from, c, activation);
          put(tile + j * width + o, d, c);
          sum += d;
        }
        if (dbias) put((Real*)dbias + o, get((Real*)dbias + o, c) + sum, c);
      });
    }
  }

  // R rows of a block of G_k folded into dW, dr_k and ds_k (each may be null).
  template <int R>
  static void combine_rows(const C* g, const C* w, int64_t w_stride, Real* dw, int64_t dw_stride,
                           const Real* r, const Real* s, Real* dr, Real* ds, int64_t width) {
    V sums[R] = {};
    strips<kLanes<T>>(width, [&](int64_t i, int c) {
      const V scale = get(r + i, c);
      V column{};
      for (int o = 0; o < R; ++o) {
        V v = get(g + o * width + i, c);
        if (dw) {
          Real* to = dw + o * dw_stride + i;
          put(to, get(to, c) + v * scale * s[o], c);
        }
        v *= get(w + o * w_stride + i, c);
        column += v * s[o];
        sums[o] += v * scale;
      }
      if (dr) put(dr + i, get(dr + i, c) + column, c);
    });
    for (int o = 0; ds && o < R; ++o) ds[o] += lane_sum(sums[o]);
  }
  static void combine(const void* g_block, EnsembleMatrix w, EnsembleMatrix dw, const void* r,
                      const void* s, void* dr, void* ds, int64_t rows, int64_t width) {
    const auto from = [&](int64_t o, auto count) {
      combine_rows<decltype(count)::value>(
          (const C*)g_block + o * width, (const C*)w.data + o * w.stride, w.stride,
          dw.data ? (Real*)dw.data + o * dw.stride : nullptr, dw.stride, (const Real*)r,
          (const Real*)s + o, (Real*)dr, ds ? (Real*)ds + o : nullptr, width);
    };
    int64_t o = 0;
    for (; o + 8 <= rows; o += 8) from(o, EnsembleCount<8>{});
    for (; o < rows; ++o) from(o, EnsembleCount<1>{});
  }

  // out[i] = sum over the span's batch items of x[b, k, i] * d[b, k, i]
  static void member_dots(const void* x, bool shared, EnsembleMatrix d, void* out,
                          const EnsembleSpan& span, int64_t columns) {
    memset(out, 0, size_t(columns) * sizeof(Real));
    for (int64_t b = span.begin; b < span.end; ++b) {
      const int64_t n = b * span.members + span.member;
      const T* u = (const T*)x + (shared ? b : n) * columns;
      const C* v = (const C*)d.data + n * d.stride;
      Real* sum = (Real*)out;
      strips<kLanes<T>>(columns, [&](int64_t i, int c) {
        put(sum + i, get(sum + i, c) + get(u + i, c) * get(v + i, c), c);
      });
    }
  }
  static void member_dots_delta(const void* dy, const void* saved, EnsembleMatrix h, void* ds,
                                void* db, const EnsembleSpan& span, int64_t columns,
                                int activation) {
    if (ds) memset(ds, 0, size_t(columns) * sizeof(Real));
    if (db) memset(db, 0, size_t(columns) * sizeof(Real));
    for (int64_t b = span.begin; b < span.end; ++b) {
      const int64_t n = b * span.members + span.member, at = n * columns;
      const C* v = ds ? (const C*)h.data + n * h.stride : nullptr;
      strips<kLanes<T>>(columns, [&](int64_t o, int c) {
        V d = delta_at((const T*)dy + at + o, (const T*)saved + at + o, c, activation);
        if (ds) put((Real*)ds + o, get((Real*)ds + o, c) + d * get(v + o, c), c);
        if (db) put((Real*)db + o, get((Real*)db + o, c) + d, c);
      });
    }
  }

  static void add(const void* part, void* sum, int64_t n) {
    strips<kLanes<T>>(n, [&](int64_t i, int c) {
      put((Real*)sum + i, get((Real*)sum + i, c) + get((const C*)part + i, c), c);
    });
  }
  static void round(const void* sum, void* out, int64_t n) {
    strips<kLanes<T>>(n,
                      [&](int64_t i, int c) { put((T*)out + i, get((const Real*)sum + i, c), c); });
  }
  static void widen(const void* in, void* out, int64_t n) {
    strips<kLanes<T>>(n, [&](int64_t i, int c) { put((C*)out + i, get((const T*)in + i, c), c); });
  }
  // out (columns, rows) = the transpose of w, for row blocks [begin, end) of 16 rows each.
  static void transpose(const void* w, void* out, int64_t rows, int64_t columns, int64_t begin,
                        int64_t end) {
    constexpr int64_t kBlock = 16;
    for (int64_t i = begin * kBlock; i < end * kBlock && i < rows; i += kBlock)
      for (int64_t j = 0; j < columns; j += kBlock) {
        const int64_t m = rows - i < kBlock ? rows - i : kBlock,
                      n = columns - j < kBlock ? columns - j : kBlock;
        C block[kBlock][kBlock];
        for (int64_t a = 0; a < m; ++a)
          memcpy((void*)block[a], (const C*)w + (i + a) * columns + j, size_t(n) * sizeof(C));
        for (int64_t b = 0; b < n; ++b)
          for (int64_t a = 0; a < m; ++a) ((C*)out)[(j + b) * rows + i + a] = block[a][b];
      }
  }

  static constexpr EnsembleTable table() {
    return {scale,        finish,    delta,       finish_dx,
            gather_delta, combine,   member_dots, member_dots_delta,
            add,          transpose, round,       widen};
  }
};

}  // namespace

extern const EnsembleTables ensemble_tables;
const EnsembleTables ensemble_tables = {{
    Ensemble<float, float>::table(),
    Ensemble<double, double>::table(),
    Ensemble<bf16, float>::table(),
    Ensemble<f16, float>::table(),
    Ensemble<bf16, bf16>::table(),
}};

}  // namespace SOLERA_ISA
}  // namespace solera
