// The loss of a student against an ensemble's mean prediction and its gradients; the formulas are
// in python/solera/ensemble/distillation.py.
//
// Bytes a row of C logits and K teachers: reads (K + 1) C, writes C for the student's gradient and
// K C for the teachers'. A teacher's row is read from memory once; its exponentials are kept in a
// row of scratch (L2) until its sum is known, then added to another one with their weight (while
// the next teacher's row is read): K + 2 exponentials a column.
#include "mixture_rows.h"

namespace solera {

struct DistillRows {
  const void* student;
  int64_t student_stride;
  MixtureMembers teachers;
  const void* weights;                           // (K,)
  void *loss, *dstudent, *dteachers, *dweights;  // gradients may be null
  int64_t row_stride, member_stride;             // of dteachers
  int64_t width;
  double inverse_temperature, scale;
  int kind;
  bool streaming;
};

// A row's columns rounded up to whole vectors of any instruction set.
inline int64_t distill_columns(int64_t width) { return (width + 15) / 16 * 16; }

struct DistillTable {
  void (*rows[4])(const DistillRows&, void* scratch, int64_t begin, int64_t end);
  void (*scale[4])(void* x, int64_t width, double factor);
};

namespace SOLERA_ISA {
namespace {

// What a row of weights q leaves behind: its exponentials e in scratch with each block's maximum,
// their sum, and the mean of the student's values under it.
template <class T>
struct Target {
  RowSum<T> sum;
  A<T> mean;
};

// A row's exponentials as add_block has them, with the student's values summed under them; for each
// block the top that its e is relative to.
template <class T, bool kKeep, class V, class S, class M = InCache>
SOLERA_INLINE Target<T> scan_target(int64_t width, const V& value, const S& student, A<T>* e,
                                    A<T>* tops, const M& ahead = M()) {
  constexpr int L = kLanes<T>;
  const A<T> lowest = lowest_of(A<T>());
  Target<T> out;
  A<T> weighted = 0;
  int64_t block = 0;
  logit_blocks(width, [&](int64_t first, int64_t count) {
    if (out.sum.top == lowest)
      out.sum.raise(
          row_max<T>(count, lowest, [&](int64_t j, int n) { return value(first + j, n); }));
    for (;;) {
      const A<T> top = out.sum.top;
      AccVec<T> w0{}, w1{}, s0{}, s1{}, m0 = splat(lowest), m1 = m0;
      const auto add = [&](int64_t j, int n, AccVec<T>& s, AccVec<T>& w, AccVec<T>& m) {
        const AccVec<T> v = value(j, n), x = keep_or<T>(natural_exp(v - top), n, 0);
        if (kKeep) deposit(e + j, x, n);
        s += x;
        w += x > 0 ? x * student(j, n) : AccVec<T>{};
        m = vmax(m, keep_or<T>(v, n, lowest));
      };
      int64_t j = first;
      for (; j + 4 * L <= first + count; j += 4 * L) {
        ahead(j, 4 * L);
        add(j, L, s0, w0, m0);
        add(j + L, L, s1, w1, m1);
        add(j + 2 * L, L, s0, w0, m0);
        add(j + 3 * L, L, s1, w1, m1);
      }
      for (; j + L <= first + count; j += L) add(j, L, s0, w0, m0);
      if (j < first + count) add(j, int(first + count - j), s1, w1, m1);
      const A<T> here = lane_top(vmax(m0, m1));
      if (out.sum.fits(here)) {
        out.sum.sum += lane_sum(s0 + s1);
        weighted += lane_sum(w0 + w1);
        break;
      }
      weighted *= out.sum.raise(here);
    }
    if (kKeep) tops[block++] = out.sum.top;
  });
  out.mean = weighted / out.sum.sum;
  return out;
}

// Calls body(first, count, factor) with factor * e the softmax of the block.
template <class T, class F>
SOLERA_INLINE void each_block(int64_t width, const Target<T>& t, const A<T>* tops, const F& body) {
  int64_t block = 0;
  logit_blocks(width, [&](int64_t first, int64_t count) {
    body(first, count, natural_exp_one(tops[block++] - t.sum.top) / t.sum.sum);
  });
}

// A teacher's row of exponentials in whole vectors, not yet merged into the mean prediction.
template <class T>
struct Unmerged {
  A<T>*e, *tops;
  RowSum<T> sum;
  A<T> weight = 0;
  SOLERA_INLINE A<T> factor(int64_t first) const {
    const A<T> top = tops[first / kLogitBlock];
    return weight * (top == sum.top ? A<T>(1) : natural_exp_one(top - sum.top)) / sum.sum;
  }
};

// Adds a block of one or two teachers to q (or sets it): two at a time halve the traffic of q.
template <class T>
SOLERA_INLINE void merge_block(const Unmerged<T>* teachers, int64_t of, int64_t first,
                               int64_t count, A<T>* q, bool set) {
  constexpr int L = kLanes<A<T>>;
  const A<T>*e0 = teachers[0].e + first, *e1 = teachers[of - 1].e + first;
  const A<T> f0 = teachers[0].factor(first), f1 = of > 1 ? teachers[1].factor(first) : A<T>(0);
  if (set)
    for (int64_t j = 0; j < count; j += L) store(q + j, load(e0 + j) * f0 + load(e1 + j) * f1);
  else
    for (int64_t j = 0; j < count; j += L)
      store(q + j, load(e0 + j) * f0 + (load(e1 + j) * f1 + load(q + j)));
}

// Where no teacher's own mean is wanted: calls done(first, count) as each block of the mean
// prediction q is complete. A block of two teachers is merged just before the next one's takes its
// place: short pieces between which memory keeps on delivering.
template <class T, class F>
SOLERA_INLINE void mean_prediction(const DistillRows& p, int64_t row, A<T>* e, A<T>* q, A<T>* tops,
                                   const F& done) {
  const int64_t members = p.teachers.count, columns = distill_columns(p.width);
  const A<T> it = A<T>(p.inverse_temperature);
  Unmerged<T> held[2] = {{e, tops, {}}, {e + columns, tops + p.width / kLogitBlock + 1, {}}};
  for (int64_t m = 0; m < members; ++m) {
    const T* t = member_row<T>(p.teachers, m, row);
    const Unmerged<T> before[2] = {held[0], held[1]};
    Unmerged<T>& now = held[m % 2];
    now.sum = RowSum<T>();
    now.weight = ((const A<T>*)p.weights)[m];
    logit_blocks(p.width, [&](int64_t first, int64_t count) {
      if (m > 0 && m % 2 == 0) merge_block<T>(before, 2, first, count, q + first, m == 2);
      add_block<true>(
          now.sum, count, now.e + first,
          [&](int64_t j, int n) { return fetch(t + first + j, n) * it; }, Lines<T>{t + first});
      now.tops[first / kLogitBlock] = now.sum.top;
    });
  }
  logit_blocks(p.width, [&](int64_t first, int64_t count) {
    merge_block<T>(held, members % 2 ? 1 : 2, first, count, q + first, members <= 2);
    done(first, count);
  });
}

template <class T>
void distill_rows(const DistillRows& p, void* scratch, int64_t begin, int64_t end) {
  const FlushSubnormals flushed;
  constexpr int L = kLanes<T>;
  typedef AccVec<T> V;
  const int64_t width = p.width, members = p.teachers.count;
  const A<T> it = A<T>(p.inverse_temperature), scale = A<T>(p.scale);
  const A<T>* w = (const A<T>*)p.weights;
  A<T>* e = whole_lines<A<T>>(scratch);      // [width, in whole vectors]
  A<T>* q = e + 2 * distill_columns(width);  // [the same], after a second e
  A<T>* tops = q + distill_columns(width);   // [2, blocks]
  const bool gradients = p.dstudent || p.dteachers || (p.dweights && p.kind == 1);
  const bool together = p.kind == 0 && p.dstudent && !p.dteachers && !p.dweights;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = (const T*)p.student + row * p.student_stride;
    const RowSum<T> own =
        sum_of_row<T>(width, [&](int64_t j, int n) { return fetch(x + j, n) * it; }, Lines<T>{x});
    const A<T> total = own.log_total();
    const auto student = [&](int64_t j, int n) { return fetch(x + j, n) * it - own.top; };
    A<T> share = 0, means = 0;
    T* dt = (T*)p.dteachers + row * p.row_stride;
    A<T>* dw = (A<T>*)p.dweights + row * members;

    // Of `count` columns, from q.
    const auto write_student = [&](int64_t first, int64_t count) {
      const A<T> factor = it * scale;
      write_row((T*)p.dstudent + row * width + first, count, p.streaming, [&](int64_t j, int n) {
        const V softmax = natural_exp(student(first + j, n) - total) * share;
        return (softmax - fetch(q + first + j, n)) * factor;
      });
    };
    if (together) {
      for (int64_t m = 0; m < members; ++m) share += w[m];
      mean_prediction<T>(p, row, e, q, tops, [&](int64_t first, int64_t count) {
        means += row_sum<T>(count, [&](int64_t j, int n) {
          const V held = fetch(q + first + j, n);
          return held == 0 ? V{} : held * student(first + j, n);
        });
        write_student(first, count);
      });
    } else if (p.kind == 0) {
      for (int64_t m = 0; m < members; ++m) {
        const T* t = member_row<T>(p.teachers, m, row);
        const auto value = [&](int64_t j, int n) { return fetch(t + j, n) * it; };
        Target<T> found;
        if (gradients)
          found = scan_target<T, true>(width, value, student, e, tops, Lines<T>{t});
        else
          found = scan_target<T, false>(width, value, student, e, tops, Lines<T>{t});
        share += w[m];
        means += w[m] * found.mean;
        if (p.dweights) dw[m] = (total - found.mean) * scale;
        if (!gradients) continue;
        T* out = dt + m * p.member_stride;
        each_block(width, found, tops, [&](int64_t first, int64_t count, A<T> factor) {
          const A<T> slope = -w[m] * it * scale * factor;
          factor *= w[m];
          const auto merged = [&](int64_t j, int n) {
            const V held = fetch(e + first + j, n);
            if (p.dstudent) {
              V sum = rounded(held * factor);  // of the same bits in a row's head as in its middle
              if (m > 0) sum += fetch(q + first + j, n);
              deposit(q + first + j, sum, n);
            }
            return held;
          };
          if (!p.dteachers) return strips<L>(count, merged);
          write_row(out + first, count, p.streaming, [&](int64_t j, int n) {
            const V held = merged(j, n), scaled = held * slope;
            return held > 0 ? scaled * (student(first + j, n) - found.mean) : scaled;
          });
        });
      }
    } else {
      for (int64_t m = 0; m < members; ++m) {
        const T* t = member_row<T>(p.teachers, m, row);
        const A<T> factor = w[m] * it;
        strips<L>(width, [&](int64_t j, int n) {
          V sum = fetch(t + j, n) * factor;
          if (m > 0) sum += fetch(q + j, n);
          deposit(q + j, sum, n);
        });
      }
      const auto value = [&](int64_t j, int n) { return fetch(q + j, n); };
      const Target<T> found = gradients ? scan_target<T, true>(width, value, student, e, tops)
                                        : scan_target<T, false>(width, value, student, e, tops);
      share = 1;
      means = found.mean;
      if (gradients) {
        each_block(width, found, tops, [&](int64_t first, int64_t count, A<T> factor) {
          strips<L>(count, [&](int64_t j, int n) {
            deposit(q + first + j, fetch(e + first + j, n) * factor, n);
          });
        });
      }
      // e becomes the gradient of the combined row.
      if (p.dteachers || p.dweights) {
        strips<L>(width, [&](int64_t j, int n) {
          const V held = fetch(q + j, n), slope = held * (found.mean - student(j, n)) * scale;
          deposit(e + j, held > 0 ? slope : held, n);
        });
        for (int64_t m = 0; m < members; ++m) {
          const A<T> factor = w[m] * it;
          T* out = dt + m * p.member_stride;
          if (p.dteachers)
            write_row(out, width, p.streaming,
                      [&](int64_t j, int n) { return fetch(e + j, n) * factor; });
          if (!p.dweights) continue;
          // <dt, t> = <dt, t - c> as dt sums to 0; about their mean under q, the t do not multiply
          // what rounding has left of that sum.
          const T* t = member_row<T>(p.teachers, m, row);
          const A<T> c = row_sum<T>(width, [&](int64_t j, int n) {
            const V held = fetch(q + j, n);
            return held > 0 ? held * fetch(t + j, n) : V{};
          });
          dw[m] = it * row_sum<T>(width, [&](int64_t j, int n) {
                    const V d = fetch(e + j, n);
                    return d == 0 ? V{} : d * (fetch(t + j, n) - c);
                  });
        }
      }
    }
    ((A<T>*)p.loss)[row] = (share * total - means) * scale;
    if (p.dstudent && !together) write_student(0, width);
  }
  if (p.streaming) stream_fence();
}

template <class T>
void scale_row(void* x, int64_t width, double factor) {
  const A<T> f = A<T>(factor);
  strips<kLanes<T>>(width, [&](int64_t j, int n) { put((T*)x + j, get((T*)x + j, n) * f, n); });
}

}  // namespace

extern const DistillTable distill_table;
const DistillTable distill_table = {
    {distill_rows<float>, distill_rows<double>, distill_rows<bf16>, distill_rows<f16>},
    {scale_row<float>, scale_row<double>, scale_row<bf16>, scale_row<f16>},
};

}  // namespace SOLERA_ISA
}  // namespace solera

