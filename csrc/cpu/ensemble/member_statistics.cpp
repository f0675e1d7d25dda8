// What K members say about a row together, and its gradient; the formulas are in
// python/solera/ensemble/member_statistics.py.
//
// Bytes: forward reads the N x K x C logits once and writes two N x C at most; backward reads the
// logits once and writes as many. The exponentials of a row of all members are kept in a scratch of
// K C numbers for the second pass over them (mean, then variance about it); where that is past L2
// they are made again, block by block, and the variance is accumulated by Welford's rule.
#include "member_rows.h"

namespace solera {

enum MemberWanted : int { kMean = 1, kVariance = 2, kEntropies = 4, kVotes = 8, kTops = 16 };

// Everything but the logits in the accumulator's type; a pointer is null where nothing is wanted.
struct MemberMoments {
  MemberRows logits;
  void *mean, *variance, *total, *aleatoric, *sums, *disagreement;  // sums: N x K x 2
  int64_t *vote, *top;
  int wanted;
  bool kept;  // the exponentials of a row fit the scratch
};
struct MemberMomentsGradient {
  MemberRows logits;
  const void *sums, *mean, *dmean, *dvariance, *dtotal, *daleatoric;
  void* out;
  int64_t row_step, member_step;
  bool streaming;
};

// scratch: statistics need `statistics_scratch` numbers of the accumulator's type and then C
// integers, all 0; the gradient 4 C numbers.
struct MemberStatisticsTable {
  void (*statistics[4])(const MemberMoments&, void* scratch, int64_t* counts, int64_t begin,
                        int64_t end);
  void (*gradient[4])(const MemberMomentsGradient&, void* scratch, int64_t begin, int64_t end);
};

constexpr int64_t kKeptBytes = int64_t(384) << 10;
// A row's columns rounded up to whole vectors of any instruction set.
inline int64_t padded_columns(int64_t width) { return (width + 15) / 16 * 16; }
inline int64_t statistics_scratch(int64_t members, int64_t width, bool kept) {
  return 3 * members + 2 * 1024 + (kept ? members * padded_columns(width) : 0);
}

namespace SOLERA_ISA {
namespace {

// Of one member's row: the largest value, sum e^(x - top), sum e^(x - top) (x - top), and where the
// largest value is (the first NaN if there is one, as in torch.argmax).
template <class A>
struct RowSums {
  A top, total, weighted;
  int64_t at;
};

template <class T, bool kSmooth>
SOLERA_INLINE RowSums<A<T>> sums_of(const T* x, int64_t width, bool votes, A<T>* kept) {
  constexpr int L = kLanes<T>;
  const A<T> lowest = lowest_of(A<T>());
  RowSums<A<T>> row{lowest, 0, 0, 0};
  const int64_t step = kept != nullptr ? width : kLogitBlock;  // kept ones share one maximum
  for (int64_t first = 0; first < width; first += step) {
    const int64_t n = width - first < step ? width - first : step;
    const T* block = x + first;
    const A<T> here = row_max<T>(
        n, row.top, [&](int64_t j, int count) { return fetch(block + j, count); }, Lines<T>{block});
    if (votes && (here > row.top || first == 0)) {
      const int64_t at = first_column(block, n, [&](AccVec<T> v) { return equal_lanes(v, here); });
      if (at < n) row.at = first + at;
    }
    if (here > row.top) {
      if (kSmooth && first > 0) {
        const A<T> factor = natural_exp_one(row.top - here);
        row.weighted = factor * (row.weighted + row.total * (row.top - here));
        row.total *= factor;
      }
      row.top = here;
    }
    if (!kSmooth) continue;
    AccVec<T> s0{}, s1{}, w0{}, w1{};
    const auto add = [&](int64_t j, int count, AccVec<T>& s, AccVec<T>& w) {
      const AccVec<T> u = fetch(block + j, count) - row.top;
      const AccVec<T> e = keep_or<T>(natural_exp(u), count, 0);
      if (kept != nullptr) store(kept + first + j, e);
      s += e;
      w += e * at_least(lowest, u);
    };
    int64_t j = 0;
    for (; j + 2 * L <= n; j += 2 * L) {
      add(j, L, s0, w0);
      add(j + L, L, s1, w1);
    }
    if (j + L <= n) {
      add(j, L, s0, w0);
      j += L;
    }
    if (j < n) add(j, int(n - j), s1, w1);
    row.total += lane_sum(s0 + s1);
    row.weighted += lane_sum(w0 + w1);
  }
  // A NaN makes the sum one.
  if (votes && (!kSmooth || row.total != row.total)) {
    const int64_t at = first_column(x, width, [&](AccVec<T> v) { return nan_lanes(v); });
    if (at < width) row.at = at;
  }
  return row;
}

// m log m of a mean probability, 0 where m is 0 (or subnormal).
template <class T>
SOLERA_INLINE AccVec<T> m_log_m(AccVec<T> m) {
  const AccVec<T> tiny = splat(smallest_normal(A<T>()));
  return m < tiny ? splat(A<T>(0)) : m * natural_log(m);
}

// Mean and variance over the members of kWide vectors of columns, from their kept exponentials.
template <class T, int kWide>
SOLERA_INLINE void kept_columns(const A<T>* kept, const A<T>* inverse, int64_t members,
                                int64_t step, A<T> share, AccVec<T>* mean, AccVec<T>* variance) {
  constexpr int L = kLanes<A<T>>;
  AccVec<T> m0[kWide] = {}, m1[kWide] = {};
  const auto probability = [&](int64_t k, int i) {
    return load(kept + k * step + i * L) * inverse[k];
  };
  int64_t k = 0;
  for (; k + 2 <= members; k += 2)
    for (int i = 0; i < kWide; ++i) {
      m0[i] += probability(k, i);
      m1[i] += probability(k + 1, i);
    }
  for (int i = 0; i < kWide; ++i) {
    if (k < members) m0[i] += probability(k, i);
    mean[i] = (m0[i] + m1[i]) * share;
  }
  if (variance == nullptr) return;
  AccVec<T> v0[kWide] = {}, v1[kWide] = {};
  for (k = 0; k + 2 <= members; k += 2)
    for (int i = 0; i < kWide; ++i) {
      const AccVec<T> d0 = probability(k, i) - mean[i], d1 = probability(k + 1, i) - mean[i];
      v0[i] += d0 * d0;
      v1[i] += d1 * d1;
    }
  for (int i = 0; i < kWide; ++i) {
    if (k < members) {
      const AccVec<T> d0 = probability(k, i) - mean[i];
      v0[i] += d0 * d0;
    }
    variance[i] = (v0[i] + v1[i]) * share;
  }
}

template <class T>
SOLERA_INLINE void smooth_kept(const MemberMoments& p, const A<T>* kept, const A<T>* inverse,
                               int64_t n, A<T>& negative) {
  constexpr int L = kLanes<T>;
  const int64_t width = p.logits.width, step = padded_columns(width);
  const A<T> share = A<T>(1) / A<T>(p.logits.members);
  A<T>* mean = (A<T>*)p.mean + n * width;
  A<T>* variance = p.wanted & kVariance ? (A<T>*)p.variance + n * width : nullptr;
  AccVec<T> entropy{}, m[2], v[2];
  const auto finish = [&](int64_t j, int i, int count) {
    deposit(mean + j, m[i], count);
    if (variance != nullptr) deposit(variance + j, v[i], count);
    if (p.wanted & kEntropies) entropy += keep_or<T>(m_log_m<T>(m[i]), count, 0);
  };
  AccVec<T>* wanted = variance == nullptr ? nullptr : v;
  int64_t j = 0;
  for (; j + 2 * L <= width; j += 2 * L) {
    kept_columns<T, 2>(kept + j, inverse, p.logits.members, step, share, m, wanted);
    finish(j, 0, L);
    finish(j + L, 1, L);
  }
  for (; j < width; j += L) {
    kept_columns<T, 1>(kept + j, inverse, p.logits.members, step, share, m, wanted);
    finish(j, 0, int(width - j < L ? width - j : L));
  }
  negative = lane_sum(entropy);
}

template <class T>
SOLERA_INLINE void smooth_again(const MemberMoments& p, const A<T>* tops, const A<T>* inverse,
                                A<T>* block, int64_t n, A<T>& negative) {
  constexpr int L = kLanes<T>;
  const int64_t width = p.logits.width;
  A<T>*mean = block, *square = block + kLogitBlock;
  negative = 0;
  for (int64_t first = 0; first < width; first += kLogitBlock) {
    const int64_t columns = width - first < kLogitBlock ? width - first : kLogitBlock;
    memset((void*)block, 0, 2 * kLogitBlock * sizeof(A<T>));
    for (int64_t k = 0; k < p.logits.members; ++k) {
      const T* x = member_row<T>(p.logits, n, k) + first;
      const A<T> top = tops[k], scale = inverse[k], share = A<T>(1) / A<T>(k + 1);
      strips<L>(columns, [&](int64_t j, int count) {
        const AccVec<T> e = natural_exp(fetch(x + j, count) - top) * scale;
        const AccVec<T> before = load(mean + j), d = e - before, after = before + d * share;
        store(mean + j, after);
        store(square + j, load(square + j) + d * (e - after));
      });
    }
    const A<T> share = A<T>(1) / A<T>(p.logits.members);
    negative += row_sum<A<T>>(columns, [&](int64_t j, int count) {
      const AccVec<T> m = load(mean + j);
      deposit((A<T>*)p.mean + n * width + first + j, m, count);
      if (p.wanted & kVariance)
        deposit((A<T>*)p.variance + n * width + first + j, load(square + j) * share, count);
      return p.wanted & kEntropies ? keep_or<T>(m_log_m<T>(m), count, 0) : AccVec<T>{};
    });
  }
}

// The class that most of `tops` name and the share of pairs that differ; counts are 0 before and
// after.
template <class A>
SOLERA_INLINE void count_votes(const int64_t* tops, int64_t members, int64_t* counts, int64_t* vote,
                               A* disagreement) {
  int64_t pairs = 0, best = 0, most = 0;
  for (int64_t k = 0; k < members; ++k) {
    const int64_t c = tops[k], count = ++counts[c];
    pairs += count - 1;
    if (count > most || (count == most && c < best)) {
      most = count;
      best = c;
    }
  }
  for (int64_t k = 0; k < members; ++k) counts[tops[k]] = 0;
  *vote = best;
  const double all = double(members) * double(members - 1) / 2;
  *disagreement = members > 1 ? A(1 - double(pairs) / all) : A(0);
}

template <class T, bool kSmooth>
void rows_of(const MemberMoments& p, void* scratch, int64_t* counts, int64_t begin, int64_t end) {
  const int64_t members = p.logits.members, width = p.logits.width, step = padded_columns(width);
  A<T>*inverse = (A<T>*)scratch, *largest = inverse + members;
  int64_t* tops = (int64_t*)(counts + width);
  A<T>*totals = largest + members, *block = totals + members, *kept = block + 2 * kLogitBlock;
  const bool votes = p.wanted & (kVotes | kTops);
  for (int64_t n = begin; n < end; ++n) {
    double entropies = 0;
    for (int64_t k = 0; k < members; ++k) {
      const RowSums<A<T>> row = sums_of<T, kSmooth>(member_row<T>(p.logits, n, k), width, votes,
                                                    p.kept ? kept + k * step : nullptr);
      tops[k] = row.at;
      if (!kSmooth) continue;
      totals[k] = row.total;
      inverse[k] = 1 / row.total;
      largest[k] = row.top;
      entropies -= double(row.weighted) / double(row.total);
    }
    if (kSmooth && p.wanted & kEntropies)
      entropies += double(row_sum<A<T>>(members, [&](int64_t k, int count) {
        return keep_or<A<T>>(natural_log(fetch(totals + k, count)), count, 0);
      }));
    if (kSmooth) {
      A<T> negative;
      if (p.kept)
        smooth_kept<T>(p, kept, inverse, n, negative);
      else
        smooth_again<T>(p, largest, inverse, block, n, negative);
      A<T>* sums = (A<T>*)p.sums + 2 * n * members;
      for (int64_t k = 0; k < members; ++k) {
        sums[2 * k] = largest[k];
        sums[2 * k + 1] = inverse[k];
      }
      if (p.wanted & kEntropies) {
        ((A<T>*)p.total)[n] = -negative;
        ((A<T>*)p.aleatoric)[n] = A<T>(entropies / double(members));
      }
    }
    if (p.wanted & kTops) memcpy(p.top + n * members, tops, size_t(members) * sizeof(int64_t));
    if (p.wanted & kVotes)
      count_votes(tops, members, counts, p.vote + n, (A<T>*)p.disagreement + n);
  }
}

template <class T>
void statistics(const MemberMoments& p, void* scratch, int64_t* counts, int64_t begin,
                int64_t end) {
  if (p.wanted & (kMean | kVariance | kEntropies))
    rows_of<T, true>(p, scratch, counts, begin, end);
  else
    rows_of<T, false>(p, scratch, counts, begin, end);
}

template <class T>
void gradient(const MemberMomentsGradient& p, void* scratch, int64_t begin, int64_t end) {
  constexpr int L = kLanes<T>;
  const int64_t members = p.logits.members, width = p.logits.width, step = padded_columns(width);
  A<T>*u = (A<T>*)scratch, *slope = u + step, *prob = slope + step, *product = prob + step;
  const A<T> tiny = smallest_normal(A<T>()), lowest = lowest_of(A<T>());
  const A<T> share = A<T>(1) / A<T>(members);
  for (int64_t n = begin; n < end; ++n) {
    const A<T> dtotal = p.dtotal == nullptr ? A<T>(0) : ((const A<T>*)p.dtotal)[n];
    const A<T> daleatoric = p.daleatoric == nullptr ? A<T>(0) : ((const A<T>*)p.daleatoric)[n];
    const A<T>* mean = (const A<T>*)p.mean + n * width;
    const A<T>* dmean = p.dmean == nullptr ? nullptr : (const A<T>*)p.dmean + n * width;
    const A<T>* dvariance = p.dvariance == nullptr ? nullptr : (const A<T>*)p.dvariance + n * width;
    strips<L>(width, [&](int64_t j, int count) {
      const AccVec<T> m = fetch(mean + j, count);
      AccVec<T> v{}, base{};
      if (dvariance != nullptr) v = 2 * fetch(dvariance + j, count);
      if (dmean != nullptr) base = fetch(dmean + j, count);
      if (dtotal != 0) base -= dtotal * natural_log(m < tiny ? splat(tiny) : m);
      store(slope + j, v);
      store(u + j, base - v * m);
    });
    for (int64_t k = 0; k < members; ++k) {
      const T* x = member_row<T>(p.logits, n, k);
      const A<T>* sums = (const A<T>*)p.sums + 2 * (n * members + k);
      const A<T> top = sums[0], inverse = sums[1], log_inverse = natural_log_one(inverse);
      const A<T> dot = row_sum<T>(width, [&](int64_t j, int count) {
        const AccVec<T> z = at_least(lowest, fetch(x + j, count) - top);
        const AccVec<T> e = keep_or<T>(natural_exp(z) * inverse, count, 0);
        const AccVec<T> s = load(u + j) + load(slope + j) * e - daleatoric * (z + log_inverse);
        const AccVec<T> q = e * s;
        store(prob + j, e);
        store(product + j, q);
        return q;
      });
      write_row((T*)p.out + n * p.row_step + k * p.member_step, width, p.streaming,
                [&](int64_t j, int count) {
                  return (fetch(product + j, count) - fetch(prob + j, count) * dot) * share;
                });
    }
  }
  if (p.streaming) stream_fence();
}

}  // namespace

extern const MemberStatisticsTable member_statistics_table;
const MemberStatisticsTable member_statistics_table = {
    {statistics<float>, statistics<double>, statistics<bf16>, statistics<f16>},
    {gradient<float>, gradient<double>, gradient<bf16>, gradient<f16>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT

namespace solera {

SOLERA_PICK(MemberStatisticsTable, member_statistics_table)

namespace {

constexpr int64_t kStatisticsStreamBytes = int64_t(16) << 20;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> member_statistics(
    std::vector<Tensor> logits_in, int64_t wanted) {
  const MemberTensors logits(logits_in);
  const Tensor& x = logits.first();
  const ScalarType acc = accumulate_type(x);
  STD_TORCH_CHECK(logits.width > 0 && logits.members > 0,
                  "solera: expected at least one member and one class");
  const int64_t none[] = {0}, row[] = {logits.rows}, columns[] = {logits.rows, logits.width},
                member[] = {logits.rows, logits.members, 2};
  const bool smooth = wanted & (kMean | kVariance | kEntropies);
  const auto make = [&](bool needed, Sizes sizes, ScalarType dtype) {
    return empty_like(x, needed ? sizes : Sizes(none, 1), dtype);
  };
  Tensor mean = make(smooth, Sizes(columns, 2), acc);
  Tensor variance = make(wanted & kVariance, Sizes(columns, 2), acc);
  Tensor total = make(wanted & kEntropies, Sizes(row, 1), acc);
  Tensor aleatoric = make(wanted & kEntropies, Sizes(row, 1), acc);
  Tensor sums = make(smooth, Sizes(member, 3), acc);
  Tensor disagreement = make(wanted & kVotes, Sizes(row, 1), acc);
  Tensor vote = make(wanted & kVotes, Sizes(row, 1), ScalarType::Long);
  Tensor top = make(wanted & kTops, Sizes(member, 2), ScalarType::Long);
  const int64_t size = acc == ScalarType::Double ? 8 : 4;
  const bool kept = logits.members * padded_columns(logits.width) * size <= kKeptBytes;
  const MemberMoments p{logits.view(),
                        mean.mutable_data_ptr(),
                        variance.mutable_data_ptr(),
                        total.mutable_data_ptr(),
                        aleatoric.mutable_data_ptr(),
                        sums.mutable_data_ptr(),
                        disagreement.mutable_data_ptr(),
                        static_cast<int64_t*>(vote.mutable_data_ptr()),
                        static_cast<int64_t*>(top.mutable_data_ptr()),
                        int(wanted),
                        kept};
  const auto kernel = pick_member_statistics_table().statistics[dtype_of(x)];
  const int64_t scratch = statistics_scratch(logits.members, logits.width, kept);
  parallel_for(0, logits.rows, grain_for(logits.bytes() / (logits.rows > 0 ? logits.rows : 1)),
               [&](int64_t begin, int64_t end) {
                 std::vector<double> work(size_t((scratch * size + 7) / 8));
                 std::vector<int64_t> counts(size_t(logits.width + logits.members));
                 kernel(p, work.data(), counts.data(), begin, end);
               });
  return {mean, variance, total, aleatoric, sums, disagreement, vote, top};
}

Tensor member_statistics_backward(std::vector<Tensor> logits_in, const Tensor& sums_in,
                                  const Tensor& mean_in, OptTensor dmean, OptTensor dvariance,
                                  OptTensor dtotal, OptTensor daleatoric) {
  const MemberTensors logits(logits_in);
  const ScalarType acc = accumulate_type(logits.first());
  const auto fitting = [&](OptTensor& t, int64_t columns) {
    if (!t.has_value()) return;
    STD_TORCH_CHECK(t->scalar_type() == acc && t->dim() == (columns ? 2 : 1) &&
                        t->size(0) == logits.rows && (!columns || t->size(1) == columns),
                    "solera: a gradient does not fit the statistics");
    t = dense(*t);
  };
  OptTensor mean = mean_in;
  STD_TORCH_CHECK(sums_in.scalar_type() == acc && sums_in.dim() == 3 &&
                      sums_in.size(0) == logits.rows && sums_in.size(1) == logits.members &&
                      sums_in.size(2) == 2,
                  "solera: the rows' sums do not fit the logits");
  const Tensor sums = dense(sums_in);
  fitting(mean, logits.width);
  fitting(dmean, logits.width);
  fitting(dvariance, logits.width);
  fitting(dtotal, 0);
  fitting(daleatoric, 0);
  Tensor out = logits.like();
  const MemberMomentsGradient p{logits.view(),
                                sums.const_data_ptr(),
                                mean->const_data_ptr(),
                                data_or_null(dmean),
                                data_or_null(dvariance),
                                data_or_null(dtotal),
                                data_or_null(daleatoric),
                                out.mutable_data_ptr(),
                                logits.row_step(),
                                logits.member_step(),
                                logits.bytes() >= kStatisticsStreamBytes};
  const auto kernel = pick_member_statistics_table().gradient[dtype_of(logits.first())];
  const int64_t size = acc == ScalarType::Double ? 8 : 4;
  parallel_for(
      0, logits.rows, grain_for(logits.bytes() / (logits.rows > 0 ? logits.rows : 1)),
      [&](int64_t begin, int64_t end) {
        std::vector<double> work(size_t((4 * padded_columns(logits.width) * size + 7) / 8));
        kernel(p, work.data(), begin, end);
      });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("member_statistics", TORCH_BOX(&member_statistics));
  m.impl("member_statistics_backward", TORCH_BOX(&member_statistics_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
