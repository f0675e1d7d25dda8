// Log-softmax of member logits at the label and its gradient; the formulas are in
// python/solera/ensemble/member_logits.py.
//
// Bytes: member_logsumexp reads the N x K x C logits once; member_softmax reads them once and
// writes as many. The weighted row of all members is made block by block and never stored.
// member_cross_entropy reads them from memory once and writes as many, with one exponential each: a
// row's exponentials stay in a scratch until its sums are known (the K rows of a mean probability
// in the last-level cache; past kKeptRows they are made again).
#include "member_loss.h"

namespace solera {

// Row numbers (lse, logp, a, b: N x K, or N where combined), weights and dweights (N x K) are in
// the accumulator's type.
struct MemberSums {
  MemberRows logits;
  const int64_t* target;
  const void* weights;  // may be null
  void *lse, *logp;
};
struct MemberGradient {
  MemberRows logits;
  const int64_t* target;
  const void* weights;
  const void *lse, *a, *b;
  void *out, *dweights;  // dweights may be null
  int64_t row_step, member_step;
  bool streaming;
};

// Rows [begin, end) of the N x K members' own, or of the N weighted ones.
struct MemberTable {
  void (*sums[4])(const MemberSums&, int64_t begin, int64_t end);
  void (*combined_sums[4])(const MemberSums&, int64_t begin, int64_t end);
  void (*gradient[4])(const MemberGradient&, int64_t begin, int64_t end);
  void (*combined_gradient[4])(const MemberGradient&, int64_t begin, int64_t end);
  void (*loss[4])(const MemberLoss&, void* scratch, int64_t begin, int64_t end);
};

namespace SOLERA_ISA {
namespace {

template <class A>
SOLERA_INLINE void put_sums(const MemberSums& p, int64_t at, A top, A total, A picked) {
  const bool none = total == 0;
  const A log_total = none ? A(-__builtin_inf()) : natural_log_one(total);
  ((A*)p.lse)[at] = none ? log_total : top + log_total;
  ((A*)p.logp)[at] = none ? A(__builtin_nan("")) : (picked - top) - log_total;
}

template <class T>
void sums(const MemberSums& p, int64_t begin, int64_t end) {
  const int64_t members = p.logits.members, width = p.logits.width;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / members, k = i % members, y = p.target[n];
    if (y < 0) {
      ((A<T>*)p.lse)[i] = ((A<T>*)p.logp)[i] = 0;
      continue;
    }
    const T* x = member_row<T>(p.logits, n, k);
    const RowSum<T> row = sum_of_row<T>(
        width, [&](int64_t j, int count) { return fetch(x + j, count); }, Lines<T>{x});
    const A<T> picked = y < width ? get(x + y, 1)[0] : A<T>(__builtin_nan(""));
    put_sums<A<T>>(p, i, row.top, row.sum, picked);
  }
}

template <class T>
void combined_sums(const MemberSums& p, int64_t begin, int64_t end) {
  const int64_t members = p.logits.members, width = p.logits.width;
  A<T> row[kLogitBlock];
  for (int64_t n = begin; n < end; ++n) {
    const int64_t y = p.target[n];
    if (y < 0) {
      ((A<T>*)p.lse)[n] = ((A<T>*)p.logp)[n] = 0;
      continue;
    }
    const A<T>* weights = (const A<T>*)p.weights + n * members;
    A<T> picked = A<T>(__builtin_nan(""));
    RowSum<A<T>> sum;
    logit_blocks(width, [&](int64_t first, int64_t count) {
      weighted_block<T>(p.logits, weights, n, first, count, row);
      if (y >= first && y < first + count) picked = row[y - first];
      add_block<false>(sum, count, row,
                       [&](int64_t j, int lanes) { return fetch(row + j, lanes); });
    });
    put_sums<A<T>>(p, n, sum.top, sum.sum, picked);
  }
}

template <class T>
void gradient(const MemberGradient& p, int64_t begin, int64_t end) {
  const int64_t members = p.logits.members, width = p.logits.width;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / members, k = i % members, y = p.target[n];
    T* out = (T*)p.out + n * p.row_step + k * p.member_step;
    const A<T> a = ((const A<T>*)p.a)[i], b = ((const A<T>*)p.b)[i];
    if (y < 0) {
      memset((void*)out, 0, size_t(width) * sizeof(T));
      continue;
    }
    const T* x = member_row<T>(p.logits, n, k);
    const A<T> lse = ((const A<T>*)p.lse)[i];
    write_row(
        out, width, p.streaming,
        [&](int64_t j, int count) { return a * natural_exp(fetch(x + j, count) - lse); },
        Lines<T>{x});
    if (y < width) put_one(out + y, a * natural_exp(get(x + y, 1) - lse)[0] + b, p.streaming);
  }
  if (p.streaming) stream_fence();
}

template <class T>
void combined_gradient(const MemberGradient& p, int64_t begin, int64_t end) {
  const int64_t members = p.logits.members, width = p.logits.width;
  A<T> row[kLogitBlock];
  for (int64_t n = begin; n < end; ++n) {
    const int64_t y = p.target[n];
    const A<T>* weights = (const A<T>*)p.weights + n * members;
    A<T>* dweights = p.dweights == nullptr ? nullptr : (A<T>*)p.dweights + n * members;
    T* out = (T*)p.out + n * p.row_step;
    for (int64_t k = 0; dweights != nullptr && k < members; ++k) dweights[k] = 0;
    if (y < 0) {
      for (int64_t k = 0; k < members; ++k)
        memset((void*)(out + k * p.member_step), 0, size_t(width) * sizeof(T));
      continue;
    }
    const A<T> lse = ((const A<T>*)p.lse)[n];
    const A<T> a = ((const A<T>*)p.a)[n], b = ((const A<T>*)p.b)[n];
    for (int64_t first = 0; first < width; first += kLogitBlock) {
      const int64_t count = width - first < kLogitBlock ? width - first : kLogitBlock;
      weighted_block<T>(p.logits, weights, n, first, count, row);
      strips<kLanes<A<T>>>(count, [&](int64_t j, int lanes) {
        deposit(row + j, a * natural_exp(fetch(row + j, lanes) - lse), lanes);
      });
      if (y >= first && y < first + count) row[y - first] += b;
      for (int64_t k = 0; k < members; ++k) {
        const A<T> w = weights[k];
        write_row(out + k * p.member_step + first, count, p.streaming,
                  [&](int64_t j, int lanes) { return w * fetch(row + j, lanes); });
        if (dweights == nullptr) continue;
        const T* x = member_row<T>(p.logits, n, k) + first;
        const A<T> lowest = lowest_of(A<T>());
        dweights[k] += row_sum<T>(count, [&](int64_t j, int lanes) {
          return fetch(row + j, lanes) * at_least(lowest, fetch(x + j, lanes));
        });
      }
    }
  }
  if (p.streaming) stream_fence();
}

}  // namespace

