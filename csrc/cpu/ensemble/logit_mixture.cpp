// K models' logits: the log-probabilities of labels, and the models' rows combined into one; the
// formulas are in python/solera/ensemble/logit_mixture.py.
//
// Bytes a row of C logits and K models: scores read K C, their gradient reads and writes K C.
// combine reads K C (a second time from L2, a third for probability's sums) and writes C; its
// gradient reads K C and writes as much.
#include "mixture_rows.h"

namespace solera {

enum MixtureKind : int { kMixLogit = 0, kMixLogProbability = 1, kMixProbability = 2 };

struct MixtureScores {
  MixtureMembers logits;
  const int64_t* target;
  void *score, *top, *log_total;  // (K, N)
  int64_t rows, width;
};
struct MixtureScoresBackward {
  MixtureMembers logits;
  const int64_t* target;
  const void *top, *log_total, *dscore;
  void* out;
  int64_t member_stride, row_stride, rows, width;
  bool streaming;
};
struct MixtureCombine {
  MixtureMembers logits;
  const void* weights;    // (N, K)
  void *top, *log_total;  // (K + 1, N)
  void* out;
  int64_t rows, width, anchor;
  double inverse_temperature, log_plausibility;
  int kind;
  bool masked, normalize;
};
struct MixtureCombineBackward {
  MixtureCombine forward;  // out is not set
  const void* dout;        // (N, C)
  int64_t dout_stride;
  void *dlogits, *dweights;  // may be null
  int64_t member_stride, row_stride;
};

struct MixtureTable {
  void (*scores[4])(const MixtureScores&, int64_t begin, int64_t end);
  void (*scores_backward[4])(const MixtureScoresBackward&, int64_t begin, int64_t end);
  void (*combine[4])(const MixtureCombine&, void* scratch, int64_t begin, int64_t end);
  void (*combine_backward[4])(const MixtureCombineBackward&, void* scratch, int64_t begin,
                              int64_t end);
};

namespace SOLERA_ISA {
namespace {

// Item i is row i % rows of model i / rows.
template <class T>
void scores(const MixtureScores& p, int64_t begin, int64_t end) {
  const FlushSubnormals flushed;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = i % p.rows, y = p.target[row];
    A<T> score = 0, top = 0, total = 0;
    if (y >= 0) {
      const T* x = member_row<T>(p.logits, i / p.rows, row);
      const RowSum<T> sum =
          sum_of_row<T>(p.width, [&](int64_t j, int n) { return fetch(x + j, n); }, Lines<T>{x});
      top = sum.top;
      total = sum.log_total();
      score = y < p.width ? (get(x + y, 1)[0] - top) - total : A<T>(__builtin_nan(""));
    }
    ((A<T>*)p.score)[i] = score;
    ((A<T>*)p.top)[i] = top;
    ((A<T>*)p.log_total)[i] = total;
  }
}

template <class T>
void scores_backward(const MixtureScoresBackward& p, int64_t begin, int64_t end) {
  const FlushSubnormals flushed;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t member = i / p.rows, row = i % p.rows, y = p.target[row];
    T* out = (T*)p.out + member * p.member_stride + row * p.row_stride;
    const A<T> d = ((const A<T>*)p.dscore)[i];
    if (y < 0 || d == 0) {
      memset((void*)out, 0, size_t(p.width) * sizeof(T));
      continue;
    }
    const T* x = member_row<T>(p.logits, member, row);
    const A<T> top = ((const A<T>*)p.top)[i], total = ((const A<T>*)p.log_total)[i];
    const auto softmax = [&](int64_t j, int n) {
      return natural_exp((fetch(x + j, n) - top) - total);
    };
    write_row(
        out, p.width, p.streaming, [&](int64_t j, int n) { return softmax(j, n) * -d; },
        Lines<T>{x});
    if (y < p.width) put_one(out + y, d - d * softmax(y, 1)[0], p.streaming);
  }
  if (p.streaming) stream_fence();
}

// One row of the K models: what forward and backward both compute of it.
template <class T>
struct Combination {
  const MixtureCombine& p;
  const int64_t row, members;
  const A<T>* w;
  A<T> cut, offset;
  A<T> mx[kLogitBlock];

