// The r-th largest of |w - base|, exactly, without a sort.
//
// A sample at a fixed stride brackets the value: it lies between two of the sample's own values,
// four and a half standard deviations to either side of its rank. One pass over the tensor counts
// what is above the bracket and collects what is strictly inside, a few percent; the value is an
// end of the bracket or is selected among those. Where the counts show that the bracket missed,
// three (for float64 six) passes of histograms over the bits find it. All counts are integers and
// the answer is a value that is there: nothing depends on the sample, the threads or the order.
//
// Of tensors that do not fit in memory abs_digits counts the keys of a part by 16 of their bits:
// two (for float64 four) reads of all parts find the value, digit by digit from the top.
//
// Bytes: one read of the tensors and of the base. K models share the read of a base's chunk.
#include "delta_tiles.h"
#include "key_masks.h"

namespace solera {

struct DeltaSource {
  WeightStream w, base;
  bool wide;  // w - base is taken in double
};
struct BracketCounts {
  int64_t above = 0, at_high = 0, at_low = 0;  // keys > high, == high, == low
};
constexpr int kDigitBits = 11;
constexpr int kLongDigitBits = 16;
// The models take turns of so many elements, so that the base stays in the first cache; each asks
// for what it reads at its next turn meanwhile.
constexpr int64_t kTurn = 2048;

struct AbsQuantileTable {
  // Indexed by the keys' width: 0 float, 1 double. Keys are int32_t or int64_t.
  void (*sample[2])(const DeltaSource&, const int64_t* places, int64_t count, void* keys);
  int64_t (*collect[2])(const DeltaSource&, int64_t offset, int64_t count, const void* bracket,
                        BracketCounts& counts, void* inside);
  void (*histogram[2])(const DeltaSource&, int64_t offset, int64_t count, int64_t prefix, int shift,
                       int64_t* bins);
  void (*digits[2])(const DeltaSource&, int64_t count, int64_t prefix, int shift, int64_t* bins);
};

namespace SOLERA_ISA {
namespace {

template <class A>
SOLERA_INLINE Key<A> key_at(const DeltaSource& s, int64_t i) {
  A delta;
  if (sizeof(A) == 8 && !s.wide) {
    const float b = s.base.data ? element<float>(s.base, i) : 0.0f;
    delta = A(element<float>(s.w, i) - b);
  } else {
    delta = element<A>(s.w, i);
    if (s.base.data) delta -= element<A>(s.base, i);
  }
  return bits_as<Key<A>>(delta) & kLargestKey<A>;
}

template <class A>
void sample(const DeltaSource& s, const int64_t* places, int64_t count, void* keys) {
  constexpr int64_t kAhead = 16;  // each place is on a line of its own
  const int64_t size = s.w.dtype == kFloat64 ? 8 : s.w.dtype == kFloat32 ? 4 : 2;
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) __builtin_prefetch((const char*)s.w.data + places[i + kAhead] * size);
    ((Key<A>*)keys)[i] = key_at<A>(s, places[i]);
  }
}

// Calls body(keys, n) for vectors of keys of [offset, offset + count), n of whose lanes count.
template <class A, class F>
SOLERA_INLINE void each_key(const DeltaSource& s, int64_t offset, int64_t count, const F& body) {
  typedef typename Vec<A>::type V;
  constexpr int L = Vec<A>::lanes;
  alignas(64) A w_tile[kDeltaTile];
  alignas(64) A base_tile[kDeltaTile];
  for (int64_t start = offset; start < offset + count; start += kDeltaTile) {
    const int n = int(offset + count - start < kDeltaTile ? offset + count - start : kDeltaTile);
    const A *w, *base = nullptr;
    if (sizeof(A) == 8 && !s.wide) {
      for (int j = 0; j < n; ++j) w_tile[j] = bits_as<A>(Key<A>(key_at<A>(s, start + j)));
      w = w_tile;
    } else {
      w = tile_of<A>(s.w, start, n, w_tile);
      base = tile_of<A>(s.base, start, n, base_tile);
    }
    for (int j = 0; j < n; j += L) {
      const int here = n - j < L ? n - j : L;
      V delta = get(w + j, here);
      if (w != w_tile) __builtin_prefetch(w + j + kTurn);
      if (base) delta -= get(base + j, here);
      body(bits_as<KeyVec<A>>(delta) & kLargestKey<A>, here);
    }
  }
}

// bracket: low, high. `inside` holds `count` keys and one vector more.
template <class A>
int64_t collect(const DeltaSource& s, int64_t offset, int64_t count, const void* bracket,
                BracketCounts& counts, void* inside) {
  const KeyVec<A> low = ((const Key<A>*)bracket)[0] - KeyVec<A>{},
                  high = ((const Key<A>*)bracket)[1] - KeyVec<A>{};
  KeyVec<A> above{}, at_high{}, at_low{};  // fewer than 2^31 of a chunk: no lane overflows
  Key<A>* to = (Key<A>*)inside;
  int64_t n = 0;
  each_key<A>(s, offset, count, [&](KeyVec<A> key, int here) {
    if (here < Vec<A>::lanes)  // a key below every bracket
      for (int i = here; i < Vec<A>::lanes; ++i) key[i] = -2;
    const auto over = beyond(key, high);
    tally(above, over);
    tally(at_high, equal(key, high));
    tally(at_low, equal(key, low));
    n += append(to + n, key, both(beyond(key, low), beyond(high, key)));
  });
  for (int i = 0; i < Vec<A>::lanes; ++i) {
    counts.above += above[i];
    counts.at_high += at_high[i];
    counts.at_low += at_low[i];
  }
  return n;
}

// bins[digit] += keys whose bits above the digit at `shift` are those of `prefix`.
template <class A>
void histogram(const DeltaSource& s, int64_t offset, int64_t count, int64_t prefix, int shift,
               int64_t* bins) {
  const int64_t digits = (int64_t(1) << kDigitBits) - 1;
  each_key<A>(s, offset, count, [&](KeyVec<A> key, int here) {
    for (int i = 0; i < here; ++i) {
      const int64_t rest = int64_t(key[i]) >> shift;
      if (rest >> kDigitBits == prefix) ++bins[rest & digits];
    }
  });
}

// The same with digits of 16 bits, those that count gathered first: at the second digit they are
// few.
template <class A>
void digits(const DeltaSource& s, int64_t count, int64_t prefix, int shift, int64_t* bins) {
  constexpr Key<A> kLast = (Key<A>(1) << kLongDigitBits) - 1;
  Key<A> found[kDeltaTile + Vec<A>::lanes];
  const KeyVec<A> wanted = Key<A>(prefix) - KeyVec<A>{};
  int64_t n = 0;
  const auto flush = [&] {
    for (int64_t i = 0; i < n; ++i) ++bins[found[i] & kLast];
    n = 0;
  };
  each_key<A>(s, 0, count, [&](KeyVec<A> key, int here) {
    const KeyVec<A> rest = key >> shift;
    auto mine = equal((KeyVec<A>)(rest >> kLongDigitBits), wanted);
    if (here < Vec<A>::lanes) mine = both(mine, first_lanes(here, mine));
    if (n > kDeltaTile - Vec<A>::lanes) flush();
    n += append(found + n, rest, mine);
  });
  flush();
}

}  // namespace

