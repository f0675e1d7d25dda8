// Distances of lists of parameters from anchors, their gradients, and steps towards them.
//
//   anchor_sums      sum F (x - a)^2 and sum (s - a)^2 of each entry, F weights and s starts or
//   none:
//                    reads each once
//   anchor_gradient  f F (x - a): reads x, a, F, writes the result
//   anchor_step_     x <- x - f F (x - a): the same in place
//
// 8 bytes an element forward and 12 backward in float32 without weights. Sums over tiles of 1024 in
// vector lanes, over tiles and pieces in double, in order.
#include "../norm/grad_tiles.h"

namespace solera {

struct AnchorStream {
  const void* data;
  int dtype;
};
struct AnchorItem {
  AnchorStream x, anchor, weight, start;  // the last two without data where there are none
  void* out;                              // of x's dtype; x itself in place
  double factor;
  bool in_place;
};

struct AnchorTable {
  // Indexed by accumulator: 0 float, 1 double.
  void (*sums[2])(const AnchorItem&, int64_t begin, int64_t end, double* sums);
  void (*step[2])(const AnchorItem&, int64_t begin, int64_t end);
};

namespace SOLERA_ISA {
namespace {

template <class T>
SOLERA_INLINE const T* anchor_tile(const AnchorStream& s, int64_t at, int n, T* tile) {
  return s.data == nullptr ? nullptr : read_tile<T>(s.data, s.dtype, at, n, tile);
}

template <class T>
void sums(const AnchorItem& p, int64_t begin, int64_t end, double* out) {
  T x_tile[kGradTile], a_tile[kGradTile], f_tile[kGradTile], s_tile[kGradTile];
  grad_tiles(begin, end, [&](int64_t at, int n) {
    const T* x = anchor_tile(p.x, at, n, x_tile);
    const T* a = anchor_tile(p.anchor, at, n, a_tile);
    const T* f = anchor_tile(p.weight, at, n, f_tile);
    const T* s = anchor_tile(p.start, at, n, s_tile);
    if (f == nullptr) {
      out[0] += double(row_sum<T>(n, [&](int64_t j, int m) {
        const AccVec<T> d = get(x + j, m) - get(a + j, m);
        return d * d;
      }));
    } else {
      out[0] += double(row_sum<T>(n, [&](int64_t j, int m) {
        const AccVec<T> d = get(x + j, m) - get(a + j, m);
        return get(f + j, m) * d * d;
      }));
    }
    if (s == nullptr) return;
    out[1] += double(row_sum<T>(n, [&](int64_t j, int m) {
      const AccVec<T> d = get(s + j, m) - get(a + j, m);
      return d * d;
    }));
  });
}

template <class T>
void step(const AnchorItem& p, int64_t begin, int64_t end) {
  T x_tile[kGradTile], a_tile[kGradTile], f_tile[kGradTile];
  const T factor = T(p.factor);
  grad_tiles(begin, end, [&](int64_t at, int n) {
    const T* x = anchor_tile(p.x, at, n, x_tile);
    const T* a = anchor_tile(p.anchor, at, n, a_tile);
    const T* f = anchor_tile(p.weight, at, n, f_tile);
    T* out = open_tile<T>(p.out, p.x.dtype, at, x_tile);
    with_flag(f != nullptr, [&](auto weighted) {
      with_flag(p.in_place, [&](auto in_place) {
        strips<kLanes<T>>(n, [&](int64_t j, int m) {
          const AccVec<T> value = get(x + j, m);
          AccVec<T> d = value - get(a + j, m);
          if (decltype(weighted)::value) d = d * get(f + j, m);
          put(out + j, decltype(in_place)::value ? value - factor * d : factor * d, m);
        });
      });
    });
    close_tile<T>(p.out, p.x.dtype, at, n, x_tile);
  });
}

}  // namespace

extern const AnchorTable anchor_table;
const AnchorTable anchor_table = {{sums<float>, sums<double>}, {step<float>, step<double>}};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "../norm/grad_lists.h"

namespace solera {

SOLERA_PICK(AnchorTable, anchor_table)

namespace {

// The lists as the kernels want them.
struct AnchorLists {
  std::vector<GradMemory> memory;
  std::vector<AnchorItem> items;
  std::vector<char> wide;
  GradPieces pieces;
  size_t count, streams = 2;

