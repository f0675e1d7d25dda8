// Prompt scores: products on tiles, folded into their rows' maxima; the formulas are in
// python/solera/ensemble/prompts.py.
//
// Operations: 2 N P C D, the product; beside it two loads, an addition and a maximum a vector of
// logits. Bytes: texts once for every kRows images, images once for every tile of classes; a tile
// of logits (kRows x up to kColumns) stays in the caches. 1,024 rows: a tile's product repacks its
// texts, which 256 rows pay with a tenth of the time, 1,024 with a fiftieth.
//
// Tiles have one shape whatever the thread count and their partial sums are added in order: same
// bits for any number of threads.
#include "../strips.h"
#include "tiles.h"

namespace solera {

// Rows of logits folded into running maxima (A) and, where asked for, their columns.
struct PromptFold {
  const void* tile;
  const void* bias;  // A, or null
  void* best;        // A, one a row
  int64_t* choice;   // or null
  int64_t stride, rows, columns, offset;
};

struct PromptTable {
  void (*fold[2])(const PromptFold&);  // by the type of logits: float, double
  // to (A) += factor * row; by the Dtype of row
  void (*add[4])(const void* row, void* to, double factor, int64_t n);
  void (*round[4])(const void* from, void* to, int64_t n);  // A -> storage
};

namespace SOLERA_ISA {
namespace {

template <class Real>
void prompt_fold(const PromptFold& p) {
  constexpr int L = kLanes<Real>;
  typedef AccVec<Real> V;
  const Real* bias = (const Real*)p.bias;
  for (int64_t row = 0; row < p.rows; ++row) {
    const Real* x = (const Real*)p.tile + row * p.stride;
    const V least = splat(Real(-__builtin_inf()));
    V m[4] = {least, least, least, least}, wrong{};
    const auto value = [&](int64_t j, int n) {
      return bias ? get(x + j, n) + get(bias + j, n) : get(x + j, n);
    };
    int64_t j = 0;
    for (; j + 4 * L <= p.columns; j += 4 * L)
      for (int k = 0; k < 4; ++k) {
        const V v = value(j + k * L, L);
        wrong += v == v ? V{} : splat(Real(1));
        m[k] = vmax(v, m[k]);
      }
    for (; j < p.columns; j += L) {
      const int n = int(p.columns - j < L ? p.columns - j : L);
      V v = value(j, n);
      for (int i = n; i < L; ++i) v[i] = least[0];
      wrong += v == v ? V{} : splat(Real(1));
      m[0] = vmax(v, m[0]);
    }
    Real best = lane_max(vmax(vmax(m[0], m[1]), vmax(m[2], m[3])));
    if (lane_sum(wrong) != 0) best = Real(__builtin_nan(""));
    Real* held = (Real*)p.best + row;
    if (!(best > *held) && best == best) continue;
    *held = *held == *held ? best : *held;
    if (!p.choice || best != best) continue;
    for (j = 0; j < p.columns; ++j) {
      const Real v = get(x + j, 1)[0];
      if ((bias ? v + bias[j] : v) == best) break;
    }
    p.choice[row] = p.offset + (j < p.columns ? j : 0);
  }
}

template <class T>
void prompt_add(const void* row, void* to, double factor, int64_t n) {
  const A<T> f = A<T>(factor);
  A<T>* sum = (A<T>*)to;
  strips<kLanes<T>>(n, [&](int64_t j, int c) {
    put(sum + j, get(sum + j, c) + get((const T*)row + j, c) * f, c);
  });
}
template <class T>
void prompt_round(const void* from, void* to, int64_t n) {
  strips<kLanes<T>>(n,
                    [&](int64_t j, int c) { put((T*)to + j, get((const A<T>*)from + j, c), c); });
}

}  // namespace

extern const PromptTable prompt_table;
const PromptTable prompt_table = {
    {prompt_fold<float>, prompt_fold<double>},
    {prompt_add<float>, prompt_add<double>, prompt_add<bf16>, prompt_add<f16>},
    {prompt_round<float>, prompt_round<double>, prompt_round<bf16>, prompt_round<f16>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include <algorithm>
#include <limits>

namespace solera {

SOLERA_PICK(PromptTable, prompt_table)

namespace {

using ensemble::ceil_div;
using ensemble::Engine;
using ensemble::Matrix;

constexpr int64_t kRows = 1024, kColumns = 1024;

struct Prompts {
  Tensor images, texts, bias;
  int64_t rows, inner, count, classes;
  bool biased;
  Prompts(const Tensor& x, const Tensor& t, const OptTensor& b)
      : images(dense(x)), texts(dense(t)), biased(b.has_value()) {
    STD_TORCH_CHECK(
        x.dim() == 2 && t.dim() == 3 && t.size(2) == x.size(1) &&
            t.scalar_type() == x.scalar_type() && x.size(0) > 0 && t.size(1) > 0,
        "solera: images (N, D) and texts (P, C, D) must go together and hold something");
    rows = x.size(0);
    inner = x.size(1);
    count = t.size(0);
    classes = t.size(1);
    if (!biased) return;
    STD_TORCH_CHECK(b->dim() == 2 && b->size(0) == count && b->size(1) == classes,
                    "solera: bias must be (P, C)");
    bias = ensemble::as(*b, accumulate_type(x));
  }
};

// One tile of images against one group of prompts: several small ones, or the classes of one in
// blocks. `sums` receives each prompt's sum of maxima.
class PromptTile {
 public:
  PromptTile(const Prompts& in, const Engine& e)
      : in_(in),
        e_(e),
        fold_(pick_prompt_table().fold[e.real == ScalarType::Double]),
        group(std::max<int64_t>(1, kColumns / in.classes)),
        block(ceil_div(in.classes, ceil_div(in.classes, kColumns))),
        wide_(std::min(group, in.count) * block),
        rows_(std::min(kRows, in.rows)),
        logits_(e.scratch(in.images, rows_ * wide_, true)),
        x_(e.scratch(in.images, e.stored_as_tile ? 0 : rows_ * in.inner)),
        t_(e.scratch(in.images, e.stored_as_tile ? 0 : wide_ * in.inner)),
        best_(e.scratch(in.images, rows_, true)) {}

  void run(int64_t tile, int64_t first, double* sums, int64_t* choice) {
    const int64_t row = tile * kRows, rows = std::min(kRows, in_.rows - row);
    const int64_t prompts = std::min(group, in_.count - first);
    const Matrix x = stored(in_.images, x_, row, rows);
    if (group > 1) {
      multiply(x, stored(in_.texts, t_, first * in_.classes, prompts * in_.classes));
      for (int64_t p = 0; p < prompts; ++p) {
        clear(rows);
        fold(rows, p * in_.classes, prompts * in_.classes, first + p, 0, in_.classes,
             at(choice, first + p, row));
        sums[p] = total(rows);
      }
      return;
    }
    clear(rows);
    for (int64_t c = 0; c < in_.classes; c += block) {
      const int64_t columns = std::min(block, in_.classes - c);
      multiply(x, stored(in_.texts, t_, first * in_.classes + c, columns));
      fold(rows, 0, columns, first, c, columns, at(choice, first, row));
    }
    sums[0] = total(rows);
  }

 private:
  const Prompts& in_;
  const Engine& e_;
  void (*fold_)(const PromptFold&);

 public:
  const int64_t group, block;

 private:
  const int64_t wide_, rows_;
  Tensor logits_, x_, t_, best_;

  int64_t* at(int64_t* choice, int64_t prompt, int64_t row) const {
    return choice ? choice + prompt * in_.rows + row : nullptr;
  }
  // Rows [first, first + n) as the products take them.
  Matrix stored(const Tensor& t, Tensor& widened, int64_t first, int64_t n) const {
    const void* data = e_.at_stored(t.const_data_ptr(), first * in_.inner);
    if (!e_.stored_as_tile) {
      e_.run.widen(data, widened.mutable_data_ptr(), n * in_.inner);
      data = widened.const_data_ptr();
    }
    return {data, n, in_.inner, in_.inner, 1};
  }
  void multiply(const Matrix& x, const Matrix& t) {
    e_.accumulate(logits_.mutable_data_ptr(), x, {t.data, t.columns, t.rows, 1, t.row_step}, true,
                  nullptr);
  }
  void clear(int64_t rows) {
    each([&](auto* best) {
      using Real = std::remove_reference_t<decltype(*best)>;
      std::fill(best, best + rows, -std::numeric_limits<Real>::infinity());
    });
  }
  double total(int64_t rows) {
    double sum = 0;
    each([&](auto* best) {
      for (int64_t i = 0; i < rows; ++i) sum += double(best[i]);
    });
    return sum;
  }
  template <class F>
  void each(const F& f) {
    if (e_.real == ScalarType::Double)
      f(static_cast<double*>(best_.mutable_data_ptr()));
    else
      f(static_cast<float*>(best_.mutable_data_ptr()));
  }
  void fold(int64_t rows, int64_t column, int64_t stride, int64_t prompt, int64_t offset,
            int64_t columns, int64_t* choice) {
    const int64_t from = prompt * in_.classes + offset;
    PromptFold p{e_.at_real(logits_.mutable_data_ptr(), column),
                 nullptr,
                 best_.mutable_data_ptr(),
                 choice,
                 stride,
                 rows,
                 columns,
                 offset};
    if (in_.biased)
      p.bias = static_cast<const char*>(in_.bias.const_data_ptr()) + from * e_.real_size;
    fold_(p);
  }
};

Tensor run_scores(const Prompts& in, int64_t* choice) {
  // Logits stay in float32: one rounded would lose ties that its maximum decides.
  const Engine e(in.images, ensemble::bfloat16_sums(in.inner));
  Tensor scores = empty_like(in.images, {in.count}, e.real);
  const int64_t tiles = ceil_div(in.rows, kRows);
  std::vector<double> parts(size_t(tiles * in.count));
  const int64_t group = std::max<int64_t>(1, kColumns / in.classes);
  const int64_t groups = ceil_div(in.count, group);
  parallel_for(0, groups * tiles, 1, [&](int64_t begin, int64_t end) {
    PromptTile tile(in, e);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / tiles * group, t = task % tiles;
      tile.run(t, first, parts.data() + t * in.count + first, choice);
    }
  });
  for (int64_t p = 0; p < in.count; ++p) {
    double sum = 0;
    for (int64_t t = 0; t < tiles; ++t) sum += parts[size_t(t * in.count + p)];
    if (e.real == ScalarType::Double)
      static_cast<double*>(scores.mutable_data_ptr())[p] = sum / double(in.rows);
    else
      static_cast<float*>(scores.mutable_data_ptr())[p] = float(sum / double(in.rows));
  }
  return scores;
}

// A sum of scaled rows, 32 at a time before they join it: its rounding grows with the root of their
// number's root.
class RowSum {
 public:
  RowSum(const Tensor& like, int64_t n)
      : n_(n),
        add_(pick_prompt_table().add[dtype_of(like)]),
        join_(pick_prompt_table().add[dtype_of(like) == kFloat64 ? kFloat64 : kFloat32]),
        round_(pick_prompt_table().round[dtype_of(like)]),
        part_(empty_like(like, {n}, accumulate_type(like))),
        total_(empty_like(like, {n}, accumulate_type(like))) {}
  void clear() {
    zero(part_);
    zero(total_);
    held_ = 0;
  }
  void add(const void* row, double factor) {
    add_(row, part_.mutable_data_ptr(), factor, n_);
    if (++held_ == 32) join();
  }
  void store(void* to) {
    join();
    round_(total_.const_data_ptr(), to, n_);
  }

 private:
  void zero(Tensor& t) { std::memset(t.mutable_data_ptr(), 0, size_t(n_) * t.element_size()); }
  void join() {
    join_(part_.const_data_ptr(), total_.mutable_data_ptr(), 1.0, n_);
    zero(part_);
    held_ = 0;
  }
  const int64_t n_;
  void (*add_)(const void*, void*, double, int64_t);
  void (*join_)(const void*, void*, double, int64_t);
  void (*round_)(const void*, void*, int64_t);
  Tensor part_, total_;
  int held_ = 0;
};

Tensor prompt_scores(const Tensor& images, const Tensor& texts, OptTensor bias) {
  return run_scores(Prompts(images, texts, bias), nullptr);
}

std::tuple<Tensor, Tensor> prompt_scores_choice(const Tensor& images, const Tensor& texts,
                                                OptTensor bias) {
  const Prompts in(images, texts, bias);
  Tensor choice = empty_like(in.images, {in.count, in.rows}, ScalarType::Long);
  int64_t* to = static_cast<int64_t*>(choice.mutable_data_ptr());
  std::fill(to, to + in.count * in.rows, int64_t(0));
  Tensor scores = run_scores(in, to);
  return {scores, choice};
}

std::tuple<Tensor, Tensor, Tensor> prompt_scores_backward(const Tensor& grad_in,
                                                          const Tensor& images, const Tensor& texts,
                                                          const Tensor& choice_in, bool need_images,
                                                          bool need_texts, bool need_bias) {
  const Prompts in(images, texts, std::nullopt);
  const ScalarType real = accumulate_type(images);
  const Tensor grad = ensemble::as(grad_in, ScalarType::Double), choice = dense(choice_in);
  STD_TORCH_CHECK(grad.numel() == in.count && choice.numel() == in.count * in.rows &&
                      choice.scalar_type() == ScalarType::Long,
                  "solera: grad must be (P,) and choice (P, N)");
  const double* g = static_cast<const double*>(grad.const_data_ptr());
  const int64_t* at = static_cast<const int64_t*>(choice.const_data_ptr());
  for (int64_t k = 0; k < choice.numel(); ++k)
    STD_TORCH_CHECK(at[k] >= 0 && at[k] < in.classes, "solera: choice must hold classes");
  const int64_t size = in.images.element_size(), d = in.inner;
  const auto of = [&](const Tensor& t, int64_t row) {
    return static_cast<const char*>(t.const_data_ptr()) + row * d * size;
  };
  const int64_t none[] = {0};
  Tensor dimages = empty_like(in.images, need_images ? in.images.sizes() : Sizes(none, 1));
  Tensor dtexts = empty_like(in.images, need_texts ? in.texts.sizes() : Sizes(none, 1));
  const int64_t table[] = {in.count, in.classes};
  Tensor dbias = empty_like(in.images, need_bias ? Sizes(table, 2) : Sizes(none, 1), real);
  if (need_images)
    parallel_for(0, in.rows, grain_for(in.count * d * size), [&](int64_t begin, int64_t end) {
      RowSum sum(in.images, d);
      for (int64_t i = begin; i < end; ++i) {
        sum.clear();
        for (int64_t p = 0; p < in.count; ++p)
          sum.add(of(in.texts, p * in.classes + at[p * in.rows + i]), g[p] / double(in.rows));
        sum.store(static_cast<char*>(dimages.mutable_data_ptr()) + i * d * size);
      }
    });
  if (need_texts || need_bias)
    parallel_for(0, in.count, 1, [&](int64_t begin, int64_t end) {
      RowSum sum(in.images, d);
      std::vector<int64_t> first(size_t(in.classes + 1)), order(size_t(in.rows));
      for (int64_t p = begin; p < end; ++p) {
        const double share = g[p] / double(in.rows);
        const int64_t* chosen = at + p * in.rows;
        // Images by class, each class's in their order.
        std::fill(first.begin(), first.end(), 0);
        for (int64_t i = 0; i < in.rows; ++i) ++first[size_t(chosen[i] + 1)];
        for (int64_t c = 0; c < in.classes; ++c) first[size_t(c + 1)] += first[size_t(c)];
        std::vector<int64_t> next(first.begin(), first.end() - 1);
        for (int64_t i = 0; i < in.rows; ++i) order[size_t(next[size_t(chosen[i])]++)] = i;
        for (int64_t c = 0; need_texts && c < in.classes; ++c) {
          sum.clear();
          for (int64_t n = first[size_t(c)]; n < first[size_t(c + 1)]; ++n)
            sum.add(of(in.images, order[size_t(n)]), share);
          sum.store(static_cast<char*>(dtexts.mutable_data_ptr()) +
                    (p * in.classes + c) * d * size);
        }
        for (int64_t c = 0; need_bias && c < in.classes; ++c) {
          const double v = share * double(first[size_t(c + 1)] - first[size_t(c)]);
          if (real == ScalarType::Double)
            static_cast<double*>(dbias.mutable_data_ptr())[p * in.classes + c] = v;
          else
            static_cast<float*>(dbias.mutable_data_ptr())[p * in.classes + c] = float(v);
        }
      }
    });
  return {dimages, dtexts, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("prompt_scores", TORCH_BOX(&prompt_scores));
  m.impl("prompt_scores_choice", TORCH_BOX(&prompt_scores_choice));
  m.impl("prompt_scores_backward", TORCH_BOX(&prompt_scores_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
