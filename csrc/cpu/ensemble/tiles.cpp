// The elementwise work around the products of the ensemble ops: scales, bias, activation and their
// derivatives on tiles of rows. What the ops do with it stands in batch_ensemble.cpp and
// member_linear.cpp.
#include "tiles.h"

namespace solera {

namespace SOLERA_ISA {
namespace {

template <class T>
using A = typename Acc<T>::type;

template <class T, class F>
SOLERA_INLINE void strips(int64_t n, const F& body) {
  int64_t j = 0;
  for (; j + kLanes<T> <= n; j += kLanes<T>) body(j, kLanes<T>);
  if (j < n) body(j, int(n - j));
}
template <class T>
SOLERA_INLINE AccVec<T> get(const T* p, int count) {
  return count == kLanes<T> ? load(p) : load_n(p, count);
}
template <class T>
SOLERA_INLINE void put(T* p, AccVec<T> v, int count) {
  if (count == kLanes<T>)
    store(p, v);
  else
    store_n(p, v, count);
}

// The normal distribution function and exp(-z^2/2). Near zero an odd polynomial in z, further out
// exp(-z^2/2) t P(t) with t = 1 / (1 + 0.35 |z|), fitted for this file: 1e-7 of the largest value.
SOLERA_INLINE void normal_cdf(vf z, vf& cdf, vf& bell) {
  vf a = z < 0 ? -z : z, u = z * z;
  bell = expv(u * -0.5f);
  vf p = splat(4.1155571186326275e-07f);
  p = p * u - 8.718302019400613e-06f;
  p = p * u + 0.00011435638491697361f;
  p = p * u - 0.0011864884846784344f;
  p = p * u + 0.009973241304377791f;
  p = p * u - 0.0664903350265112f;
  p = p * u + 0.39894227933791165f;
  vf t = 1.0f / (1.0f + 0.35f * a);
  vf q = splat(0.041896703389993725f);
  q = q * t - 0.10687591203031702f;
  q = q * t + 0.04146666303732552f;
  q = q * t + 0.031926204777293056f;
  q = q * t + 0.08998357404533877f;
  q = q * t + 0.1224055256404623f;
  q = q * t + 0.13963308544249262f;
  q = q * t + 0.13962978183403957f;
  vf tail = t * q * bell;
  cdf = a < 1.5f ? 0.5f + z * p : (z > 0 ? 1.0f - tail : tail);
  cdf = z == z ? cdf : z;
}
SOLERA_INLINE void normal_cdf(vd z, vd& cdf, vd& bell) {
  for (int i = 0; i < Vec<double>::lanes; ++i) {
    cdf[i] = 0.5 * __builtin_erfc(z[i] * -0.70710678118654752440);
    bell[i] = __builtin_exp(-0.5 * z[i] * z[i]);
  }
}

template <int n>
struct EnsembleCount {
  static constexpr int value = n;
};

enum : int { kNone = 0, kRelu = 1, kGelu = 2, kSilu = 3 };

template <class V>
SOLERA_INLINE V activate(V z, int activation) {
  if (activation == kRelu) return z <= 0 ? V{} : z;
  if (activation == kSilu) return z / (1 + expv(-z));
  if (activation == kGelu) {
    V cdf, bell;
    normal_cdf(z, cdf, bell);
    return z * cdf;
  }
  return z;
}
// dy * act'(z); for relu v may be z or y.
template <class V>
SOLERA_INLINE V slope(V dy, V v, int activation) {
  if (activation == kRelu) return v <= 0 ? V{} : dy;
  if (activation == kSilu) {
    V sigmoid = 1 / (1 + expv(-v));
    return dy * sigmoid * (1 + v * (1 - sigmoid));
  }
  V cdf, bell;
  normal_cdf(v, cdf, bell);
  const auto scale = decltype(v[0] + v[0])(0.39894228040143267794);
  return dy * (cdf + v * bell * scale);
}
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
      strips<T>(D, [&](int64_t i, int c) {
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
      strips<T>(t.columns, [&](int64_t i, int c) {
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
      strips<T>(D, [&](int64_t i, int c) {
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
      strips<T>(t.columns, [&](int64_t i, int c) {
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
      strips<T>(width, [&](int64_t o, int c) {
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
    strips<T>(width, [&](int64_t i, int c) {
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
      strips<T>(columns, [&](int64_t i, int c) {
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
      strips<T>(columns, [&](int64_t o, int c) {
        V d = delta_at((const T*)dy + at + o, (const T*)saved + at + o, c, activation);
        if (ds) put((Real*)ds + o, get((Real*)ds + o, c) + d * get(v + o, c), c);
        if (db) put((Real*)db + o, get((Real*)db + o, c) + d, c);
      });
    }
  }

  static void add(const void* part, void* sum, int64_t n) {
    strips<T>(n, [&](int64_t i, int c) {
      put((Real*)sum + i, get((Real*)sum + i, c) + get((const C*)part + i, c), c);
    });
  }
  static void round(const void* sum, void* out, int64_t n) {
    strips<T>(n, [&](int64_t i, int c) { put((T*)out + i, get((const Real*)sum + i, c), c); });
  }
  static void widen(const void* in, void* out, int64_t n) {
    strips<T>(n, [&](int64_t i, int c) { put((C*)out + i, get((const T*)in + i, c), c); });
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
