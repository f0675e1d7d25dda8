// Statistics of logit rows and the gradient that belongs to them; the formulas are in
// python/solera/norm/logit_norm.py.
//
// Bytes a row of C logits: the statistics read it once (normalized: twice, the second time from
// cache while a row fits there), the gradient reads it and writes one row. A row is walked in
// blocks that stay in L1 between a block's two passes, so the exponentials see a maximum without a
// second reading from memory.
#include "../natural.h"
#include "../strips.h"

namespace solera {

enum LogitMode : int { kMoments = 0, kStablemax = 1, kSoftmax = 2, kNormalized = 3 };

// Statistics and coefficients are in the accumulator's type A, one a row (norms, and db when
// normalized: one a segment).
struct LogitRows {
  const void* logits;
  const int64_t* target;
  const void *scale, *columns;  // may be null
  const int64_t* bounds;        // segments + 1, or null
  void *a, *b, *picked, *norms;
  int64_t width, segments;
  double eps;
  int mode;
};
struct LogitGradient {
  const void* logits;
  const int64_t* target;
  const void *scale, *columns;
  const int64_t* bounds;
  const void *a, *da, *db, *dpicked;
  void* out;  // may be the logits themselves
  int64_t width, segments;
  int mode;
  bool streaming;
};

struct LogitTable {
  void (*statistics[4])(const LogitRows&, int64_t begin, int64_t end);
  void (*gradient[4])(const LogitGradient&, int64_t begin, int64_t end);
};

namespace SOLERA_ISA {
namespace {

constexpr int64_t kLogitBlock = 1024;

// The same for any u: a label's logit may lie far above the others' total.
template <class V>
SOLERA_INLINE V unbounded_exp(V u) {
  const V y = natural_exp(at_most(88, u));
  return u > 88 ? exp2v(u * 1.44269504088896341) : y;
}

template <class T>
SOLERA_INLINE A<T> logit_at(const T* x, int64_t j) {
  return get(x + j, 1)[0];
}

// Calls f(begin, end) for [0, width) without position y.
template <class F>
SOLERA_INLINE void without(int64_t width, int64_t y, const F& f) {
  if (y < 0 || y >= width) return f(0, width);
  f(0, y);
  f(y + 1, width);
}

template <class T>
SOLERA_INLINE AccVec<T> stablemax_score(AccVec<T> x) {
  return x >= 0 ? x + 1 : 1 / (1 - x);
}

// log sum e^(r v) and the mean of v under that softmax, of the row without position y.
template <class T, bool kColumns>
SOLERA_INLINE void log_sum(const T* x, const A<T>* columns, int64_t width, int64_t y, A<T> r,
                           A<T>& lse, A<T>& mean) {
  constexpr int L = kLanes<T>;
  const A<T> lowest = lowest_of(A<T>());
  const auto value = [&](int64_t j, int n) {
    AccVec<T> v = get(x + j, n);
    if (kColumns) v *= get(columns + j, n);
    return v;
  };
  A<T> top = lowest, sum = 0, weighted = 0;
  without(width, y, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kLogitBlock) {
      const int64_t count = end - first < kLogitBlock ? end - first : kLogitBlock;
      AccVec<T> m0 = splat(lowest), m1 = m0;
      int64_t j = 0;
      for (; j + 2 * L <= count; j += 2 * L) {
        m0 = vmax(m0, value(first + j, L) * r);
        m1 = vmax(m1, value(first + j + L, L) * r);
      }
      for (; j < count; j += L) {
        const int n = int(count - j < L ? count - j : L);
        AccVec<T> z = value(first + j, n) * r;
        for (int i = n; i < L; ++i) z[i] = lowest;
        m0 = vmax(m0, z);
      }
      const A<T> here = lane_max(vmax(m0, m1));
      if (here > top) {
        const A<T> factor = natural_exp_one(top - here);
        sum *= factor;
        weighted *= factor;
        top = here;
      }
      AccVec<T> s0{}, s1{}, w0{}, w1{};
      const auto add = [&](int64_t k, int n, AccVec<T>& s, AccVec<T>& w) {
        const AccVec<T> v = value(first + k, n);
        const AccVec<T> e = keep<T>(natural_exp(v * r - top), n);
        s += e;
        w += e * at_least(lowest, v);
      };
      j = 0;
      for (; j + 2 * L <= count; j += 2 * L) {
        add(j, L, s0, w0);
        add(j + L, L, s1, w1);
      }
      for (; j < count; j += L) add(j, int(count - j < L ? count - j : L), s0, w0);
      sum += lane_sum(s0 + s1);
      weighted += lane_sum(w0 + w1);
    }
  });
  const bool none = sum == 0;
  lse = none ? A<T>(-__builtin_inf()) : top + natural_log_one(sum);
  mean = none ? A<T>(0) : weighted / sum;
}

// Mean and mean squared deviation: each block's own, merged by Chan's rule.
template <class T>
SOLERA_INLINE void row_moments(const T* x, int64_t width, A<T>& mean, A<T>& variance) {
  A<T> square = 0, count = 0;
  mean = 0;
  for (int64_t first = 0; first < width; first += kLogitBlock) {
    const int64_t n = width - first < kLogitBlock ? width - first : kLogitBlock;
    const T* block = x + first;
    const A<T> m = row_sum<T>(n, [&](int64_t j, int k) { return get(block + j, k); }) / A<T>(n);
    const A<T> s = row_sum<T>(n, [&](int64_t j, int k) {
      const AccVec<T> d = keep<T>(get(block + j, k) - m, k);
      return d * d;
    });
    const A<T> total = count + A<T>(n), gap = m - mean;
    mean += gap * (A<T>(n) / total);
    square += s + gap * gap * (count * A<T>(n) / total);
    count = total;
  }
  variance = square / A<T>(width);
}

template <class T>
void statistics(const LogitRows& p, int64_t begin, int64_t end) {
  const A<T>* columns = (const A<T>*)p.columns;
  A<T>* norms = (A<T>*)p.norms;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = (const T*)p.logits + row * p.width;
    const int64_t y = p.target[row];
    A<T> a = 0, b = 1, picked = 0;
    if (y < 0) {
      for (int64_t t = 0; t < p.segments && p.mode == kNormalized; ++t)
        norms[row * p.segments + t] = 1;
    } else {
      picked =
          y < p.width ? logit_at(x, y) * (columns ? columns[y] : A<T>(1)) : A<T>(__builtin_nan(""));
      if (p.mode == kMoments) {
        row_moments(x, p.width, a, b);
      } else if (p.mode == kStablemax) {
        without(p.width, y, [&](int64_t from, int64_t to) {
          a += row_sum<T>(to - from, [&](int64_t j, int n) {
            return keep<T>(stablemax_score<T>(get(x + from + j, n)), n);
          });
        });
      } else {
        A<T> r = ((const A<T>*)p.scale)[row];
        if (p.mode == kNormalized) {
          A<T> size = 0;
          for (int64_t t = 0; t < p.segments; ++t) {
            const T* from = x + p.bounds[t];
            const A<T> square = row_sum<T>(p.bounds[t + 1] - p.bounds[t], [&](int64_t j, int n) {
              const AccVec<T> v = get(from + j, n);
              return v * v;
            });
            size += norms[row * p.segments + t] = square_root(square);
          }
          r /= size / A<T>(p.segments) + A<T>(p.eps);
        }
        if (columns)
          log_sum<T, true>(x, columns, p.width, y, r, a, b);
        else
          log_sum<T, false>(x, columns, p.width, y, r, a, b);
      }
    }
    ((A<T>*)p.a)[row] = a;
    ((A<T>*)p.b)[row] = b;
    ((A<T>*)p.picked)[row] = picked;
  }
}

