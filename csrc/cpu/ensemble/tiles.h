// Tiles of rows and the products on them, shared by the two ensemble ops.
//
// Row n of the flattened (B*K, .) operands belongs to member n % K and to batch item n / K. A
// product runs on tiles of rows: the input scale is applied on the way into a tile; output scale,
// bias and activation on the way out of it, both while it is in cache.
//
// Products run in the accumulator's type; bfloat16 tiles are multiplied as they are only where the
// processor has instructions for it (SOLERA_GEMM=native|float32 overrides, =library leaves them to
// torch everywhere). Tiles hold a multiple
// of 16 rows, for which BLAS libraries give a row the same bits whatever the other rows are (see
// docs/performance/batch_ensemble.md); SOLERA_FIXED_TILES=1 does not rely on that.
#pragma once
#include "../simd.h"

namespace solera {

// Tile row j is row base + j * step of the (B*K) rows; `padded` >= count rows exist, the rest is
// zero.
struct EnsembleTile {
  int64_t base, step, count, padded, members, columns;
  bool shared;  // x is (B, columns)
};
// A scale or bias per member: row k at data + k * stride, in the accumulator's type.
struct EnsembleRows {
  const void* data;
  int64_t stride;
};
struct EnsembleMatrix {
  void* data;
  int64_t stride;  // between rows, in elements
};
// One member, batch items [begin, end).
struct EnsembleSpan {
  int64_t member, begin, end, members;
};

struct EnsembleTable {
  void (*scale)(const void* x, EnsembleRows r, void* tile, const EnsembleTile&);
  void (*finish)(EnsembleMatrix h, EnsembleRows s, EnsembleRows bias, void* y, void* z,
                 const EnsembleTile&, int activation);
  void (*delta)(const void* dy, const void* saved, EnsembleRows s, void* tile, const EnsembleTile&,
                int activation);
  void (*finish_dx)(EnsembleMatrix d, EnsembleRows r, void* dx, const EnsembleTile&);
  void (*gather_delta)(const void* dy, const void* saved, void* tile, void* dbias,
                       const EnsembleSpan&, int64_t columns, int64_t first, int64_t width,
                       int activation);
  void (*combine)(const void* g, EnsembleMatrix w, EnsembleMatrix dw, const void* r, const void* s,
                  void* dr, void* ds, int64_t rows, int64_t width);
  void (*member_dots)(const void* x, bool shared, EnsembleMatrix d, void* out, const EnsembleSpan&,
                      int64_t columns);
  void (*member_dots_delta)(const void* dy, const void* saved, EnsembleMatrix h, void* ds, void* db,
                            const EnsembleSpan&, int64_t columns, int activation);
  void (*add)(const void* part, void* sum, int64_t n);  // sum += part, part in the tile's type
  void (*transpose)(const void* w, void* out, int64_t rows, int64_t columns, int64_t begin,
                    int64_t end);
  void (*round)(const void* sum, void* out, int64_t n);  // accumulator -> storage
  void (*widen)(const void* in, void* out, int64_t n);   // storage -> tile
};

// By Dtype, and last bfloat16 with bfloat16 tiles.
struct EnsembleTables {
  EnsembleTable of[5];
};

}  // namespace solera

#ifdef SOLERA_FRONT
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#if defined(SOLERA_X86)
#include <cpuid.h>
#endif

#include "../parallel.h"
#include "amx_product.h"

namespace solera {

namespace generic {
extern const EnsembleTables ensemble_tables;
}
SOLERA_PICK(EnsembleTables, ensemble_tables)

namespace ensemble {

constexpr int64_t kTileRows = 256, kNativeTileRows = 512, kRowQuantum = 16;
constexpr int64_t kBatchChunk = 512;  // batch items one product sums over

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Every tile padded to one shape and no product whose layout depends on the batch: a row's bits
// then do not depend on the BLAS treating all row counts alike.
inline bool fixed_tiles() {
  const char* value = std::getenv("SOLERA_FIXED_TILES");
  return value && *value && std::strcmp(value, "0") != 0;
}

inline bool asked_for_product(const char* name) {
  const char* asked = std::getenv("SOLERA_GEMM");
  return asked && std::strcmp(asked, name) == 0;
}
// Whether bfloat16 products beat float32 ones here: AMX or AVX512-BF16, or as SOLERA_GEMM says.
inline bool native_bfloat16() {
  if (asked_for_product("native") || asked_for_product("library")) return true;
  if (asked_for_product("float32")) return false;
#if defined(SOLERA_X86)
  static const bool found = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool amx = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
    return amx || (__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1));
  }();
  return found;
#else
  return false;
#endif
}