  AnchorLists(const char* op, const std::vector<Tensor>& parameters,
              const std::vector<Tensor>& anchors, const std::vector<Tensor>& weights,
              const std::vector<Tensor>& starts, bool in_place)
      : count(parameters.size()) {
    const std::vector<Tensor>* lists[] = {&parameters, &anchors, &weights, &starts};
    for (int k = 1; k < 4; ++k)
      STD_TORCH_CHECK(lists[k]->size() == count || (k > 1 && lists[k]->empty()), op,
                      ": expected lists of ", count, " tensors");
    memory.reserve(4 * count);
    items.reserve(count);
    streams += size_t(!weights.empty()) + size_t(!starts.empty());
    for (size_t l = 0; l < count; ++l) {
      AnchorStream found[4] = {};
      bool is_wide = false;
      for (int k = 0; k < 4; ++k) {
        if (lists[k]->empty()) continue;
        const Tensor& t = (*lists[k])[l];
        STD_TORCH_CHECK(same_sizes(t, parameters[l]), op, ": the tensors of entry ", l,
                        " differ in shape");
        memory.emplace_back(t, t.is_contiguous(), in_place && k == 0);
        found[k] = {memory.back().data, memory.back().dtype};
        is_wide = is_wide || found[k].dtype == kFloat64;
      }
      items.push_back(
          {found[0], found[1], found[2], found[3], const_cast<void*>(found[0].data), 0, in_place});
      wide.push_back(is_wide);
      pieces.add(l, parameters[l].numel(), 1);
    }
  }

  void step(const Tensor& factors_in) {
    const bool shared = factors_in.dim() == 0;
    const std::vector<double> factors = grad_numbers(factors_in, shared ? 1 : int64_t(count));
    for (size_t l = 0; l < count; ++l) items[l].factor = factors[shared ? 0 : l];
    const auto& table = pick_anchor_table();
    pieces.parallel(int64_t(4 * streams + 4), [&](const GradPiece& p, size_t) {
      table.step[int(wide[p.item])](items[p.item], p.begin, p.end);
    });
  }
};

Tensor anchor_sums(const std::vector<Tensor>& parameters, const std::vector<Tensor>& anchors,
                   const std::vector<Tensor>& weights, const std::vector<Tensor>& starts) {
  STD_TORCH_CHECK(!parameters.empty(), "anchor_sums: expected at least one tensor");
  AnchorLists lists("anchor_sums", parameters, anchors, weights, starts, false);
  const auto& pieces = lists.pieces.all();
  std::vector<double> partial(2 * pieces.size());
  const auto& table = pick_anchor_table();
  lists.pieces.parallel(int64_t(4 * lists.streams), [&](const GradPiece& p, size_t i) {
    table.sums[int(lists.wide[p.item])](lists.items[p.item], p.begin, p.end, &partial[2 * i]);
  });
  const int64_t sizes[] = {2, int64_t(lists.count)};
  Tensor out = empty_like(parameters[0], Sizes(sizes, 2), ScalarType::Double);
  double* found = static_cast<double*>(out.mutable_data_ptr());
  std::fill(found, found + 2 * lists.count, 0.0);
  for (size_t i = 0; i < pieces.size(); ++i)
    for (size_t k = 0; k < 2; ++k) found[k * lists.count + pieces[i].item] += partial[2 * i + k];
  return out;
}

std::vector<Tensor> anchor_gradient(const std::vector<Tensor>& parameters,
                                    const std::vector<Tensor>& anchors,
                                    const std::vector<Tensor>& weights, const Tensor& factors) {
  AnchorLists lists("anchor_gradient", parameters, anchors, weights, {}, false);
  std::vector<Tensor> out;
  out.reserve(lists.count);
  for (size_t l = 0; l < lists.count; ++l) {
    out.push_back(empty_like(parameters[l], parameters[l].sizes()));
    lists.items[l].out = out.back().mutable_data_ptr();
  }
  lists.step(factors);
  return out;
}

void anchor_step_(const std::vector<Tensor>& parameters, const std::vector<Tensor>& anchors,
                  const std::vector<Tensor>& weights, const Tensor& factors) {
  AnchorLists lists("anchor_step_", parameters, anchors, weights, {}, true);
  lists.step(factors);
  const size_t stride = lists.streams;
  for (size_t l = 0; l < lists.count; ++l) lists.memory[stride * l].put_back(parameters[l]);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("anchor_sums", TORCH_BOX(&anchor_sums));
  m.impl("anchor_gradient", TORCH_BOX(&anchor_gradient));
  m.impl("anchor_step_", TORCH_BOX(&anchor_step_));
}

}  // namespace solera
#endif  // SOLERA_FRONT