template <class T>
void gradient(const LogitGradient& p, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const A<T>* columns = (const A<T>*)p.columns;
  const A<T> inverse = A<T>(1) / A<T>(p.width);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = (const T*)p.logits + row * p.width;
    T* out = (T*)p.out + row * p.width;
    const int64_t y = p.target[row];
    if (y < 0) {
      memset((void*)out, 0, size_t(p.width) * sizeof(T));
      continue;
    }
    const A<T> picked = y < p.width ? logit_at(x, y) : A<T>(0);
    const A<T> a = ((const A<T>*)p.a)[row], alpha = ((const A<T>*)p.da)[row];
    A<T> label = ((const A<T>*)p.dpicked)[row];
    const bool streaming = p.streaming && can_stream(out);
    if (p.mode == kMoments) {
      const A<T> beta = 2 * ((const A<T>*)p.db)[row] * inverse, gamma = alpha * inverse;
      strips<L>(p.width, [&](int64_t j, int n) {
        put(out + j, beta * (get(x + j, n) - a) + gamma, n, streaming);
      });
      label += beta * (picked - a) + gamma;
    } else if (p.mode == kStablemax) {
      strips<L>(p.width, [&](int64_t j, int n) {
        const AccVec<T> v = get(x + j, n), s = 1 / (1 - v);
        put(out + j, alpha * (v >= 0 ? splat(A<T>(1)) : s * s), n, streaming);
      });
    } else {
      const A<T> r = ((const A<T>*)p.scale)[row], factor = alpha * r;
      const auto slope = [&](int64_t j, int n, auto scaled) {
        AccVec<T> v = get(x + j, n);
        if (!scaled.value) return factor * natural_exp(v * r - a);
        const AccVec<T> c = get(columns + j, n);
        return factor * c * natural_exp(v * c * r - a);
      };
      if (p.mode == kNormalized) {
        const A<T>* beta = (const A<T>*)p.db + row * p.segments;
        for (int64_t t = 0; t < p.segments; ++t) {
          const int64_t first = p.bounds[t];
          if (y >= first && y < p.bounds[t + 1]) label += beta[t] * picked;
          strips<L>(p.bounds[t + 1] - first, [&](int64_t k, int n) {
            AccVec<T> v = beta[t] * get(x + first + k, n);
            if (alpha != 0) v += slope(first + k, n, Flag<false>{});
            put(out + first + k, v, n, false);
          });
        }
      } else if (alpha == 0) {
        memset((void*)out, 0, size_t(p.width) * sizeof(T));
      } else {
        with_flag(columns != nullptr, [&](auto scaled) {
          strips<L>(p.width,
                    [&](int64_t j, int n) { put(out + j, slope(j, n, scaled), n, streaming); });
        });
        if (columns && y < p.width) label *= columns[y];
      }
    }
    if (p.mode == kSoftmax && alpha == 0 && columns && y < p.width) label *= columns[y];
    if (y < p.width) {
      AccVec<T> v{};
      v[0] = label;
      if (p.streaming) stream_fence();
      put(out + y, v, 1);
    }
  }
  if (p.streaming) stream_fence();
}

}  // namespace