// Whether sums of so many bfloat16 products are to be had in float32 (Engine::accumulate); the
// library rounds its own to bfloat16.
inline bool bfloat16_sums(int64_t terms) {
  return native_bfloat16() && !asked_for_product("library") && terms <= kAmxTerms &&
         amx() != nullptr;
}

struct Matrix {
  const void* data;
  int64_t rows, columns, row_step, column_step;
  const void* rest = nullptr;  // see AmxMatrix; only products in registers take it
};

// The right operand of several products, packed once where that is of use (Engine::prepare).
struct Right {
  Matrix matrix;
  Tensor packed;
  bool is_packed = false;
  explicit Right(const Matrix& m) : matrix(m) {}
};

// How one call computes: the kernels of its dtype, and the types of tiles and of sums.
struct Engine {
  const EnsembleTable& run;
  const EnsembleTable& real_run;  // the kernels whose storage is the accumulator's type
  ScalarType real, tile;
  int32_t tile_code;
  int64_t real_size, tile_size, size;
  bool stored_as_tile, fixed, own;  // own: bfloat16 products by amx_product.h where it can
  int64_t max_rows;

  explicit Engine(const Tensor& x, bool native = native_bfloat16())
      : run(pick_ensemble_tables().of[dtype_of(x) == kBFloat16 && native ? 4 : dtype_of(x)]),
        real_run(pick_ensemble_tables().of[dtype_of(x) == kFloat64 ? kFloat64 : kFloat32]),
        real(accumulate_type(x)),
        tile(dtype_of(x) == kBFloat16 && native ? ScalarType::BFloat16 : real),
        tile_code(torch::stable::detail::to<int32_t>(torch::stable::detail::from(tile))),
        real_size(real == ScalarType::Double ? 8 : 4),
        tile_size(tile == ScalarType::BFloat16 ? 2 : real_size),
        size(x.element_size()),
        stored_as_tile(x.scalar_type() == tile),
        fixed(fixed_tiles()),
        own(tile == ScalarType::BFloat16 && !asked_for_product("library")),
        max_rows(tile == ScalarType::BFloat16 ? kNativeTileRows : kTileRows) {}

  Tensor scratch(const Tensor& like, int64_t n, bool sums = false) const {
    return empty_like(like, {n > 0 ? n : 1}, sums ? real : tile);
  }
  void* at(void* p, int64_t n) const { return static_cast<char*>(p) + n * tile_size; }
  void* at_real(void* p, int64_t n) const {
    return p ? static_cast<char*>(p) + n * real_size : nullptr;
  }
  const void* at_stored(const void* p, int64_t n) const {
    return static_cast<const char*>(p) + n * size;
  }
  // Columns a product of `width` should have. Libraries take longer over ten columns than over 64:
  // narrow results whose last columns they do one by one get columns of zeros up to the next
  // sixteen, whatever the number of rows, so that a row's bits do not depend on it. One column is a
  // product of its own in every library.
  int64_t columns(int64_t width) const {
    const bool slow = width > 1 && (width < 16 || (width < 64 && width % 4 != 0));
    return slow && !fixed ? round_up(width, kRowQuantum) : width;
  }
  int64_t padded(int64_t count) const { return fixed ? max_rows : round_up(count, kRowQuantum); }

