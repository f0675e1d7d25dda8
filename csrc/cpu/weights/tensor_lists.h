// Lists of tensors walked as one range of chunks, so that a thousand small tensors cost one
// parallel region. Included only under SOLERA_FRONT.
#pragma once

#include "../parallel.h"

namespace solera {

// A chunk is a fixed number of elements counted from its tensor's start: what is computed for it
// does not depend on the other tensors of the list or on the thread count.
constexpr int64_t kListChunk = 16384;

class TensorChunks {
 public:
  explicit TensorChunks(size_t tensors) {
    sizes_.reserve(tensors);
    first_.reserve(tensors + 1);
    first_.push_back(0);
  }
  void add(int64_t elements) {
    elements_ += elements;
    sizes_.push_back(elements);
    first_.push_back(first_.back() + (elements + kListChunk - 1) / kListChunk);
  }
  int64_t total() const { return first_.back(); }
  int64_t first(size_t tensor) const { return first_[tensor]; }

  // Calls body(tensor, offset, count, chunk) for every chunk in [begin, end).
  template <class F>
  void each(int64_t begin, int64_t end, const F& body) const {
    size_t low = 0, high = sizes_.size();  // the last tensor that starts at or before `begin`
    while (high - low > 1) {
      const size_t middle = (low + high) / 2;
      (first_[middle] <= begin ? low : high) = middle;
    }
    for (size_t tensor = low; begin < end; ++begin) {
      while (begin >= first_[tensor + 1]) ++tensor;
      const int64_t offset = (begin - first_[tensor]) * kListChunk;
      const int64_t left = sizes_[tensor] - offset;
      body(tensor, offset, left < kListChunk ? left : kListChunk, begin);
    }
  }

  // The same over all chunks, in parallel; bytes is what one full chunk touches. Small tensors make
  // small chunks: a task takes as many as come to 64 KiB.
  template <class F>
  void parallel(int64_t bytes, const F& body) const {
    if (total() == 0) return;
    const int64_t mean =
        int64_t(double(bytes) * double(elements_) / (double(kListChunk) * double(total())));
    const int64_t grain = 1 + 65536 / (mean + 1);
    if (total() <= grain) return each(0, total(), body);
    parallel_for(0, total(), grain, [&](int64_t begin, int64_t end) { each(begin, end, body); });
  }

 private:
  int64_t elements_ = 0;
  std::vector<int64_t> sizes_, first_;
};

// The rows of a list of tensors as one list: those along the first dimension, or (by_row = false)
// each tensor as one row.
class WeightRows {
 public:
  WeightRows(const std::vector<Tensor>& tensors, bool by_row) : chunks_(tensors.size()) {
    first_.push_back(0);
    for (const Tensor& t : tensors) {
      const int64_t rows = by_row ? t.size(0) : 1;
      lengths_.push_back(rows == 0 ? 0 : t.numel() / rows);
      first_.push_back(first_.back() + rows);
      for (int64_t row = 0; row < rows; ++row) chunks_.add(lengths_.back());
    }
  }
  struct Place {
    int64_t tensor, start;  // the element that the row begins at
  };
  Place find(int64_t row) const {
    size_t low = 0, high = lengths_.size();
    while (high - low > 1) {
      const size_t middle = (low + high) / 2;
      (first_[middle] <= row ? low : high) = middle;
    }
    while (row >= first_[low + 1]) ++low;
    return {int64_t(low), (row - first_[low]) * lengths_[low]};
  }
  int64_t total() const { return first_.back(); }
  int64_t count(int64_t tensor) const { return first_[tensor + 1] - first_[tensor]; }
  int64_t length(int64_t tensor) const { return lengths_[tensor]; }
  const TensorChunks& chunks() const { return chunks_; }

 private:
  TensorChunks chunks_;
  std::vector<int64_t> lengths_, first_;
};

}  // namespace solera
