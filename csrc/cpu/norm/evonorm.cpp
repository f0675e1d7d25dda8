// EvoNorm: normalisation and activation as one elementwise function of x and per-set coefficients.
//
//   x is (A, M, K), coefficients (A, K); z = slope * x
//   S (left is null):  u = x * sigmoid(z)
//   B:                 D = max(left, z + offset)    u = x / D
//   y = u * scale + shift
//
// Backward, with g = dy, w = g * scale: one pass of sums over M and one elementwise pass.
//   S, s = sigmoid(z): dslope = sum w x x s (1 - s)      dx = w s (1 + z (1 - s))
//   B, e = -w u / D, e_z = e where z + offset > left (half of it at a tie):
//     dleft = sum e - e_z      doffset = sum e_z      dslope = sum e_z x      dx = w / D + slope
//     e_z
//   dshift = sum g      dscale = sum g u;  dx gains p (x - mean) + q from the moments.
//
// Bytes an element: forward reads x, writes y; the sums read dy and x; the gradient reads dy and x,
// writes dx. With the moments' own pass over x that is 8 elements of traffic. A set's sums are
// taken in chunks of fixed size, added up in order in double: same bits for any number of threads.
#include "channel_pieces.h"

namespace solera {

struct EvoNorm {
  const void *dy, *x;  // dy is null in the forward
  void* out;           // y or dx
  const void *shift, *scale, *slope, *left, *offset, *mean, *p, *q;
  void* partial;  // (A, chunks, sums, K)
  int64_t M, K, chunks, chunk;
  bool streaming;
};
constexpr int kEvoSumsS = 3, kEvoSumsB = 5;

struct EvoNormTable {
  // Items are (set a, chunk of M).
  void (*forward[4])(const EvoNorm&, int64_t begin, int64_t end);
  void (*reduce[4])(const EvoNorm&, int64_t begin, int64_t end);
  void (*gradient[4])(const EvoNorm&, int64_t begin, int64_t end);
  // out (sums, A, K) from partial, items a.
  void (*finish[2])(const EvoNorm&, int64_t A, int64_t begin, int64_t end);
};

namespace SOLERA_ISA {
namespace {

template <class T>
struct EvoCoefficients {
  AccVec<T> shift, scale, slope, left, offset, mean, p, q;
};

// Of set a, column k on; where K is 1 the same in every lane.
template <class T>
SOLERA_INLINE AccVec<T> coefficient(const void* table, int64_t at, int n, bool row) {
  if (!table) return AccVec<T>{};
  const A<T>* value = (const A<T>*)table + at;
  return row ? splat(*value) : get(value, n);
}
template <class T>
SOLERA_INLINE EvoCoefficients<T> coefficients(const EvoNorm& s, int64_t at, int n, bool row) {
  EvoCoefficients<T> c;
  c.shift = coefficient<T>(s.shift, at, n, row);
  c.scale = coefficient<T>(s.scale, at, n, row);
  c.slope = coefficient<T>(s.slope, at, n, row);
  c.left = coefficient<T>(s.left, at, n, row);
  c.offset = coefficient<T>(s.offset, at, n, row);
  // A NaN in left has to come out of the maximum as well.
  c.offset = c.left == c.left ? c.offset : c.left;
  c.mean = coefficient<T>(s.mean, at, n, row);
  c.p = coefficient<T>(s.p, at, n, row);
  c.q = coefficient<T>(s.q, at, n, row);
  return c;
}

template <class T, bool kB>
SOLERA_INLINE AccVec<T> value(AccVec<T> x, const EvoCoefficients<T>& c) {
  AccVec<T> z = c.slope * x, u;
  if (kB) {
    z += c.offset;
    u = x / (c.left >= z ? c.left : z);
  } else {
    u = x * sigmoid_of<T>(z);
  }
  return u * c.scale + c.shift;
}

template <class T>
struct EvoFlow {
  AccVec<T> u, of_slope, of_left, of_offset, dx;
};
template <class T, bool kB>
SOLERA_INLINE EvoFlow<T> flow(AccVec<T> g, AccVec<T> x, const EvoCoefficients<T>& c) {
  typedef AccVec<T> V;
  EvoFlow<T> f;
  const V w = g * c.scale, z = c.slope * x;
  if (kB) {
    const V low = z + c.offset, r = 1 / (c.left >= low ? c.left : low);
    f.u = x * r;
    const V e = -w * f.u * r;
    f.of_offset = low > c.left ? e : (low == c.left ? e * A<T>(0.5) : V{});
    f.of_left = e - f.of_offset;
    f.of_slope = f.of_offset * x;
    f.dx = w * r + c.slope * f.of_offset;
  } else {
    const V s = sigmoid_of<T>(z), rest = 1 - s;
    f.u = x * s;
    f.of_slope = w * x * f.u * rest;
    f.dx = w * s * (1 + z * rest);
  }
  return f;
}

// Calls body(element offset, coefficients, count) over chunk `item`, rows of K columns or (K = 1) M
// positions; in blocks of 8 rows, so that a strip's coefficients are loaded once for eight. Where K
// is 1, pair(element offset, coefficients) takes two vectors at a time first.
template <class T, class F, class G>
SOLERA_INLINE void over_chunk(const EvoNorm& s, int64_t item, const F& body, const G& pair) {
  constexpr int L = kLanes<T>;
  const int64_t a = item / s.chunks, first = (item % s.chunks) * s.chunk;
  const int64_t end = first + s.chunk < s.M ? first + s.chunk : s.M;
  if (s.K == 1) {
    const EvoCoefficients<T> c = coefficients<T>(s, a, L, true);
    const int64_t base = a * s.M;
    int64_t j = first;
    for (; j + 2 * L <= end; j += 2 * L) pair(base + j, c);
    strips<L>(end - j, [&](int64_t k, int n) { body(base + j + k, c, n); });
    return;
  }
  for (int64_t m = first; m < end; m += 8) {
    const int64_t stop = m + 8 < end ? m + 8 : end;
    strips<L>(s.K, [&](int64_t k, int n) {
      const EvoCoefficients<T> c = coefficients<T>(s, a * s.K + k, n, false);
      for (int64_t i = m; i < stop; ++i) body((a * s.M + i) * s.K + k, c, n);
    });
  }
}

template <class T, bool kB>
void forward_of(const EvoNorm& s, int64_t begin, int64_t end) {
  const T* x = (const T*)s.x;
  T* y = (T*)s.out;
  for (int64_t item = begin; item < end; ++item)
    over_chunk<T>(
        s, item,
        [&](int64_t i, const EvoCoefficients<T>& c, int n) {
          put(y + i, value<T, kB>(get(x + i, n), c), n, s.streaming && can_stream(y + i));
        },
        [&](int64_t i, const EvoCoefficients<T>& c) {
          const Two<T> v = take_two(x + i);
          give_two(y + i, Two<T>{value<T, kB>(v.one, c), value<T, kB>(v.other, c)},
                   s.streaming && can_stream_two(y + i));
        });
  if (s.streaming) stream_fence();
}

template <class T, bool kB>
void gradient_of(const EvoNorm& s, int64_t begin, int64_t end) {
  const T *x = (const T*)s.x, *dy = (const T*)s.dy;
  T* dx = (T*)s.out;
  const auto map = [](AccVec<T> g, AccVec<T> v, const EvoCoefficients<T>& c) {
    return flow<T, kB>(g, v, c).dx + (c.p * (v - c.mean) + c.q);
  };
  for (int64_t item = begin; item < end; ++item)
    over_chunk<T>(
        s, item,
        [&](int64_t i, const EvoCoefficients<T>& c, int n) {
          put(dx + i, map(get(dy + i, n), get(x + i, n), c), n, s.streaming && can_stream(dx + i));
        },
        [&](int64_t i, const EvoCoefficients<T>& c) {
          const Two<T> g = take_two(dy + i), v = take_two(x + i);
          give_two(dx + i, Two<T>{map(g.one, v.one, c), map(g.other, v.other, c)},
                   s.streaming && can_stream_two(dx + i));
        });
  if (s.streaming) stream_fence();
}

template <class T, bool kB>
struct EvoSums {
  AccVec<T> shift{}, scale{}, slope{}, left{}, offset{};
  SOLERA_INLINE void add(AccVec<T> g, AccVec<T> x, const EvoCoefficients<T>& c) {
    const EvoFlow<T> f = flow<T, kB>(g, x, c);
    shift += g;
    scale += g * f.u;
    slope += f.of_slope;
    if (kB) {
      left += f.of_left;
      offset += f.of_offset;
    }
  }
  // The first n lanes of other: past the end x is 0, but its share need not be.
  SOLERA_INLINE void merge(const EvoSums& other, int n) {
    shift += keep<T>(other.shift, n);
    scale += keep<T>(other.scale, n);
    slope += keep<T>(other.slope, n);
    left += keep<T>(other.left, n);
    offset += keep<T>(other.offset, n);
  }
};

template <class T, bool kB>
void reduce_of(const EvoNorm& s, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>, kSums = kB ? kEvoSumsB : kEvoSumsS;
  const T *x = (const T*)s.x, *dy = (const T*)s.dy;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t a = item / s.chunks, first = (item % s.chunks) * s.chunk;
    const int64_t stop = first + s.chunk < s.M ? first + s.chunk : s.M;
    A<T>* out = (A<T>*)s.partial + item * kSums * s.K;
    if (s.K == 1) {
      const EvoCoefficients<A<T>> c = coefficients<A<T>>(s, a, L, true);
      EvoSums<A<T>, kB> even, odd;
      const int64_t base = a * s.M;
      int64_t j = first;
      for (; j + 2 * L <= stop; j += 2 * L) {
        const Two<T> g = take_two(dy + base + j), v = take_two(x + base + j);
        even.add(g.one, v.one, c);
        odd.add(g.other, v.other, c);
      }
      strips<L>(stop - j, [&](int64_t k, int n) {
        const int64_t i = base + j + k;
        EvoSums<A<T>, kB> tail;
        tail.add(get(dy + i, n), get(x + i, n), c);
        even.merge(tail, n);
      });
      out[0] = lane_sum(even.shift + odd.shift);
      out[1] = lane_sum(even.scale + odd.scale);
      out[2] = lane_sum(even.slope + odd.slope);
      if (kB) {
        out[3] = lane_sum(even.left + odd.left);
        out[4] = lane_sum(even.offset + odd.offset);
      }
      continue;
    }
    memset((void*)out, 0, size_t(kSums * s.K) * sizeof(A<T>));
    for (int64_t m = first; m < stop; m += 8) {
      const int64_t last = m + 8 < stop ? m + 8 : stop;
      strips<L>(s.K, [&](int64_t k, int n) {
        const EvoCoefficients<A<T>> c = coefficients<A<T>>(s, a * s.K + k, n, false);
        EvoSums<A<T>, kB> sums;
        for (int64_t i = m; i < last; ++i) {
          const int64_t at = (a * s.M + i) * s.K + k;
          sums.add(get(dy + at, n), get(x + at, n), c);
        }
        const auto gather = [&](int which, AccVec<T> sum) {
          A<T>* row = out + which * s.K + k;
          put(row, get(row, n) + sum, n);
        };
        gather(0, sums.shift);
        gather(1, sums.scale);
        gather(2, sums.slope);
        if (kB) {
          gather(3, sums.left);
          gather(4, sums.offset);
        }
      });
    }
  }
}

template <class T>
void forward(const EvoNorm& s, int64_t begin, int64_t end) {
  s.left ? forward_of<T, true>(s, begin, end) : forward_of<T, false>(s, begin, end);
}
template <class T>
void reduce(const EvoNorm& s, int64_t begin, int64_t end) {
  s.left ? reduce_of<T, true>(s, begin, end) : reduce_of<T, false>(s, begin, end);
}
template <class T>
void gradient(const EvoNorm& s, int64_t begin, int64_t end) {
  s.left ? gradient_of<T, true>(s, begin, end) : gradient_of<T, false>(s, begin, end);
}

template <class A>
void finish(const EvoNorm& s, int64_t sets, int64_t begin, int64_t end) {
  const int64_t sums = s.left ? kEvoSumsB : kEvoSumsS;
  for (int64_t a = begin; a < end; ++a) {
    const A* from = (const A*)s.partial + a * s.chunks * sums * s.K;
    for (int64_t which = 0; which < sums; ++which)
      for (int64_t k = 0; k < s.K; ++k) {
        double total = 0;
        for (int64_t c = 0; c < s.chunks; ++c) total += double(from[(c * sums + which) * s.K + k]);
        ((A*)s.out)[(which * sets + a) * s.K + k] = A(total);
      }
  }
}

}  // namespace

extern const EvoNormTable evonorm_table;
const EvoNormTable evonorm_table = {
    {forward<float>, forward<double>, forward<bf16>, forward<f16>},
    {reduce<float>, reduce<double>, reduce<bf16>, reduce<f16>},
    {gradient<float>, gradient<double>, gradient<bf16>, gradient<f16>},
    {finish<float>, finish<double>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "../parallel.h"

namespace solera {

SOLERA_PICK(EvoNormTable, evonorm_table)

namespace {

constexpr int64_t kEvoStreamBytes = int64_t(16) << 20;
// Elements of a chunk: short sums in float, their totals in double.
constexpr int64_t kEvoChunk = 1024;

// What every op takes: x and the coefficients, dense, and the split into items.
struct EvoCall {
  Tensor x, held[8];
  Sizes sizes;
  Dtype dtype;
  ScalarType acc;
  EvoNorm s{};
  int64_t sets;

  explicit EvoCall(const Tensor& x_in)
      : x(dense(x_in)),
        sizes(x.sizes()),
        dtype(dtype_of(x)),
        acc(dtype == kFloat64 ? ScalarType::Double : ScalarType::Float) {
    STD_TORCH_CHECK(sizes.size() == 3, "solera: evonorm takes x as (A, M, K)");
    sets = sizes[0];
    s.M = sizes[1];
    s.K = sizes[2];
    s.x = x.const_data_ptr();
    s.chunk = s.K <= 1 || kEvoChunk / s.K > 64 ? kEvoChunk / (s.K < 1 ? 1 : s.K) : 64;
    s.chunks = s.M <= s.chunk ? 1 : (s.M + s.chunk - 1) / s.chunk;
    s.streaming = x.numel() * int64_t(x.element_size()) >= kEvoStreamBytes;
  }
  const void* take(int slot, const OptTensor& t) {
    if (!t.has_value()) return nullptr;
    STD_TORCH_CHECK(t->numel() == sets * s.K && t->scalar_type() == acc,
                    "solera: evonorm's coefficients are (A, K) of the accumulator's dtype");
    held[slot] = dense(*t);
    return held[slot].const_data_ptr();
  }
  void coefficients(const OptTensor& scale, const OptTensor& slope, const OptTensor& left,
                    const OptTensor& offset) {
    STD_TORCH_CHECK(left.has_value() == offset.has_value(),
                    "solera: evonorm takes left and offset together");
    s.scale = take(0, scale);
    s.slope = take(1, slope);
    s.left = take(2, left);
    s.offset = take(3, offset);
  }
  Tensor incoming(const Tensor& dy_in) {
    Tensor dy = dense(dy_in);
    STD_TORCH_CHECK(dy.numel() == x.numel() && dtype_of(dy) == dtype,
                    "solera: evonorm's dy has the shape and dtype of x");
    s.dy = dy.const_data_ptr();
    return dy;
  }
  template <class F>
  void run(F kernel) {
    if (x.numel() == 0) return;
    const int64_t rows = s.M < s.chunk ? s.M : s.chunk;
    parallel_for(0, sets * s.chunks, grain_for(rows * s.K * int64_t(x.element_size())),
                 [&](int64_t begin, int64_t end) { kernel(s, begin, end); });
  }
};

Tensor evonorm(const Tensor& x, const Tensor& shift, const Tensor& scale, const Tensor& slope,
               OptTensor left, OptTensor offset) {
  EvoCall call(x);
  call.coefficients(scale, slope, left, offset);
  call.s.shift = call.take(4, shift);
  Tensor y = empty_like(call.x, call.sizes);
  call.s.out = y.mutable_data_ptr();
  call.run(pick_evonorm_table().forward[call.dtype]);
  return y;
}

Tensor evonorm_reduce(const Tensor& dy_in, const Tensor& x, const Tensor& scale,
                      const Tensor& slope, OptTensor left, OptTensor offset) {
  EvoCall call(x);
  call.coefficients(scale, slope, left, offset);
  const Tensor dy = call.incoming(dy_in);
  const int64_t sums = left.has_value() ? kEvoSumsB : kEvoSumsS;
  const int64_t shape[] = {sums, call.sets, call.s.K};
  const int64_t parts[] = {call.sets, call.s.chunks, sums, call.s.K};
  Tensor out = empty_like(call.x, Sizes(shape, 3), call.acc);
  if (call.s.M == 0) {
    torch::stable::zero_(out);
    return out;
  }
  Tensor partial = empty_like(call.x, Sizes(parts, 4), call.acc);
  call.s.partial = partial.mutable_data_ptr();
  call.s.out = out.mutable_data_ptr();
  const auto& table = pick_evonorm_table();
  call.run(table.reduce[call.dtype]);
  if (call.x.numel() > 0)
    parallel_for(0, call.sets, grain_for(call.s.chunks * sums * call.s.K * 16),
                 [&](int64_t begin, int64_t end) {
                   table.finish[call.acc == ScalarType::Double](call.s, call.sets, begin, end);
                 });
  return out;
}

Tensor evonorm_gradient(const Tensor& dy_in, const Tensor& x, const Tensor& scale,
                        const Tensor& slope, OptTensor left, OptTensor offset, const Tensor& mean,
                        const Tensor& p, const Tensor& q) {
  EvoCall call(x);
  call.coefficients(scale, slope, left, offset);
  const Tensor dy = call.incoming(dy_in);
  call.s.mean = call.take(5, mean);
  call.s.p = call.take(6, p);
  call.s.q = call.take(7, q);
  Tensor dx = empty_like(call.x, call.sizes);
  call.s.out = dx.mutable_data_ptr();
  call.run(pick_evonorm_table().gradient[call.dtype]);
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("evonorm", TORCH_BOX(&evonorm));
  m.impl("evonorm_reduce", TORCH_BOX(&evonorm_reduce));
  m.impl("evonorm_gradient", TORCH_BOX(&evonorm_gradient));
}

}  // namespace solera
#endif  // SOLERA_FRONT