  // b for products of many tiles.
  Right prepare(const Tensor& like, const Matrix& b) const {
    Right right(b);
    const AmxMatrix columns = half(b);
    if (!own || b.columns == 0 || !amx_takes(columns)) return right;
    const int64_t panels = amx_blocks(b.columns), panel = amx_panel(b.rows);
    right.packed = scratch(like, panels * panel);
    right.is_packed = true;
    bf16* const to = static_cast<bf16*>(right.packed.mutable_data_ptr());
    parallel_for(0, panels, 4, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kAmxBlock, stop = end * kAmxBlock;
      amx()->pack(columns, first, (stop < b.columns ? stop : b.columns) - first,
                  to + begin * panel);
    });
    return right;
  }
  void product(EnsembleMatrix out, const Matrix& a, const Right& b) const {
    if (a.rows == 0 || b.matrix.columns == 0) return;
    if (b.is_packed && amx_product(half(a), b.packed.const_data_ptr(), b.matrix.columns,
                                   {out.data, out.stride, false}))
      return;
    product(out, a, b.matrix);
  }

  // out = a b + bias, of that relu if asked: rounded once. False where it is not to be had so: then
  // out is as it was. `bias`: a row in the accumulator's type, or null; `rest`: as AmxResult's.
  bool product_with_bias(EnsembleMatrix out, const Matrix& a, const Matrix& b, const void* bias,
                         bool relu, void* rest) const {
    return own && a.rows > 0 && b.columns > 0 &&
           amx_product(half(a), half(b),
                       {out.data, out.stride, false, static_cast<const float*>(bias), relu,
                        static_cast<bf16*>(rest)});
  }

  // out = a b, or out += a b, single-threaded inside a parallel region. out is (a.rows, b.columns)
  // of the tile's type.
  void product(EnsembleMatrix out, const Matrix& a, const Matrix& b, bool add = false) const {
    if (a.rows == 0 || b.columns == 0) return;
    if (a.columns == 0) {
      for (int64_t i = 0; !add && i < a.rows; ++i)
        std::memset(at(out.data, i * out.stride), 0, size_t(b.columns * tile_size));
      return;
    }
    if (own && !add && amx_product(half(a), half(b), {out.data, out.stride, false})) return;
    const Blob c({out.data, a.rows, b.columns, out.stride, 1}, tile_code);
    const int64_t most = depth(a.columns);
    for (int64_t k = 0; k < a.columns; k += most) {
      const int64_t n = a.columns - k < most ? a.columns - k : most;
      const auto from = [&](const Matrix& m, int64_t step) {
        return static_cast<const char*>(m.data) + k * step * tile_size;
      };
      const Blob l({from(a, a.column_step), a.rows, n, a.row_step, a.column_step}, tile_code),
          r({from(b, b.row_step), n, b.columns, b.row_step, b.column_step}, tile_code);
      const auto status =
          add || k > 0 ? aoti_torch_cpu_addmm_out(c.handle, c.handle, l.handle, r.handle, 1, 1)
                       : aoti_torch_cpu_mm_out(c.handle, l.handle, r.handle);
      STABLE_TORCH_ERROR_CODE_CHECK(status);
    }
  }

  // sums += a b, or = a b for the first of them, sums (a.rows, b.columns) of the accumulator's type
  // and dense. `part` is a tile of that many elements.
  void accumulate(void* sums, const Matrix& a, const Matrix& b, bool first, void* part) const {
    const int64_t width = b.columns, n = a.rows * width;
    if (tile == real) return product({sums, width}, a, b, !first);
    if (first) std::memset(sums, 0, size_t(n * real_size));
    if (own && amx_product(half(a), half(b), {sums, width, true})) return;
    product({part, width}, a, b);
    run.add(part, sums, n);
  }

  // How many terms one call of the library sums. MKL cuts longer sums where it likes, otherwise in
  // a parallel region than outside one: from 800 on (600 in float64) bits were seen to follow the
  // thread count. bfloat16's library keeps float32 sums of any length.
  int64_t depth(int64_t terms) const {
    if (tile == ScalarType::BFloat16) return terms;
    return tile == ScalarType::Double ? 256 : 512;
  }

 private:
  static AmxMatrix half(const Matrix& m) {
    return {static_cast<const bf16*>(m.data), m.rows, m.columns, m.row_step, m.column_step,
            static_cast<const bf16*>(m.rest)};
  }

  struct Blob {
    AtenTensorHandle handle = nullptr;
    Blob(const Matrix& m, int32_t dtype) {
      const int64_t sizes[2] = {m.rows, m.columns}, strides[2] = {m.row_step, m.column_step};
      STABLE_TORCH_ERROR_CODE_CHECK(
          aoti_torch_create_tensor_from_blob(const_cast<void*>(m.data), 2, sizes, strides, 0, dtype,
                                             aoti_torch_device_type_cpu(), 0, &handle));
    }
    ~Blob() { aoti_torch_delete_tensor_object(handle); }
    Blob(const Blob&) = delete;
  };
};