extern const AbsQuantileTable abs_quantile_table;
const AbsQuantileTable abs_quantile_table = {
    {sample<float>, sample<double>},
    {collect<float>, collect<double>},
    {histogram<float>, histogram<double>},
    {digits<float>, digits<double>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>

#include "delta_lists.h"

namespace solera {

SOLERA_PICK(AbsQuantileTable, abs_quantile_table)

namespace {

constexpr int64_t kSelectChunk = 16384;
constexpr int64_t kCollectAll = 4096;  // below this many elements there is no sample

// Positions [first, last) of the lists, whose elements are ranked together.
struct RankedGroup {
  const DeltaLists* lists;
  int64_t first, last;
  std::vector<int64_t> begins;  // where each position's elements begin, and the total
  std::vector<int64_t> chunks;  // where each position's chunks begin, and the total

  RankedGroup(const DeltaLists& all, int64_t begin, int64_t end)
      : lists(&all), first(begin), last(end), begins{0}, chunks{0} {
    for (int64_t l = first; l < last; ++l) {
      begins.push_back(begins.back() + all.elements[l]);
      chunks.push_back(chunks.back() + (all.elements[l] + kSelectChunk - 1) / kSelectChunk);
    }
  }
  int64_t total() const { return begins.back(); }
  DeltaSource source(int64_t position, int64_t k) const {
    const int64_t l = first + position;
    return {lists->streams[l * lists->models + k], lists->base(l), lists->wide(l)};
  }
  // Calls body(position, offset, count) for each chunk of [begin, end).
  template <class F>
  void each_chunk(int64_t begin, int64_t end, const F& body) const {
    auto at = std::upper_bound(chunks.begin(), chunks.end(), begin) - chunks.begin() - 1;
    for (; begin < end; ++begin) {
      while (begin >= chunks[at + 1]) ++at;
      const int64_t offset = (begin - chunks[at]) * kSelectChunk;
      body(at, offset, std::min(kSelectChunk, begins[at + 1] - begins[at] - offset));
    }
  }
};

template <class Number>
struct Selection {
  int64_t rank = 0;
  Number bracket[2] = {-1, std::numeric_limits<Number>::max()};  // low, high
  BracketCounts counts;
  std::vector<Number> inside;
  Number found = 0;
};

// The r-th largest, from 0, of non-negative numbers, which are moved about. Counting them in 2048
// equal parts of their range first leaves few to compare; the others are not moved at all.
template <class Number>
Number largest(std::vector<Number>& keys, int64_t r) {
  constexpr int kParts = 11;
  auto first = keys.begin(), last = keys.end();
  if (last - first > 512) {
    const auto ends = std::minmax_element(first, last);
    const Number least = *ends.first, range = *ends.second - least;
    int shift = 0;
    while (range >> shift >> kParts) ++shift;
    std::vector<int32_t> counts(size_t(1) << kParts);
    for (auto i = first; i != last; ++i) ++counts[size_t((*i - least) >> shift)];
    int64_t part = (int64_t(1) << kParts) - 1;
    for (; r >= counts[part]; --part) r -= counts[part];
    last = first;
    for (auto i = first; i != keys.end(); ++i) {  // written first, kept if it is of the part
      const Number key = *i;
      *last = key;
      last += (key - least) >> shift == part;
    }
    if (shift == 0) return *first;
  }
  const auto at = last - 1 - r;
  std::nth_element(first, at, last);
  return *at;
}

// The bracket of rank r of n: the sample's values 4.5 deviations from where its rank is expected.
template <class Number>
void bracket_by_sample(const RankedGroup& group, int64_t k, Selection<Number>& s) {
  const int64_t n = group.total();
  if (n <= kCollectAll) return;
  const int64_t size = std::clamp<int64_t>(n / 128, 1024, 65536), stride = n / size;
  std::vector<Number> sample(size);
  std::vector<int64_t> places;
  const auto& table = pick_abs_quantile_table();
  int64_t i = 0, position = 0;
  while (i < size) {
    const int64_t place = i * stride + stride / 2;
    while (place >= group.begins[position + 1]) ++position;
    places.clear();
    int64_t at = i;
    for (; at < size; ++at) {
      const int64_t next = at * stride + stride / 2;
      if (next >= group.begins[position + 1]) break;
      places.push_back(next - group.begins[position]);
    }
    table.sample[sizeof(Number) / 8](group.source(position, k), places.data(),
                                     int64_t(places.size()), &sample[i]);
    i = at;
  }
  const double p = double(s.rank) / double(n), expected = p * double(size);
  const int64_t margin = 2 + int64_t(std::ceil(4.5 * std::sqrt(double(size) * p * (1 - p))));
  const int64_t above = int64_t(expected) - margin, below = int64_t(expected) + margin;
  std::vector<Number> again = sample;
  if (above >= 0) s.bracket[1] = largest(again, above);
  if (below < size) s.bracket[0] = largest(sample, below);
}

template <class Number>
void search_bits(const RankedGroup& group, int64_t k, Selection<Number>& s) {
  constexpr int kBits = 8 * int(sizeof(Number)) - 1;
  const auto& table = pick_abs_quantile_table();
  int64_t prefix = 0, rank = s.rank;
  for (int shift = (kBits - 1) / kDigitBits * kDigitBits; shift >= 0; shift -= kDigitBits) {
    std::vector<int64_t> bins(size_t(1) << kDigitBits);
    std::mutex mutex;
    parallel_for(0, group.chunks.back(), 4, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> mine(bins.size());
      group.each_chunk(begin, end, [&](int64_t position, int64_t offset, int64_t count) {
        table.histogram[sizeof(Number) / 8](group.source(position, k), offset, count, prefix, shift,
                                            mine.data());
      });
      const std::lock_guard<std::mutex> lock(mutex);
      for (size_t i = 0; i < bins.size(); ++i) bins[i] += mine[i];
    });
    int64_t digit = int64_t(bins.size()) - 1;
    for (; digit > 0 && rank > bins[digit]; --digit) rank -= bins[digit];
    prefix = prefix << kDigitBits | digit;
  }
  s.found = Number(prefix);
}

template <class Number>
void settle(const RankedGroup& group, int64_t k, Selection<Number>& s) {
  const BracketCounts& c = s.counts;
  const int64_t from_high = c.above + c.at_high, inside = int64_t(s.inside.size());
  if (s.rank > c.above && s.rank <= from_high) {
    s.found = s.bracket[1];
  } else if (s.rank > from_high && s.rank <= from_high + inside) {
    s.found = largest(s.inside, s.rank - from_high - 1);
  } else if (s.rank > from_high + inside && s.rank <= from_high + inside + c.at_low) {
    s.found = s.bracket[0];
  } else {
    search_bits(group, k, s);
  }
}

// found[k * stride] = the ranks[k * stride]-th largest of a group's |w_k - base|, for every model.
template <class Number>
void select_group(const RankedGroup& group, const int64_t* ranks, double* found, int64_t stride) {
  const int64_t models = group.lists->models;
  const auto& table = pick_abs_quantile_table();
  std::vector<Selection<Number>> all(models);
  std::vector<int64_t> wanted;
  for (int64_t k = 0; k < models; ++k) {
    all[k].rank = ranks[k * stride];
    if (all[k].rank > 0) wanted.push_back(k);
  }
  const int64_t count = int64_t(wanted.size());
  parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) bracket_by_sample(group, wanted[i], all[wanted[i]]);
  });
  std::mutex mutex;
  parallel_for(0, group.chunks.back(), 4, [&](int64_t begin, int64_t end) {
    std::vector<BracketCounts> counts(count);
    std::vector<std::vector<Number>> inside(count);
    std::vector<Number> buffer(kTurn + 64);
    group.each_chunk(begin, end, [&](int64_t position, int64_t offset, int64_t n) {
      for (int64_t at = 0; at < n; at += kTurn)
        for (int64_t i = 0; i < count; ++i) {
          const int64_t m = table.collect[sizeof(Number) / 8](
              group.source(position, wanted[i]), offset + at, std::min(kTurn, n - at),
              all[wanted[i]].bracket, counts[i], buffer.data());
          inside[i].insert(inside[i].end(), buffer.begin(), buffer.begin() + m);
        }
    });
    const std::lock_guard<std::mutex> lock(mutex);
    for (int64_t i = 0; i < count; ++i) {
      Selection<Number>& s = all[wanted[i]];
      s.counts.above += counts[i].above;
      s.counts.at_high += counts[i].at_high;
      s.counts.at_low += counts[i].at_low;
      s.inside.insert(s.inside.end(), inside[i].begin(), inside[i].end());
    }
  });
  parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) settle(group, wanted[i], all[wanted[i]]);
  });
  for (int64_t k = 0; k < models; ++k) {
    double value = std::numeric_limits<double>::infinity();
    if (all[k].rank > 0) {
      if constexpr (sizeof(Number) == 8)
        value = generic::bits_as<double>(all[k].found);
      else
        value = double(generic::bits_as<float>(all[k].found));
    }
    found[k * stride] = value == value ? value : std::numeric_limits<double>::infinity();
  }
}