  SOLERA_INLINE Combination(const MixtureCombine& given, int64_t r)
      : p(given),
        row(r),
        members(given.logits.count),
        w((const A<T>*)given.weights + r * members),
        cut(0),
        offset(0) {
    if (p.masked) {
      const T* x = member_row<T>(p.logits, p.anchor, row);
      cut = row_max<T>(p.width, lowest_of(A<T>()),
                       [&](int64_t j, int n) { return fetch(x + j, n); }) +
            A<T>(p.log_plausibility);
    }
  }
  SOLERA_INLINE A<T>& top(int64_t m) const { return ((A<T>*)p.top)[m * p.rows + row]; }
  SOLERA_INLINE A<T>& total(int64_t m) const { return ((A<T>*)p.log_total)[m * p.rows + row]; }
  SOLERA_INLINE const T* logits(int64_t m) const { return member_row<T>(p.logits, m, row); }
  SOLERA_INLINE AccVec<T> log_p(int64_t m, int64_t j, int n) const {
    return (get(logits(m) + j, n) - top(m)) - total(m);
  }
  // What log_probability takes off a combined row: found once the models' sums are.
  SOLERA_INLINE void set_offset() {
    for (int64_t m = 0; m < members && p.kind == kMixLogProbability; ++m) offset += w[m] * total(m);
  }
  // v of columns [first, first + count) into out.
  SOLERA_INLINE void values(int64_t first, int64_t count, A<T>* out) {
    constexpr int L = kLanes<T>;
    const A<T> lowest = lowest_of(A<T>());
    if (p.kind != kMixProbability) {
      for (int64_t m = 0; m < members; ++m) {
        const T* x = logits(m) + first;
        const A<T> shift = p.kind == kMixLogit ? A<T>(0) : top(m), start = m ? A<T>(0) : -offset;
        strips<L>(count, [&](int64_t j, int n) {
          const AccVec<T> before = m ? get(out + j, n) : splat(start);
          put(out + j, before + (get(x + j, n) - shift) * w[m], n);
        });
      }
      return;
    }
    for (int64_t m = 0; m < members; ++m)
      strips<L>(count, [&](int64_t j, int n) {
        const AccVec<T> v = log_p(m, first + j, n);
        put(mx + j, vmax(v, m ? get(mx + j, n) : splat(lowest)), n);
      });
    for (int64_t m = 0; m < members; ++m)
      strips<L>(count, [&](int64_t j, int n) {
        AccVec<T> sum = natural_exp(log_p(m, first + j, n) - get(mx + j, n)) * w[m];
        if (m) sum += get(out + j, n);
        put(out + j, sum, n);
      });
    strips<L>(count, [&](int64_t j, int n) {
      const AccVec<T> sum = get(out + j, n), none = splat(A<T>(-__builtin_inf()));
      const AccVec<T> v = natural_log(sum) + get(mx + j, n);
      put(out + j, sum > 0 ? v : (sum == 0 ? none : splat(A<T>(__builtin_nan("")))), n);
    });
  }
  // Calls body(j, n, mask as 0 or 1) over a block; 0 where the anchor finds the column implausible.
  template <class F>
  SOLERA_INLINE void kept(int64_t first, int64_t count, const F& body) const {
    constexpr int L = kLanes<T>;
    const AccVec<T> one = splat(A<T>(1));
    if (!p.masked) return strips<L>(count, [&](int64_t j, int n) { body(j, n, one); });
    const T* x = logits(p.anchor) + first;
    strips<L>(count,
              [&](int64_t j, int n) { body(j, n, get(x + j, n) < cut ? AccVec<T>{} : one); });
  }
};

template <class T>
void combine(const MixtureCombine& p, void* scratch, int64_t begin, int64_t end) {
  const FlushSubnormals flushed;
  constexpr int L = kLanes<T>;
  const A<T> it = A<T>(p.inverse_temperature);
  A<T>* v = (A<T>*)scratch;  // [width]
  for (int64_t row = begin; row < end; ++row) {
    Combination<T> c(p, row);
    for (int64_t m = 0; m < c.members; ++m) {
      RowSum<T> sum;
      const T* x = c.logits(m);
      if (p.kind != kMixLogit)
        sum =
            sum_of_row<T>(p.width, [&](int64_t j, int n) { return fetch(x + j, n); }, Lines<T>{x});
      c.top(m) = p.kind == kMixLogit ? A<T>(0) : sum.top;
      c.total(m) = p.kind == kMixLogit ? A<T>(0) : sum.log_total();
    }
    c.set_offset();
    RowSum<T> sum;
    logit_blocks(p.width, [&](int64_t first, int64_t count) {
      A<T>* block = v + first;
      c.values(first, count, block);
      c.kept(first, count, [&](int64_t j, int n, AccVec<T> mask) {
        const AccVec<T> y = get(block + j, n) * it;
        put(block + j, mask == 0 ? splat(A<T>(-__builtin_inf())) : y, n);
      });
      if (p.normalize)
        add_block<false>(sum, count, block, [&](int64_t j, int n) { return fetch(block + j, n); });
    });
    const A<T> top = p.normalize ? sum.top : A<T>(0);
    const A<T> total = p.normalize ? sum.log_total() : A<T>(0);
    c.top(c.members) = top;
    c.total(c.members) = total;
    T* out = (T*)p.out + row * p.width;
    strips<L>(p.width, [&](int64_t j, int n) { put(out + j, (get(v + j, n) - top) - total, n); });
  }
}

template <class T>
void combine_backward(const MixtureCombineBackward& g, void* scratch, int64_t begin, int64_t end) {
  const FlushSubnormals flushed;
  constexpr int L = kLanes<T>;
  typedef AccVec<T> V;
  const MixtureCombine& p = g.forward;
  const A<T> it = A<T>(p.inverse_temperature);
  A<T>* v = (A<T>*)scratch;  // [width]
  A<T>* dv = v + p.width;    // [width]
  for (int64_t row = begin; row < end; ++row) {
    Combination<T> c(p, row);
    c.set_offset();
    const T* dy = (const T*)g.dout + row * g.dout_stride;
    A<T> whole = 0;
    if (p.normalize) {
      logit_blocks(p.width, [&](int64_t first, int64_t count) {
        V sum{};
        c.kept(first, count,
               [&](int64_t j, int n, V mask) { sum += mask == 0 ? V{} : get(dy + first + j, n); });
        whole += lane_sum(sum);
      });
    }
    A<T> slope = 0;
    logit_blocks(p.width, [&](int64_t first, int64_t count) {
      A<T>* block = v + first;
      c.values(first, count, block);
      V sum{};
      c.kept(first, count, [&](int64_t j, int n, V mask) {
        V d = get(dy + first + j, n);
        if (p.normalize)
          d -=
              whole * natural_exp((get(block + j, n) * it - c.top(c.members)) - c.total(c.members));
        d = mask == 0 ? V{} : d * it;
        put(dv + first + j, d, n);
        sum += keep<T>(d, n);
      });
      slope += lane_sum(sum);
    });
    for (int64_t m = 0; m < c.members; ++m) {
      const T* x = c.logits(m);
      T* out = (T*)g.dlogits + m * g.member_stride + row * g.row_stride;
      A<T>* dweight = (A<T>*)g.dweights + row * c.members + m;
      const A<T> w = c.w[m];
      if (p.kind == kMixProbability) {
        // p_m e^-v dv; the exponent is capped where a weight of 0 leaves v far below log p_m.
        const auto share = [&](int64_t j, int n) {
          const V d = get(dv + j, n);
          const V ratio = natural_exp(at_most(A<T>(80), c.log_p(m, j, n) - get(v + j, n)));
          return d == 0 ? V{} : ratio * d;
        };
        const A<T> found = row_sum<T>(p.width, [&](int64_t j, int n) { return share(j, n); });
        if (g.dweights) *dweight = found;
        if (g.dlogits)
          strips<L>(p.width, [&](int64_t j, int n) {
            put(out + j, (share(j, n) - natural_exp(c.log_p(m, j, n)) * found) * w, n);
          });
        continue;
      }
      const bool log_p = p.kind == kMixLogProbability;
      if (g.dweights)
        *dweight = row_sum<T>(p.width, [&](int64_t j, int n) {
          const V d = get(dv + j, n);
          return d == 0 ? V{} : d * (log_p ? c.log_p(m, j, n) : get(x + j, n));
        });
      if (g.dlogits)
        strips<L>(p.width, [&](int64_t j, int n) {
          V d = get(dv + j, n);
          if (log_p) d -= natural_exp(c.log_p(m, j, n)) * slope;
          put(out + j, d * w, n);
        });
    }
  }
}

}  // namespace