extern const LogitTable logit_table;
const LogitTable logit_table = {
    {statistics<float>, statistics<double>, statistics<bf16>, statistics<f16>},
    {gradient<float>, gradient<double>, gradient<bf16>, gradient<f16>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "../parallel.h"

namespace solera {

SOLERA_PICK(LogitTable, logit_table)

namespace {

constexpr int64_t kLogitStreamBytes = int64_t(16) << 20;

// What both ops take, checked so far that no memory outside the tensors is touched.
struct LogitArguments {
  Tensor logits, target;
  OptTensor scale, columns, bounds;
  ScalarType acc;
  int64_t rows, width, segments = 0;

  LogitArguments(const Tensor& x, const Tensor& y, const OptTensor& scale_in,
                 const OptTensor& columns_in, const OptTensor& bounds_in, int64_t mode)
      : logits(dense(x)), target(dense(y)), acc(accumulate_type(x)) {
    STD_TORCH_CHECK(x.dim() == 2 && mode >= 0 && mode <= 3, "solera: logits must be (B, C)");
    rows = x.size(0);
    width = x.size(1);
    STD_TORCH_CHECK(y.dim() == 1 && y.size(0) == rows && y.scalar_type() == ScalarType::Long,
                    "solera: target must be (B,) int64");
    scale = per(scale_in, rows);
    columns = per(columns_in, width);
    STD_TORCH_CHECK(mode < kSoftmax || scale.has_value(), "solera: this mode needs a scale");
    if (mode != kNormalized) return;
    STD_TORCH_CHECK(bounds_in.has_value() && bounds_in->dim() == 1 && bounds_in->size(0) >= 2 &&
                        bounds_in->scalar_type() == ScalarType::Long && !columns.has_value(),
                    "solera: segments are given by at least two int64 bounds");
    bounds = dense(*bounds_in);
    segments = bounds->size(0) - 1;
    const int64_t* at = ends();
    bool ordered = at[0] == 0 && at[segments] == width;
    for (int64_t t = 0; t < segments; ++t) ordered = ordered && at[t] <= at[t + 1];
    STD_TORCH_CHECK(ordered, "solera: bounds must rise from 0 to C");
  }
  OptTensor per(const OptTensor& t, int64_t n) const {
    if (!t.has_value()) return t;
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == n && t->scalar_type() == acc,
                    "solera: expected one value a row or column, in the accumulator's dtype");
    return dense(*t);
  }
  const int64_t* labels() const { return static_cast<const int64_t*>(target.const_data_ptr()); }
  const int64_t* ends() const {
    return bounds.has_value() ? static_cast<const int64_t*>(bounds->const_data_ptr()) : nullptr;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> logit_statistics(const Tensor& logits,
                                                            const Tensor& target, OptTensor scale,
                                                            OptTensor columns, OptTensor bounds,
                                                            double eps, int64_t mode) {
  const LogitArguments in(logits, target, scale, columns, bounds, mode);
  const int64_t sizes[] = {in.rows, in.segments}, zero[] = {0};
  const Sizes one(sizes, 1);
  Tensor a = empty_like(in.logits, one, in.acc), b = empty_like(in.logits, one, in.acc);
  Tensor picked = empty_like(in.logits, one, in.acc);
  Tensor norms =
      empty_like(in.logits, mode == kNormalized ? Sizes(sizes, 2) : Sizes(zero, 1), in.acc);
  const LogitRows p{in.logits.const_data_ptr(),
                    in.labels(),
                    data_or_null(in.scale),
                    data_or_null(in.columns),
                    in.ends(),
                    a.mutable_data_ptr(),
                    b.mutable_data_ptr(),
                    picked.mutable_data_ptr(),
                    norms.mutable_data_ptr(),
                    in.width,
                    in.segments,
                    eps,
                    int(mode)};
  const auto kernel = pick_logit_table().statistics[dtype_of(in.logits)];
  parallel_for(0, in.rows, grain_for(in.width * in.logits.element_size()),
               [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {a, b, picked, norms};
}

void run_gradient(const LogitArguments& in, const Tensor& a_in, const Tensor& da_in,
                  const Tensor& db_in, const Tensor& dpicked_in, int64_t mode, void* out,
                  bool streaming) {
  const Tensor a = *in.per(a_in, in.rows), da = *in.per(da_in, in.rows);
  const Tensor dpicked = *in.per(dpicked_in, in.rows), db = dense(db_in);
  const bool grouped = mode == kNormalized;
  STD_TORCH_CHECK(db.scalar_type() == in.acc && db.dim() == (grouped ? 2 : 1) &&
                      db.size(0) == in.rows && (!grouped || db.size(1) == in.segments),
                  "solera: db does not fit the rows");
  const LogitGradient p{in.logits.const_data_ptr(),
                        in.labels(),
                        data_or_null(in.scale),
                        data_or_null(in.columns),
                        in.ends(),
                        a.const_data_ptr(),
                        da.const_data_ptr(),
                        db.const_data_ptr(),
                        dpicked.const_data_ptr(),
                        out,
                        in.width,
                        in.segments,
                        int(mode),
                        streaming};
  const auto kernel = pick_logit_table().gradient[dtype_of(in.logits)];
  parallel_for(0, in.rows, grain_for(in.width * in.logits.element_size()),
               [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

Tensor logit_gradient(const Tensor& logits, const Tensor& target, OptTensor scale,
                      OptTensor columns, OptTensor bounds, const Tensor& a, const Tensor& da,
                      const Tensor& db, const Tensor& dpicked, int64_t mode) {
  const LogitArguments in(logits, target, scale, columns, bounds, mode);
  Tensor out = empty_like(in.logits, in.logits.sizes());
  const bool streaming = in.logits.numel() * in.logits.element_size() >= kLogitStreamBytes;
  run_gradient(in, a, da, db, dpicked, mode, out.mutable_data_ptr(), streaming);
  return out;
}

void logit_gradient_(const Tensor& logits, const Tensor& target, OptTensor scale, OptTensor columns,
                     OptTensor bounds, const Tensor& a, const Tensor& da, const Tensor& db,
                     const Tensor& dpicked, int64_t mode) {
  const LogitArguments in(logits, target, scale, columns, bounds, mode);
  run_gradient(in, a, da, db, dpicked, mode, in.logits.mutable_data_ptr(), false);
  if (!logits.is_contiguous())
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(logits.get(), in.logits.get(), 0));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("logit_statistics", TORCH_BOX(&logit_statistics));
  m.impl("logit_gradient", TORCH_BOX(&logit_gradient));
  m.impl("logit_gradient_", TORCH_BOX(&logit_gradient_));
}

}  // namespace solera
#endif  // SOLERA_FRONT