#ifdef SOLERA_FRONT
#include "mixture_lists.h"

namespace solera {

SOLERA_PICK(DistillTable, distill_table)

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> distill(
    const Tensor& student_in, const std::vector<Tensor>& teachers_in, const Tensor& weights_in,
    double inverse_temperature, double scale, int64_t kind, bool need_student, bool need_teachers,
    bool need_weights, bool rows_first) {
  const MixtureList teachers(teachers_in);
  const int64_t rows = teachers.rows, width = teachers.width, count = teachers.count;
  STD_TORCH_CHECK(student_in.dim() == 2 && student_in.size(0) == rows &&
                      student_in.size(1) == width &&
                      student_in.scalar_type() == teachers.first().scalar_type(),
                  "solera: the student must be (N, C) as the teachers are");
  const Tensor student = with_unit_rows(student_in);
  const ScalarType acc = accumulate_type(student);
  const Tensor weights = mixture_checked(weights_in, acc, {count}, "weights");
  Tensor loss = mixture_empty(student, {rows}, acc);
  Tensor dstudent =
      need_student ? mixture_empty(student, {rows, width}) : mixture_empty(student, {0});
  Tensor dteachers = !need_teachers ? mixture_empty(student, {0})
                     : rows_first   ? mixture_empty(student, {rows, count, width})
                                    : mixture_empty(student, {count, rows, width});
  Tensor dweights =
      need_weights ? mixture_empty(student, {rows, count}, acc) : mixture_empty(student, {0}, acc);
  const int64_t written = (need_student + need_teachers * count) * rows * teachers.row_bytes();
  const DistillRows p{student.const_data_ptr(),
                      student.strides()[0],
                      teachers.members(),
                      weights.const_data_ptr(),
                      loss.mutable_data_ptr(),
                      need_student ? dstudent.mutable_data_ptr() : nullptr,
                      need_teachers ? dteachers.mutable_data_ptr() : nullptr,
                      need_weights ? dweights.mutable_data_ptr() : nullptr,
                      rows_first ? count * width : width,
                      rows_first ? width : rows * width,
                      width,
                      inverse_temperature,
                      scale,
                      int(kind),
                      written >= kMixtureStreamBytes};
  const auto kernel = pick_distill_table().rows[dtype_of(student)];
  parallel_for(
      0, rows, grain_for((count + 1) * teachers.row_bytes()), [&](int64_t begin, int64_t end) {
        const auto scratch = mixture_scratch(
            3 * distill_columns(width) + 2 * (width / kLogitBlock + 1) + kScratchSlack, acc);
        kernel(p, scratch.get(), begin, end);
      });
  return {loss, dstudent, dteachers, dweights};
}

// Rows whose factor is 1 are left alone.
void distill_scale_(const Tensor& x, const Tensor& factor_in) {
  STD_TORCH_CHECK(x.dim() == 3, "solera: expected (A, N, C)");
  const int64_t sets = x.size(0), rows = x.size(1), width = x.size(2);
  const ScalarType acc = accumulate_type(x);
  const Tensor factor = mixture_checked(factor_in, acc, {rows}, "factor");
  const bool unit = width <= 1 || x.strides()[2] == 1;
  const Tensor held = unit ? x : torch::stable::contiguous(x);
  const int64_t set_stride = held.strides()[0], row_stride = held.strides()[1];
  const auto kernel = pick_distill_table().scale[dtype_of(x)];
  char* data = static_cast<char*>(held.mutable_data_ptr());
  const void* factors = factor.const_data_ptr();
  const int64_t size = x.element_size();
  parallel_for(0, sets * rows, grain_for(width * size), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % rows;
      const double f = acc == ScalarType::Double ? static_cast<const double*>(factors)[row]
                                                 : double(static_cast<const float*>(factors)[row]);
      if (f != 1.0) kernel(data + (i / rows * set_stride + row * row_stride) * size, width, f);
    }
  });
  if (!unit) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(x.get(), held.get(), 0));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("distill", TORCH_BOX(&distill));
  m.impl("distill_scale_", TORCH_BOX(&distill_scale_));
}

}  // namespace solera
#endif  // SOLERA_FRONT