extern const MixtureTable mixture_table;
const MixtureTable mixture_table = {
    {scores<float>, scores<double>, scores<bf16>, scores<f16>},
    {scores_backward<float>, scores_backward<double>, scores_backward<bf16>, scores_backward<f16>},
    {combine<float>, combine<double>, combine<bf16>, combine<f16>},
    {combine_backward<float>, combine_backward<double>, combine_backward<bf16>,
     combine_backward<f16>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include <cmath>

#include "mixture_lists.h"

namespace solera {

SOLERA_PICK(MixtureTable, mixture_table)

namespace {

const int64_t* mixture_labels(const Tensor& target) {
  return static_cast<const int64_t*>(target.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> mixture_scores(const std::vector<Tensor>& logits_in,
                                                  const Tensor& target_in) {
  const MixtureList logits(logits_in);
  const Tensor target = mixture_checked(target_in, ScalarType::Long, {logits.rows}, "target");
  const ScalarType acc = accumulate_type(logits.first());
  Tensor score = mixture_empty(logits.first(), {logits.count, logits.rows}, acc);
  Tensor top = mixture_empty(logits.first(), {logits.count, logits.rows}, acc);
  Tensor total = mixture_empty(logits.first(), {logits.count, logits.rows}, acc);
  const MixtureScores p{logits.members(),
                        mixture_labels(target),
                        score.mutable_data_ptr(),
                        top.mutable_data_ptr(),
                        total.mutable_data_ptr(),
                        logits.rows,
                        logits.width};
  const auto kernel = pick_mixture_table().scores[dtype_of(logits.first())];
  parallel_for(0, logits.count * logits.rows, grain_for(logits.row_bytes()),
               [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {score, top, total};
}

Tensor mixture_gradient(const MixtureList& logits, bool rows_first) {
  return rows_first ? mixture_empty(logits.first(), {logits.rows, logits.count, logits.width})
                    : mixture_empty(logits.first(), {logits.count, logits.rows, logits.width});
}

Tensor mixture_scores_backward(const std::vector<Tensor>& logits_in, const Tensor& target_in,
                               const Tensor& top_in, const Tensor& total_in,
                               const Tensor& dscore_in, bool rows_first) {
  const MixtureList logits(logits_in);
  const int64_t rows = logits.rows, count = logits.count, width = logits.width;
  const ScalarType acc = accumulate_type(logits.first());
  const Tensor target = mixture_checked(target_in, ScalarType::Long, {rows}, "target");
  const Tensor top = mixture_checked(top_in, acc, {count, rows}, "top");
  const Tensor total = mixture_checked(total_in, acc, {count, rows}, "log_total");
  const Tensor dscore = mixture_checked(dscore_in, acc, {count, rows}, "dscore");
  Tensor out = mixture_gradient(logits, rows_first);
  const MixtureScoresBackward p{logits.members(),
                                mixture_labels(target),
                                top.const_data_ptr(),
                                total.const_data_ptr(),
                                dscore.const_data_ptr(),
                                out.mutable_data_ptr(),
                                rows_first ? width : rows * width,
                                rows_first ? count * width : width,
                                rows,
                                width,
                                count * rows * logits.row_bytes() >= kMixtureStreamBytes};
  const auto kernel = pick_mixture_table().scores_backward[dtype_of(logits.first())];
  parallel_for(0, count * rows, grain_for(2 * logits.row_bytes()),
               [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return out;
}

MixtureCombine combination_of(const MixtureList& logits, const Tensor& weights, Tensor& top,
                              Tensor& total, int64_t kind, double inverse_temperature,
                              double plausibility, int64_t anchor, bool normalize) {
  STD_TORCH_CHECK(kind >= 0 && kind <= 2 && anchor >= 0 && anchor < logits.count,
                  "solera: no such kind or anchor");
  const bool masked = plausibility > 0;
  return {logits.members(),
          weights.const_data_ptr(),
          top.mutable_data_ptr(),
          total.mutable_data_ptr(),
          nullptr,
          logits.rows,
          logits.width,
          anchor,
          inverse_temperature,
          masked ? std::log(plausibility) : 0.0,
          int(kind),
          masked,
          normalize};
}

std::tuple<Tensor, Tensor, Tensor> combine_logits(const std::vector<Tensor>& logits_in,
                                                  const Tensor& weights_in, int64_t kind,
                                                  double inverse_temperature, double plausibility,
                                                  int64_t anchor, bool normalize) {
  const MixtureList logits(logits_in);
  const int64_t rows = logits.rows, count = logits.count, width = logits.width;
  const ScalarType acc = accumulate_type(logits.first());
  const Tensor weights = mixture_checked(weights_in, acc, {rows, count}, "weights");
  Tensor out = mixture_empty(logits.first(), {rows, width});
  Tensor top = mixture_empty(logits.first(), {count + 1, rows}, acc);
  Tensor total = mixture_empty(logits.first(), {count + 1, rows}, acc);
  MixtureCombine p = combination_of(logits, weights, top, total, kind, inverse_temperature,
                                    plausibility, anchor, normalize);
  p.out = out.mutable_data_ptr();
  const auto kernel = pick_mixture_table().combine[dtype_of(logits.first())];
  parallel_for(0, rows, grain_for((count + 1) * logits.row_bytes()),
               [&](int64_t begin, int64_t end) {
                 const auto scratch = mixture_scratch(width, acc);
                 kernel(p, scratch.get(), begin, end);
               });
  return {out, top, total};
}

std::tuple<Tensor, Tensor> combine_logits_backward(const Tensor& dout_in,
                                                   const std::vector<Tensor>& logits_in,
                                                   const Tensor& weights_in, const Tensor& top_in,
                                                   const Tensor& total_in, int64_t kind,
                                                   double inverse_temperature, double plausibility,
                                                   int64_t anchor, bool normalize, bool need_logits,
                                                   bool need_weights, bool rows_first) {
  const MixtureList logits(logits_in);
  const int64_t rows = logits.rows, count = logits.count, width = logits.width;
  const ScalarType acc = accumulate_type(logits.first());
  const Tensor weights = mixture_checked(weights_in, acc, {rows, count}, "weights");
  Tensor top = mixture_checked(top_in, acc, {count + 1, rows}, "top");
  Tensor total = mixture_checked(total_in, acc, {count + 1, rows}, "log_total");
  STD_TORCH_CHECK(dout_in.dim() == 2 && dout_in.size(0) == rows && dout_in.size(1) == width &&
                      dout_in.scalar_type() == logits.first().scalar_type(),
                  "solera: dout does not fit the logits");
  const Tensor dout = with_unit_rows(dout_in);
  Tensor dlogits =
      need_logits ? mixture_gradient(logits, rows_first) : mixture_empty(logits.first(), {0});
  Tensor dweights = need_weights ? mixture_empty(logits.first(), {rows, count}, acc)
                                 : mixture_empty(logits.first(), {0}, acc);
  const MixtureCombineBackward p{
      combination_of(logits, weights, top, total, kind, inverse_temperature, plausibility, anchor,
                     normalize),
      dout.const_data_ptr(),
      dout.strides()[0],
      need_logits ? dlogits.mutable_data_ptr() : nullptr,
      need_weights ? dweights.mutable_data_ptr() : nullptr,
      rows_first ? width : rows * width,
      rows_first ? count * width : width};
  const auto kernel = pick_mixture_table().combine_backward[dtype_of(logits.first())];
  parallel_for(0, rows, grain_for(2 * (count + 1) * logits.row_bytes()),
               [&](int64_t begin, int64_t end) {
                 const auto scratch = mixture_scratch(2 * width, acc);
                 kernel(p, scratch.get(), begin, end);
               });
  return {dlogits, dweights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("mixture_scores", TORCH_BOX(&mixture_scores));
  m.impl("mixture_scores_backward", TORCH_BOX(&mixture_scores_backward));
  m.impl("combine_logits", TORCH_BOX(&combine_logits));
  m.impl("combine_logits_backward", TORCH_BOX(&combine_logits_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