inline Tensor as(const Tensor& t, ScalarType type) {
  return dense(t.scalar_type() == type ? t : torch::stable::to(t, type));
}

// A scale or bias in the accumulator's type; without one, a row of `fill` that all members share.
struct Parameter {
  Tensor owner;
  EnsembleRows rows;
  bool given;
  Parameter(const OptTensor& t, const Tensor& like, int64_t width, double fill)
      : given(t.has_value()) {
    const ScalarType real = accumulate_type(like);
    owner = given ? as(*t, real) : empty_like(like, {width}, real);
    for (int64_t i = 0; !given && i < width; ++i) {
      if (real == ScalarType::Double)
        static_cast<double*>(owner.mutable_data_ptr())[i] = fill;
      else
        static_cast<float*>(owner.mutable_data_ptr())[i] = float(fill);
    }
    rows = {owner.const_data_ptr(), owner.dim() == 2 ? width : 0};
  }
};

// Items per task of a pass without a product. Up to kSerial elements in all it is one task: waiting
// for a second thread costs more than the pass. Items do not meet, so the split changes no bit.
constexpr int64_t kSerial = int64_t(1) << 17;
inline int64_t pass_grain(int64_t items, int64_t elements_per_item) {
  return items * elements_per_item <= kSerial ? items : 1;
}

// Calls body(first, end, scratch) for the tiles of [0, rows), in parallel. Tasks hold whole
// multiples of `unit` rows; a thread's scratch holds `width` elements for each row of a tile.
template <class F>
void for_tiles(const Engine& e, const Tensor& like, int64_t rows, int64_t unit, int64_t width,
               const F& body) {
  const int64_t threads = int64_t(torch::stable::get_num_threads());
  const int64_t tiles = round_up(ceil_div(rows, e.max_rows), threads);
  const int64_t tile =
      e.fixed ? e.max_rows : round_up(ceil_div(rows, tiles > 0 ? tiles : 1), kRowQuantum);
  if (rows == 0) return;
  const int64_t task = unit == 1 ? tile : (tile > unit ? tile / unit : 1) * unit;
  parallel_for(0, ceil_div(rows, task), 1, [&](int64_t begin, int64_t end) {
    Tensor scratch = e.scratch(like, e.padded(tile) * width);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t stop = (t + 1) * task < rows ? (t + 1) * task : rows;
      for (int64_t row = t * task; row < stop; row += tile)
        body(row, row + tile < stop ? row + tile : stop, scratch.mutable_data_ptr());
    }
  });
}

// The tile's type, in order: sum of `parts` blocks of n sums each.
inline void sum_parts(const Engine& e, const void* parts, void* out, int64_t count, int64_t n) {
  parallel_for(0, ceil_div(n, 4096), 4, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * 4096, width = (end * 4096 < n ? end * 4096 : n) - first;
    char* to = static_cast<char*>(out) + first * e.real_size;
    std::memset(to, 0, size_t(width * e.real_size));
    for (int64_t p = 0; p < count; ++p)
      e.real_run.add(static_cast<const char*>(parts) + (p * n + first) * e.real_size, to, width);
  });
}

}  // namespace ensemble
}  // namespace solera
#endif  // SOLERA_FRONT
