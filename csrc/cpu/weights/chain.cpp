// A chain of disjoint 2x2 blocks on the columns of x, forward and backward.
//
// Level l holds the pairs (i, i + 2^l) of columns for i a multiple of 2^(l+1): floor(n_l / 2) pairs
// of the n_l = ceil(d / 2^l) columns that are multiples of 2^l, d - 1 in all. Of each pair only the
// first column appears in later levels. A row is therefore a tree: level l takes the elements of
// its row apart into pairs (2k, 2k+1), the first of each goes down to level l + 1, the second waits
// in its slot until the row is put together again on the way up.
//
//   natural order:   blocks on the way down, then y = row * scale
//   reversed order:  x * scale, then blocks on the way up
//
// Backward keeps x alone and derives the activations of all levels again, in L1: for a rotation by
// phi of the pair (a, b), with g its gradient on the side of (a, b),  dphi = a g_b - b g_a;  for a
// block B, dB = g' (a, b)^T with g' the gradient on the other side.
//
// Bytes a row of d elements: forward 2d, backward 3d. 6 flops a rotation, 6d a row each way:
// memory's rate is the floor. The gradients of the parameters are summed over chunks of rows, then
// over the chunks in order (in double): the same bits for any number of threads.
#include "chain_tree.h"

namespace solera {

struct GivensForward {
  const void* x;
  void* y;
  void* work;  // zeroed
  bool streaming;
};
struct GivensBackward {
  const void *dy, *x;
  void* dx;                      // may be null
  void *dcoefficients, *dscale;  // in A, a part for each chunk; may be null
  int64_t rows, chunk_rows;
  void* work;  // zeroed
  bool streaming;
};

struct GivensTable {
  void (*forward[4])(const GivensPlan&, const GivensForward&, int64_t begin, int64_t end);
  void (*backward[4])(const GivensPlan&, const GivensBackward&, int64_t first, int64_t last);
  void (*sum_chunks[2])(const void* partial, void* out, int64_t chunks, int64_t columns,
                        int64_t begin, int64_t end);
};

namespace SOLERA_ISA {
namespace {

template <class T, bool kBlocks, bool kScaled>
void forward_rows(const GivensPlan& p, const GivensForward& f, int64_t begin, int64_t end) {
  const int64_t d = p.columns;
  A<T>*low = (A<T>*)f.work, *built = low + p.low_size(), *high = built + p.low_size();
  const A<T>* root = low + p.low_at(p.levels);
  const A<T>* scale = (const A<T>*)p.scale;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = (const T*)f.x + row * d;
    T* y = (T*)f.y + row * d;
    const bool streaming = f.streaming && can_stream(y);
    const auto keep_second = [&](int64_t slot, AccVec<T> v) { store(high + slot, v); };
    if (p.reversed) {
      down<T>(
          p, low,
          [&](int64_t j) {
            const AccVec<T> v = fetch(x, j, d);
            return kScaled ? v * fetch(scale, j, d) : v;
          },
          [&](int64_t slot, int64_t, Pair<T> v) {
            keep_second(slot, v.second);
            return v.first;
          });
      up<T>(
          p, root, built, [&](int64_t j, AccVec<T> v) { place(y, j, d, v, streaming); },
          [&](int64_t slot, AccVec<T> v) {
            return turned<T, kBlocks, false>(p, slot, {v, load(high + slot)});
          });
    } else {
      down<T>(
          p, low, [&](int64_t j) { return fetch(x, j, d); },
          [&](int64_t slot, int64_t, Pair<T> v) {
            v = turned<T, kBlocks, false>(p, slot, v);
            keep_second(slot, v.second);
            return v.first;
          });
      up<T>(
          p, root, built,
          [&](int64_t j, AccVec<T> v) {
            place(y, j, d, kScaled ? v * fetch(scale, j, d) : v, streaming);
          },
          [&](int64_t slot, AccVec<T> v) { return Pair<T>{v, load(high + slot)}; });
    }
  }
  if (f.streaming) stream_fence();
}
template <class T>
void forward(const GivensPlan& p, const GivensForward& f, int64_t begin, int64_t end) {
  with_flag(p.blocks, [&](auto blocks) {
    with_flag(p.scale != nullptr, [&](auto scaled) {
      forward_rows<T, decltype(blocks)::value, decltype(scaled)::value>(p, f, begin, end);
    });
  });
}

// The pair (a, b) went in; `in` is its gradient, `out` the gradient of what came out.
template <class T, bool kBlocks>
SOLERA_INLINE void add_gradient(const GivensPlan& p, A<T>* sums, int64_t slot, Pair<T> v,
                                Pair<T> in, Pair<T> out) {
  A<T>* to = sums + slot;
  const auto add = [&](A<T>* at, AccVec<T> term) { store(at, load(at) + term); };
  if (kBlocks) {
    add(to, out.first * v.first);
    add(to + p.slots, out.first * v.second);
    add(to + 2 * p.slots, out.second * v.first);
    add(to + 3 * p.slots, out.second * v.second);
  } else {
    add(to, v.first * in.second - v.second * in.first);
  }
}

// Where a row's numbers lie between the levels.
template <class T>
struct Work {
  A<T>*low, *built, *gradient, *other, *first, *second, *waiting;
  Work(const GivensPlan& p, void* work) {
    low = (A<T>*)work;
    built = low + p.low_size();
    gradient = built + p.low_size();
    other = gradient + p.low_size();
    first = other + p.low_size();
    second = first + p.slots;
    waiting = second + p.slots;
  }
};

template <class T, bool kBlocks, bool kScaled>
SOLERA_INLINE void natural_row(const GivensPlan& p, const Work<T>& w, const T* dy, const T* x,
                               T* dx, A<T>* sums, A<T>* dscale, bool streaming) {
  const int64_t d = p.columns;
  const A<T>* scale = (const A<T>*)p.scale;
  if (sums || dscale)
    down<T>(
        p, w.low, [&](int64_t j) { return fetch(x, j, d); },
        [&](int64_t slot, int64_t, Pair<T> v) {
          store(w.first + slot, v.first);
          store(w.second + slot, v.second);
          v = turned<T, kBlocks, false>(p, slot, v);
          if (kScaled) store(w.waiting + slot, v.second);
          return v.first;
        });
  if (kScaled && dscale)
    up<T>(
        p, w.low + p.low_at(p.levels), w.built,
        [&](int64_t j, AccVec<T> v) {
          place(dscale, j, d, fetch(dscale, j, d) + v * fetch(dy, j, d), false);
        },
        [&](int64_t slot, AccVec<T> v) { return Pair<T>{v, load(w.waiting + slot)}; });
  down<T>(
      p, w.gradient,
      [&](int64_t j) {
        const AccVec<T> g = fetch(dy, j, d);
        return kScaled ? g * fetch(scale, j, d) : g;
      },
      [&](int64_t slot, int64_t, Pair<T> g) {
        store(w.waiting + slot, g.second);
        return g.first;
      });
  up<T>(
      p, w.gradient + p.low_at(p.levels), w.other,
      [&](int64_t j, AccVec<T> v) {
        if (dx) place(dx, j, d, v, streaming);
      },
      [&](int64_t slot, AccVec<T> g) {
        const Pair<T> out{g, load(w.waiting + slot)};
        const Pair<T> in = turned<T, kBlocks, true>(p, slot, out);
        if (sums)
          add_gradient<T, kBlocks>(p, sums, slot, {load(w.first + slot), load(w.second + slot)}, in,
                                   out);
        return in;
      });
}

template <class T, bool kBlocks, bool kScaled>
SOLERA_INLINE void reversed_row(const GivensPlan& p, const Work<T>& w, const T* dy, const T* x,
                                T* dx, A<T>* sums, A<T>* dscale, bool streaming) {
  const int64_t d = p.columns;
  const A<T>* scale = (const A<T>*)p.scale;
  if (sums) {
    down<T>(
        p, w.low,
        [&](int64_t j) {
          const AccVec<T> v = fetch(x, j, d);
          return kScaled ? v * fetch(scale, j, d) : v;
        },
        [&](int64_t slot, int64_t, Pair<T> v) {
          store(w.second + slot, v.second);
          return v.first;
        });
    up<T>(
        p, w.low + p.low_at(p.levels), w.built, [](int64_t, AccVec<T>) {},
        [&](int64_t slot, AccVec<T> v) {
          return turned<T, kBlocks, false>(p, slot, {v, load(w.second + slot)});
        });
  }
  down<T>(
      p, w.gradient, [&](int64_t j) { return fetch(dy, j, d); },
      [&](int64_t slot, int64_t below, Pair<T> out) {
        const Pair<T> in = turned<T, kBlocks, true>(p, slot, out);
        if (sums)
          add_gradient<T, kBlocks>(p, sums, slot, {load(w.built + below), load(w.second + slot)},
                                   in, out);
        store(w.waiting + slot, in.second);
        return in.first;
      });
  up<T>(
      p, w.gradient + p.low_at(p.levels), w.other,
      [&](int64_t j, AccVec<T> g) {
        if (kScaled && dscale) place(dscale, j, d, fetch(dscale, j, d) + g * fetch(x, j, d), false);
        if (dx) place(dx, j, d, kScaled ? g * fetch(scale, j, d) : g, streaming);
      },
      [&](int64_t slot, AccVec<T> g) { return Pair<T>{g, load(w.waiting + slot)}; });
}

template <class T, bool kBlocks, bool kScaled>
void backward_chunks(const GivensPlan& p, const GivensBackward& b, int64_t first, int64_t last) {
  const int64_t d = p.columns, width = (kBlocks ? 4 : 1) * p.slots;
  const Work<T> work(p, b.work);
  for (int64_t chunk = first; chunk < last; ++chunk) {
    A<T>* sums = b.dcoefficients ? (A<T>*)b.dcoefficients + chunk * width : nullptr;
    A<T>* dscale = b.dscale ? (A<T>*)b.dscale + chunk * d : nullptr;
    if (sums) memset((void*)sums, 0, size_t(width) * sizeof(A<T>));
    if (dscale) memset((void*)dscale, 0, size_t(d) * sizeof(A<T>));
    const int64_t begin = chunk * b.chunk_rows;
    const int64_t end = begin + b.chunk_rows < b.rows ? begin + b.chunk_rows : b.rows;
    for (int64_t row = begin; row < end; ++row) {
      const T* dy = (const T*)b.dy + row * d;
      const T* x = (const T*)b.x + row * d;
      T* dx = b.dx ? (T*)b.dx + row * d : nullptr;
      const bool streaming = b.streaming && can_stream(dx);
      if (p.reversed)
        reversed_row<T, kBlocks, kScaled>(p, work, dy, x, dx, sums, dscale, streaming);
      else
        natural_row<T, kBlocks, kScaled>(p, work, dy, x, dx, sums, dscale, streaming);
    }
  }
  if (b.streaming) stream_fence();
}
template <class T>
void backward(const GivensPlan& p, const GivensBackward& b, int64_t first, int64_t last) {
  with_flag(p.blocks, [&](auto blocks) {
    with_flag(p.scale != nullptr, [&](auto scaled) {
      backward_chunks<T, decltype(blocks)::value, decltype(scaled)::value>(p, b, first, last);
    });
  });
}

}  // namespace

extern const GivensTable givens_table;
const GivensTable givens_table = {
    {forward<float>, forward<double>, forward<bf16>, forward<f16>},
    {backward<float>, backward<double>, backward<bf16>, backward<f16>},
    {sum_chunks<float>, sum_chunks<double>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include <algorithm>

#include "../parallel.h"

namespace solera {

SOLERA_PICK(GivensTable, givens_table)

namespace {

constexpr int64_t kStreamBytes = int64_t(16) << 20;

// The plan of a call: the levels, and the coefficients in their slots.
struct Givens : GivensPlan {
  Tensor x, padded, scale_row;
  Dtype dtype;
  ScalarType acc;
  int64_t rows;

  Givens(const Tensor& x_in, const Tensor& c_in, const OptTensor& scale_in, bool reverse)
      : GivensPlan{} {
    STD_TORCH_CHECK(x_in.dim() == 2 && x_in.size(1) > 0, "solera: x: expected (N, d) with d > 0");
    x = dense(x_in);
    dtype = dtype_of(x);
    acc = accumulate_type(x);
    rows = x.size(0);
    columns = x.size(1);
    reversed = reverse;
    STD_TORCH_CHECK(c_in.dim() == 2 && (c_in.size(0) == 2 || c_in.size(0) == 4) &&
                        c_in.size(1) == columns - 1 && c_in.scalar_type() == acc,
                    "solera: coefficients do not fit x");
    blocks = c_in.size(0) == 4;
    for (int64_t n = columns; n > 1; n = (n + 1) / 2) {
      const int64_t pairs = (n + 1) / 2;
      first[levels + 1] = first[levels] + (pairs + kGivensPad - 1) / kGivensPad * kGivensPad;
      ++levels;
    }
    slots = first[levels];
    const int64_t table[] = {c_in.size(0), slots};
    padded = empty_like(x, Sizes(table, 2), acc);
    const Tensor c = dense(c_in);
    for (int64_t r = 0; r < table[0]; ++r) {
      const double identity = r == 0 || (blocks && r == 3) ? 1 : 0;
      if (acc == ScalarType::Double)
        lay_out<double>(c, r, identity);
      else
        lay_out<float>(c, r, float(identity));
    }
    coefficients = padded.const_data_ptr();
    if (!scale_in.has_value()) return;
    STD_TORCH_CHECK(
        scale_in->dim() == 1 && scale_in->size(0) == columns && scale_in->scalar_type() == acc,
        "solera: scale does not fit x");
    scale_row = dense(*scale_in);
    scale = scale_row.const_data_ptr();
  }
  int64_t pairs(int level) const { return ((columns + (int64_t(1) << level) - 1) >> level) / 2; }
  bool streaming() const { return rows * columns * int64_t(x.element_size()) >= kStreamBytes; }
  int64_t row_bytes() const { return columns * int64_t(x.element_size()); }

  // The gradients of slots as (1 or 4, d - 1).
  Tensor compact(const Tensor& sums) const {
    const int64_t shape[] = {blocks ? 4 : 1, columns - 1};
    Tensor out = empty_like(x, Sizes(shape, 2), acc);
    const size_t size = out.element_size();
    const char* from = static_cast<const char*>(sums.const_data_ptr());
    char* to = static_cast<char*>(out.mutable_data_ptr());
    for (int64_t r = 0; r < shape[0]; ++r)
      for (int l = 0; l < levels; ++l) {
        std::memcpy(to, from + (r * slots + first[l]) * size, size_t(pairs(l)) * size);
        to += size_t(pairs(l)) * size;
      }
    return out;
  }

 private:
  template <class A>
  void lay_out(const Tensor& c, int64_t r, A identity) {
    const A* from = static_cast<const A*>(c.const_data_ptr()) + r * (columns - 1);
    A* to = static_cast<A*>(padded.mutable_data_ptr()) + r * slots;
    std::fill(to, to + slots, identity);
    for (int l = 0; l < levels; from += pairs(l), ++l)
      std::copy(from, from + pairs(l), to + first[l]);
  }
};

// Zeroed memory of a task, on a cache line's border.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : memory_(new char[bytes + 64]()) {}
  void* data() const {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) &
                                   ~uintptr_t(63));
  }

 private:
  std::unique_ptr<char[]> memory_;
};

Tensor givens_chain(const Tensor& x, const Tensor& coefficients, OptTensor scale, bool reverse) {
  const Givens p(x, coefficients, scale, reverse);
  Tensor y = empty_like(x, x.sizes());
  const auto kernel = pick_givens_table().forward[p.dtype];
  const size_t bytes = size_t(2 * p.low_size() + p.slots) * p.padded.element_size();
  parallel_for(0, p.rows, grain_for(p.row_bytes()), [&](int64_t begin, int64_t end) {
    const Scratch scratch(bytes);
    kernel(p, {p.x.const_data_ptr(), y.mutable_data_ptr(), scratch.data(), p.streaming()}, begin,
           end);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> givens_chain_backward(const Tensor& dy_in, const Tensor& x,
                                                         const Tensor& coefficients,
                                                         OptTensor scale, bool reverse, bool need_x,
                                                         bool need_coefficients, bool need_scale) {
  const Givens p(x, coefficients, scale, reverse);
  const Tensor dy = dense(dy_in);
  STD_TORCH_CHECK(dy.dim() == 2 && dy.size(0) == p.rows && dy.size(1) == p.columns &&
                      dy.scalar_type() == p.x.scalar_type(),
                  "solera: the gradient does not fit x");
  need_scale = need_scale && scale.has_value();
  const int64_t spread = (p.rows + 15) / 16;
  const int64_t chunk_rows = std::max<int64_t>(4, std::min<int64_t>(64, spread));
  const int64_t chunks = (p.rows + chunk_rows - 1) / chunk_rows;
  const int64_t width = (p.blocks ? 4 : 1) * p.slots;
  const int64_t none[] = {0}, parts[] = {chunks, width}, scale_parts[] = {chunks, p.columns};
  const Sizes empty(none, 1), one(parts + 1, 1), row(scale_parts + 1, 1);
  Tensor dx = empty_like(p.x, need_x ? p.x.sizes() : empty);
  Tensor sums = empty_like(p.x, need_coefficients ? Sizes(parts, 2) : empty, p.acc);
  Tensor scale_sums = empty_like(p.x, need_scale ? Sizes(scale_parts, 2) : empty, p.acc);
  const auto& table = pick_givens_table();
  const auto kernel = table.backward[p.dtype];
  const size_t bytes = size_t(4 * p.low_size() + 3 * p.slots) * p.padded.element_size();
  parallel_for(0, chunks, grain_for(p.row_bytes() * chunk_rows), [&](int64_t begin, int64_t end) {
    const Scratch scratch(bytes);
    GivensBackward b{dy.const_data_ptr(),
                     p.x.const_data_ptr(),
                     need_x ? dx.mutable_data_ptr() : nullptr,
                     need_coefficients ? sums.mutable_data_ptr() : nullptr,
                     need_scale ? scale_sums.mutable_data_ptr() : nullptr,
                     p.rows,
                     chunk_rows,
                     scratch.data(),
                     need_x && p.streaming()};
    kernel(p, b, begin, end);
  });
  const auto sum = table.sum_chunks[p.acc == ScalarType::Double];
  const auto finish = [&](const Tensor& part, Tensor& out, int64_t count) {
    parallel_for(0, count, grain_for(chunks * 4), [&](int64_t begin, int64_t end) {
      sum(part.const_data_ptr(), out.mutable_data_ptr(), chunks, count, begin, end);
    });
  };
  Tensor dcoefficients = empty_like(p.x, empty, p.acc);
  if (need_coefficients) {
    Tensor total = empty_like(p.x, one, p.acc);
    finish(sums, total, width);
    dcoefficients = p.compact(total);
  }
  Tensor dscale = empty_like(p.x, need_scale ? row : empty, p.acc);
  if (need_scale) finish(scale_sums, dscale, p.columns);
  return {dx, dcoefficients, dscale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("givens_chain", TORCH_BOX(&givens_chain));
  m.impl("givens_chain_backward", TORCH_BOX(&givens_chain_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
