// Model Stock: gram's kernels, twice over a tensor or its rows.
//
//   out = b + t / K sum_k d_k             d_k = w_k - b, t made of the G_kj = <d_k, d_j>
//
// The pass that takes the dots also leaves the sum of the d_k in memory; the next one reads that
// and the base. Tensors (or rows) go in groups whose sums stay in the last-level cache, so that
// what moves is K + 1 streams read and 1 written: as many as one pass would. Of a larger tensor the
// sums lie in its result until then (K + 5 streams), or, where that is half precision, are formed
// again (2K + 3). All three give the same bits. With the dots given, as for a part of a tensor that
// does not fit in memory, there is only the second pass, which forms the sums.
#include "gram_kernels.h"

#ifdef SOLERA_FRONT
#include <cmath>

#include "gram_lists.h"

namespace solera {

SOLERA_PICK(GramTable, gram_table)

namespace {

// t of Model Stock: cosines of zero vectors are 0, their mean over pairs is clamped to [0, 1].
double stock_ratio(const double* gram, int64_t K) {
  const auto inverse = [&](int64_t k) {
    const double square = gram[k * K + k];
    return square == 0 ? 0 : 1 / std::sqrt(square);
  };
  double sum = 0;
  for (int64_t i = 0; i < K; ++i)
    for (int64_t j = 0; j < i; ++j) sum += gram[i * K + j] * inverse(i) * inverse(j);
  double cos = sum * 2 / double(K * (K - 1));
  cos = cos < 0 ? 0 : cos > 1 ? 1 : cos;  // a NaN stays one
  return double(K) * cos / (1 + double(K - 1) * cos);
}

// Model Stock, a group of rows at a time: as many as leave sums of 8 MiB, or one.
class Stock {
 public:
  Stock(const GramLists& lists, const std::vector<Tensor>& out, double* matrices)
      : lists_(lists),
        chunks_(lists.rows.chunks()),
        table_(pick_gram_table()),
        matrices_(matrices) {
    int64_t most = 0, bytes = 0;
    for (int64_t l = 0; l < lists.length; ++l) {
      const int dtype = dtype_of(out[l]);
      outputs_.push_back({out[l].mutable_data_ptr(), dtype});
      most += lists.rows.count(l) * room(l);
      bytes += out[l].numel() * int64_t(out[l].element_size());
    }
    streaming_ = bytes >= kStreamBytes;
    kept_.reset(new char[size_t((most < kRoom ? most : kRoom) + kLine)]);
    aligned_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(kept_.get()) + kLine - 1) /
                                       kLine * kLine);
  }

  // known: the dots of the rows that these are a part of, or null.
  void run(const double* known) {
    std::vector<double> partial, factors;
    known_ = known != nullptr;
    if (known_) memcpy(matrices_, known, size_t(lists_.rows.total()) * square() * sizeof(double));
    for (int64_t first = 0; first < lists_.rows.total(); first += int64_t(places_.size())) {
      gather(first);
      const int64_t last = first + int64_t(places_.size()), K = lists_.models;
      const int64_t pairs = K * (K + 1) / 2, begin = chunks_.first(first);
      if (!known_) {
        partial.resize(size_t((chunks_.first(last) - begin) * pairs));
        each_chunk(first, last, [&](const Place& at, int64_t count, int64_t chunk) {
          table_.forward[wide(at.tensor)](lists_.item(at.tensor), at.start, count,
                                          &partial[(chunk - begin) * pairs], at.sums,
                                          streaming_ && !cached_, gram_scratch(K));
        });
      }
      factors.clear();
      for (int64_t row = first; row < last; ++row) {
        double* to = matrices_ + row * square();
        if (!known_)
          sum_chunks(partial.data(), chunks_.first(row) - begin, chunks_.first(row + 1) - begin, K,
                     to);
        factors.push_back(stock_ratio(to, K) / double(K));
      }
      each_chunk(first, last, [&](const Place& at, int64_t count, int64_t) {
        table_.move_base[wide(at.tensor)](lists_.item(at.tensor), factors[at.row - first], at.sums,
                                          outputs_[at.tensor], at.start, count,
                                          streaming_ && cached_, gram_scratch(K));
      });
    }
  }