// (K, G) thresholds in float64; G is 1 if all positions are ranked together, else L.
Tensor abs_quantile(const std::vector<Tensor>& tensors, const std::vector<Tensor>& base,
                    int64_t models, const std::vector<int64_t>& ranks, bool whole) {
  const DeltaLists lists("abs_quantile", tensors, base, models);
  const int64_t groups = whole ? 1 : lists.length;
  STD_TORCH_CHECK(int64_t(ranks.size()) == models * groups, "abs_quantile: expected ",
                  models * groups, " ranks, got ", ranks.size());
  Tensor out = empty_like(tensors[0], std::vector<int64_t>{models, groups}, ScalarType::Double);
  double* found = static_cast<double*>(out.mutable_data_ptr());
  int64_t all = 0;
  for (const int64_t n : lists.elements) all += n;
  for (size_t i = 0; i < ranks.size(); ++i) {
    const int64_t n = whole ? all : lists.elements[int64_t(i) % groups];
    STD_TORCH_CHECK(ranks[i] >= 0 && ranks[i] <= n, "abs_quantile: rank ", ranks[i], " of ", n);
  }
  const auto select = [&](int64_t g) {
    const RankedGroup group(lists, whole ? 0 : g, whole ? lists.length : g + 1);
    bool wide = false;
    for (int64_t l = group.first; l < group.last; ++l) wide = wide || lists.wide(l);
    if (wide)
      select_group<int64_t>(group, &ranks[g], found + g, groups);
    else
      select_group<int32_t>(group, &ranks[g], found + g, groups);
  };
  // Small tensors side by side, each by one thread; large ones one by one, by all.
  constexpr int64_t kLarge = 1 << 19;
  std::vector<int64_t> small;
  for (int64_t g = 0; g < groups; ++g) {
    if (whole || lists.elements[g] * models >= kLarge)
      select(g);
    else
      small.push_back(g);
  }
  parallel_for(0, int64_t(small.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) select(small[i]);
  });
  return out;
}

