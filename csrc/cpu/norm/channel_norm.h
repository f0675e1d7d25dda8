// What the kernels over channels share: the work that channel_norm.cpp's passes are called with.
#pragma once

#include "../simd.h"

namespace solera {

struct ChannelWork {
  const void *x, *dy, *residual;       // (A, M, K); dy and residual may be null
  const void *center, *scale, *shift;  // (A, K) in the accumulator type
  const void *p, *q;                   // (A, K) in the accumulator type
  const int64_t* lengths;              // (A), or null
  void *first, *second;                // outputs; where both are optional, either may be null
  int64_t middle, inner;               // M, K
  int64_t slab, slabs, chunk, chunks;  // elements of M and of K in a piece, and their counts
  int activation;
  bool streaming;
  bool finished;  // moments: the variance, not the sum of squares (only if there is one slab)
  int64_t ahead;  // elements: affine and gradient of rows ask for the operands so much further on
};
// Each pass runs over pieces [begin, end), numbered (a, slab, chunk) with the chunk fastest.
struct ChannelTable {
  typedef void (*Run)(const ChannelWork&, int64_t begin, int64_t end);
  Run moments[4], affine[4], reduce[4], gradient[4];
  void (*fence)();  // after streaming stores, before another thread reads them
  // (A, slabs, K) -> (A, K), over [begin, end) of A
  void (*merge[2])(const ChannelWork&, const void* mean, const void* square, int64_t, int64_t);
  void (*add[2])(const ChannelWork&, const void* dshift, const void* dscale, int64_t, int64_t);
};

namespace SOLERA_ISA {
extern const ChannelTable channel_norm_table;
}

}  // namespace solera

#ifdef SOLERA_FRONT
#include "../parallel.h"

namespace solera {

SOLERA_PICK(ChannelTable, channel_norm_table)

// Outputs past this size do not fit the caches beside their inputs, and are stored past them.
constexpr int64_t kChannelStreamBytes = int64_t(16) << 20;
constexpr int64_t kSlabBytes = int64_t(64) << 10;  // of one slab, which is read twice
constexpr int64_t kAheadBytes = int64_t(384)
                                << 10;  // most that is asked for ahead of its use in L2
constexpr int64_t kSlabRows = 64;       // at least: partial sums are 2 in so many
constexpr int64_t kChunkColumns = 1024;

// A call on x seen as (A, M, K): checked operands, and the cut into pieces.
struct ChannelCall {
  Tensor x;
  Dtype dtype;
  ScalarType acc;
  int64_t outer, items, piece_bytes;
  ChannelWork w{};
  std::vector<Tensor> kept;  // what pointers in w lead to

  ChannelCall(const Tensor& x_in, int64_t A, int64_t M, int64_t K)
      : x(dense(x_in)), dtype(dtype_of(x)), outer(A) {
    acc = dtype == kFloat64 ? ScalarType::Double : ScalarType::Float;
    w.middle = M;
    w.inner = K;
    const int64_t item = int64_t(x.element_size()), row = K * item;
    w.slab = row > 0 ? kSlabBytes / row : 1;
    if (w.slab < kSlabRows) w.slab = kSlabRows;
    w.slabs = M > w.slab ? (M + w.slab - 1) / w.slab : 1;
    w.chunk = kChunkColumns;
    w.chunks = (K + w.chunk - 1) / w.chunk;
    w.finished = w.slabs == 1;
    items = outer * w.slabs * w.chunks;
    piece_bytes = (M < w.slab ? M : w.slab) * (K < w.chunk ? K : w.chunk) * item;
    w.streaming = outer * M * row >= kChannelStreamBytes;
    w.x = x.const_data_ptr();
  }
  const void* keep(Tensor t) {
    kept.push_back(t);
    return t.const_data_ptr();
  }
  void* scratch(Tensor t) {
    kept.push_back(t);
    return t.mutable_data_ptr();
  }
  // A tensor of x's size, in x's dtype.
  const void* data(const Tensor& t) {
    STD_TORCH_CHECK(t.dim() == x.dim(), "solera: dy and residual must have the shape of x");
    for (int64_t i = 0; i < x.dim(); ++i)
      STD_TORCH_CHECK(t.size(i) == x.size(i), "solera: dy and residual must have the shape of x");
    return keep(
        dense(t.scalar_type() == x.scalar_type() ? t : torch::stable::to(t, x.scalar_type())));
  }
  // A tensor in the accumulator type.
  const void* number(const Tensor& t) {
    return keep(dense(t.scalar_type() == acc ? t : torch::stable::to(t, acc)));
  }
  void activation(int64_t code) {
    STD_TORCH_CHECK(code >= 0 && code <= 4, "solera: unknown activation");
    w.activation = int(code);
  }
  // Elements to the next unit of work, if a unit's operands fit L2 beside those of the last.
  int64_t ahead_of(int64_t elements, int64_t unit, int streams) const {
    const int64_t bytes = unit * int64_t(x.element_size()) * (streams + (w.residual ? 1 : 0));
    return w.inner == 1 && bytes <= kAheadBytes ? elements : 0;
  }
  Tensor new_stats(int64_t slabs = 1) const {
    const int64_t size[] = {outer, slabs, w.inner}, flat[] = {outer, w.inner};
    return empty_like(x, slabs == 1 ? Sizes(flat, 2) : Sizes(size, 3), acc);
  }
  Tensor new_data(bool wanted) const {
    const int64_t zero[] = {0};
    return empty_like(x, wanted ? x.sizes() : Sizes(zero, 1));
  }
  void run(ChannelTable::Run kernel, int streams) {
    if (w.inner == 0) return;
    const auto fence = pick_channel_norm_table().fence;
    parallel_for(0, items, grain_for(piece_bytes * streams), [&](int64_t begin, int64_t end) {
      kernel(w, begin, end);
      if (w.streaming) fence();
    });
  }
};

}  // namespace solera
#endif  // SOLERA_FRONT