 private:
  static constexpr int64_t kRoom = int64_t(8) << 20, kLine = 64;
  const GramLists& lists_;
  const TensorChunks& chunks_;
  const GramTable& table_;
  double* matrices_;
  std::vector<WeightOutput> outputs_;
  bool streaming_, cached_, known_ = false;
  int64_t grain_;
  std::unique_ptr<char[]> kept_;
  char* aligned_;
  std::vector<int64_t> places_;  // of the group's rows in that memory

  struct Place {
    int64_t row, tensor, start;  // the element
    void* sums;
  };

  int64_t square() const { return lists_.models * lists_.models; }
  int wide(int64_t l) const { return outputs_[l].dtype == kFloat64; }
  int64_t room(int64_t l) const {
    return (lists_.rows.length(l) * (wide(l) ? 8 : 4) + kLine - 1) / kLine * kLine;
  }
  void gather(int64_t first) {
    places_.clear();
    int64_t used = 0;
    for (int64_t row = first; row < lists_.rows.total(); ++row) {
      const int64_t more = room(lists_.rows.find(row).tensor);
      if (row > first && used + more > kRoom) break;
      places_.push_back(used);
      used += more;
    }
    cached_ = used <= kRoom;
    // What a chunk of all streams takes, and how many make a task.
    const int64_t chunks = chunks_.first(first + int64_t(places_.size())) - chunks_.first(first);
    grain_ = 1 + 65536 * chunks / (used * (lists_.models + 1) + 1);
  }
  // Of a row too large for a group the result itself holds the sums, if it can; else they are
  // formed again.
  void* sums_at(int64_t row, int64_t first, int64_t l, int64_t offset, int64_t start) const {
    const int64_t size = wide(l) ? 8 : 4;
    if (known_) return nullptr;
    if (cached_) return aligned_ + places_[row - first] + offset * size;
    const WeightOutput& out = outputs_[l];
    const bool holds = out.dtype == kFloat64 || out.dtype == kFloat32;
    return holds ? static_cast<char*>(out.data) + start * size : nullptr;
  }
  template <class F>
  void each_chunk(int64_t first, int64_t last, const F& body) const {
    const auto range = [&](int64_t begin, int64_t end) {
      chunks_.each(begin, end, [&](size_t row, int64_t offset, int64_t count, int64_t chunk) {
        const auto at = lists_.rows.find(int64_t(row));
        const int64_t start = at.start + offset;
        body(Place{int64_t(row), at.tensor, start,
                   sums_at(int64_t(row), first, at.tensor, offset, start)},
             count, chunk);
      });
    };
    const int64_t begin = chunks_.first(first), end = chunks_.first(last);
    if (end - begin <= grain_) return range(begin, end);
    parallel_for(begin, end, grain_, range);
  }
};

std::tuple<std::vector<Tensor>, Tensor> model_stock(const std::vector<Tensor>& tensors,
                                                    const std::vector<Tensor>& base, int64_t models,
                                                    bool by_row, OptTensor dots) {
  const GramLists lists(tensors, models, base, by_row);
  STD_TORCH_CHECK(models > 1 && !base.empty(), "model_stock: expected two models and a base");
  const Tensor gram = empty_like(
      tensors[0], std::vector<int64_t>{lists.rows.total(), models, models}, ScalarType::Double);
  std::vector<Tensor> out;
  for (int64_t l = 0; l < lists.length; ++l)
    out.push_back(empty_like(tensors[l], sizes_of(tensors[l]), scalar_type_of(lists.promoted(l))));
  OptTensor known;
  if (dots.has_value()) {
    STD_TORCH_CHECK(dots->scalar_type() == ScalarType::Double && dots->dim() == 3 &&
                        dots->size(0) == lists.rows.total() && dots->size(1) == models &&
                        dots->size(2) == models,
                    "model_stock: expected ", lists.rows.total(), " float64 matrices of dots");
    known = dense(*dots);
  }
  Stock(lists, out, static_cast<double*>(gram.mutable_data_ptr()))
      .run(known.has_value() ? static_cast<const double*>(known->const_data_ptr()) : nullptr);
  return {out, gram};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) { m.impl("model_stock", TORCH_BOX(&model_stock)); }

}  // namespace solera
#endif  // SOLERA_FRONT