// (H, 2^16) counts: of model which[h] the elements whose key has prefixes[h] above the 16 bits at
// `shift`, by those bits. A task counts for one row: nothing is added up between threads.
Tensor abs_digits(const std::vector<Tensor>& tensors, const std::vector<Tensor>& base,
                  const std::vector<int64_t>& which, const std::vector<int64_t>& prefixes,
                  int64_t shift) {
  const int64_t K = int64_t(tensors.size()), H = int64_t(which.size());
  const DeltaLists lists("abs_digits", tensors, base, K);
  STD_TORCH_CHECK(lists.length == 1 && int64_t(prefixes.size()) == H && H > 0,
                  "abs_digits: expected one tensor a model, and as many prefixes as rows");
  const bool wide = lists.wide(0);
  STD_TORCH_CHECK(shift >= 0 && shift <= (wide ? 48 : 16), "abs_digits: shift ", shift);
  for (const int64_t k : which) STD_TORCH_CHECK(k >= 0 && k < K, "abs_digits: model ", k);
  Tensor out = empty_like(tensors[0], std::vector<int64_t>{H, int64_t(1) << kLongDigitBits},
                          ScalarType::Long);
  int64_t* bins = static_cast<int64_t*>(out.mutable_data_ptr());
  const auto& table = pick_abs_quantile_table();
  parallel_for(0, H, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      int64_t* row = bins + (h << kLongDigitBits);
      memset(row, 0, sizeof(int64_t) << kLongDigitBits);
      table.digits[wide]({lists.streams[which[h]], lists.base(0), wide}, lists.elements[0],
                         prefixes[h], int(shift), row);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("abs_quantile", TORCH_BOX(&abs_quantile));
  m.impl("abs_digits", TORCH_BOX(&abs_digits));
}

}  // namespace solera
#endif  // SOLERA_FRONT