#define SOLERA_ALL(f) {f<float>, f<double>, f<bf16>, f<f16>}
extern const MemberTable member_table;
const MemberTable member_table = {SOLERA_ALL(sums), SOLERA_ALL(combined_sums), SOLERA_ALL(gradient),
                                  SOLERA_ALL(combined_gradient), SOLERA_ALL(loss)};
#undef SOLERA_ALL

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT

namespace solera {

SOLERA_PICK(MemberTable, member_table)

namespace {

constexpr int64_t kMemberStreamBytes = int64_t(16) << 20;

// What both ops take, checked so far that no memory outside the tensors is touched.
struct MemberArguments {
  MemberTensors logits;
  Tensor target;
  OptTensor weights;
  ScalarType acc;

  MemberArguments(const std::vector<Tensor>& x, const Tensor& y, const OptTensor& weights_in)
      : logits(x), target(dense(y)), acc(accumulate_type(logits.first())) {
    STD_TORCH_CHECK(y.dim() == 1 && y.size(0) == logits.rows && y.scalar_type() == ScalarType::Long,
                    "solera: target must be (N,) int64");
    if (weights_in.has_value()) weights = matrix(*weights_in, logits.rows, logits.members);
  }
  Tensor matrix(const Tensor& t, int64_t rows, int64_t columns) const {
    STD_TORCH_CHECK(
        t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.scalar_type() == acc,
        "solera: numbers of the rows do not fit the logits");
    return dense(t);
  }
  bool combined() const { return weights.has_value(); }
  int64_t columns() const { return combined() ? 1 : logits.members; }
  const int64_t* labels() const { return static_cast<const int64_t*>(target.const_data_ptr()); }
  Dtype dtype() const { return dtype_of(logits.first()); }
  // Over the rows that the kernels walk: N x K, or N where the members are combined.
  template <class F>
  void parallel(const F& body) const {
    const int64_t items = logits.rows * columns();
    if (items == 0) return;
    parallel_for(0, items, grain_for(logits.bytes() / items), body);
  }
};

std::tuple<Tensor, Tensor> member_logsumexp(std::vector<Tensor> logits, const Tensor& target,
                                            OptTensor weights) {
  const MemberArguments in(logits, target, weights);
  const int64_t sizes[] = {in.logits.rows, in.columns()};
  Tensor lse = empty_like(in.logits.first(), Sizes(sizes, 2), in.acc);
  Tensor logp = empty_like(in.logits.first(), Sizes(sizes, 2), in.acc);
  const MemberSums p{in.logits.view(), in.labels(), data_or_null(in.weights),
                     lse.mutable_data_ptr(), logp.mutable_data_ptr()};
  const MemberTable& table = pick_member_table();
  const auto kernel = (in.combined() ? table.combined_sums : table.sums)[in.dtype()];
  in.parallel([&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {lse, logp};
}

std::tuple<Tensor, Tensor> member_softmax(std::vector<Tensor> logits, const Tensor& target,
                                          OptTensor weights, const Tensor& lse_in,
                                          const Tensor& a_in, const Tensor& b_in,
                                          bool need_weights) {
  const MemberArguments in(logits, target, weights);
  const int64_t rows = in.logits.rows, columns = in.columns();
  const Tensor lse = in.matrix(lse_in, rows, columns);
  const Tensor a = in.matrix(a_in, rows, columns), b = in.matrix(b_in, rows, columns);
  Tensor out = in.logits.like();
  const bool moment = need_weights && in.combined();
  const int64_t full[] = {rows, in.logits.members}, none[] = {0};
  Tensor dweights = empty_like(in.logits.first(), moment ? Sizes(full, 2) : Sizes(none, 1), in.acc);
  const MemberGradient p{in.logits.view(),
                         in.labels(),
                         data_or_null(in.weights),
                         lse.const_data_ptr(),
                         a.const_data_ptr(),
                         b.const_data_ptr(),
                         out.mutable_data_ptr(),
                         moment ? dweights.mutable_data_ptr() : nullptr,
                         in.logits.row_step(),
                         in.logits.member_step(),
                         in.logits.bytes() >= kMemberStreamBytes};
  const MemberTable& table = pick_member_table();
  const auto kernel = (in.combined() ? table.combined_gradient : table.gradient)[in.dtype()];
  in.parallel([&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {out, dweights};
}

std::tuple<Tensor, Tensor, Tensor> member_cross_entropy(std::vector<Tensor> logits,
                                                        const Tensor& target, OptTensor weights,
                                                        OptTensor scale, int64_t kind,
                                                        bool need_logits, bool need_weights) {
  const MemberArguments in(logits, target, weights);
  const int64_t rows = in.logits.rows, members = in.logits.members, width = in.logits.width;
  STD_TORCH_CHECK(!scale.has_value() || (scale->numel() == 1 && scale->scalar_type() == in.acc),
                  "solera: scale must be one number of the accumulator's type");
  const int64_t row[] = {rows}, full[] = {rows, members}, none[] = {0};
  const Tensor& first = in.logits.first();
  Tensor loss = empty_like(first, Sizes(row, 1), in.acc);
  const bool shared = kind == kMeanLogit && !in.combined() && !in.logits.list;
  const int64_t one[] = {rows, 1, width};
  Tensor dlogits = !need_logits ? empty_like(first, Sizes(none, 1))
                   : shared     ? empty_like(first, Sizes(one, 3))
                                : in.logits.like();
  Tensor dweights = empty_like(first, need_weights ? Sizes(full, 2) : Sizes(none, 1), in.acc);
  const int64_t size = in.acc == ScalarType::Double ? 8 : 4;
  const bool kept = kind == kMeanProbability && need_logits && members * width * size <= kKeptRows;
  const MemberLoss p{in.logits.view(),
                     in.labels(),
                     data_or_null(in.weights),
                     data_or_null(scale),
                     loss.mutable_data_ptr(),
                     need_logits ? dlogits.mutable_data_ptr() : nullptr,
                     need_weights ? dweights.mutable_data_ptr() : nullptr,
                     shared ? width : in.logits.row_step(),
                     in.logits.member_step(),
                     int(kind),
                     shared,
                     kept,
                     need_logits && dlogits.numel() * first.element_size() >= kMemberStreamBytes};
  const auto kernel = pick_member_table().loss[in.dtype()];
  const int64_t scratch = loss_scratch(members, width, kept);
  parallel_for(0, rows, grain_for(rows > 0 ? in.logits.bytes() / rows : 1),
               [&](int64_t begin, int64_t end) {
                 const std::unique_ptr<double[]> work(new double[size_t(scratch * size / 8 + 1)]);
                 kernel(p, work.get(), begin, end);
               });
  return {loss, dlogits, dweights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("member_cross_entropy", TORCH_BOX(&member_cross_entropy));
  m.impl("member_logsumexp", TORCH_BOX(&member_logsumexp));
  m.impl("member_softmax", TORCH_BOX(&member_softmax));
}

}  // namespace solera
#endif  // SOLERA_FRONT
