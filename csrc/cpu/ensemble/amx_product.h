// Products of bfloat16 tiles in a processor's matrix registers (AMX), sums in float32, rounded
// once.
//
// torch's library packs the weight and clears the result for every call, which is most of the time
// of small products, and rounds every result to bfloat16. This packs into a thread's own scratch,
// keeps a block of 32 x 32 sums in registers over all terms, and adds a bias before they are
// rounded or the sums to float32.
//
// A result is one sum of its terms in order, 32 at a time, whatever the other rows and columns are.
#pragma once
#include "../amx.h"

namespace solera {

// Element (i, j) at data + i * row_step + j * column_step; one of the steps is 1.
struct AmxMatrix {
  const bf16* data;
  int64_t rows, columns, row_step, column_step;
  // Of a left operand: what rounding left of it, in the same layout, or null. The product is then
  // of both: 16 bits of a number, against 8.
  const bf16* rest = nullptr;
};
struct AmxResult {
  void* data;      // bfloat16, or float32 to which the sums are added
  int64_t stride;  // between rows
  bool sums;
  // Of bfloat16 results: added before they are rounded, one number a column, or null; then relu.
  const float* bias = nullptr;
  bool relu = false;
  bf16* rest = nullptr;  // what the rounding leaves goes there, if given
};

struct AmxTable {
  // Columns [first, first + columns) of b to panels of 32, each amx_panel(b.rows) elements.
  void (*pack)(const AmxMatrix& b, int64_t first, int64_t columns, void* to);
  // out (a.rows, columns). `scratch` holds a panel, two with a.rest. Packed memory and scratch are
  // aligned to 64.
  void (*multiply)(const AmxMatrix& a, const void* packed, int64_t columns, AmxResult out,
                   void* scratch);
};

constexpr int64_t kAmxBlock = 32;                 // rows, columns and terms of a block
constexpr int64_t kAmxPacked = int64_t(1) << 19;  // elements of b packed at a time
constexpr int64_t kAmxTerms = 2048;               // more of them are left to the library

SOLERA_INLINE int64_t amx_blocks(int64_t n) { return (n + kAmxBlock - 1) / kAmxBlock; }
SOLERA_INLINE int64_t amx_panel(int64_t terms) { return amx_blocks(terms) * kAmxBlock * kAmxBlock; }

}  // namespace solera

#ifdef SOLERA_FRONT
#include "../parallel.h"

namespace solera {

namespace generic {
extern const AmxTable amx_table;
}
SOLERA_PICK(AmxTable, amx_table)

// The product, or null where the processor, the kernel or SOLERA_ISA does not grant the registers.
inline const AmxTable* amx() {
  const AmxTable& table = pick_amx_table();
  return table.multiply && amx_granted() ? &table : nullptr;
}

inline bool amx_fits(const AmxMatrix& m) { return m.row_step == 1 || m.column_step == 1; }

// Whether amx_product would take a product with b. That never depends on the rows of a.
inline bool amx_takes(const AmxMatrix& b) {
  return b.rows > 0 && b.rows <= kAmxTerms && amx_fits(b) && amx() != nullptr;
}

// A thread's memory for `elements` packed ones. It stays with the thread: up to 1.1 MB.
inline bf16* amx_scratch(int64_t elements) {
  struct Scratch {
    void* data = nullptr;
    int64_t elements = 0;
    ~Scratch() { std::free(data); }
  };
  static thread_local Scratch scratch;
  if (scratch.elements < elements) {
    std::free(scratch.data);
    scratch.data = std::aligned_alloc(4096, size_t((2 * elements + 4095) / 4096 * 4096));
    scratch.elements = scratch.data ? elements : 0;
    STD_TORCH_CHECK(scratch.data, "no memory for a product's scratch");
  }
  return static_cast<bf16*>(scratch.data);
}

// out = a b, or out += a b into float32 sums, of a packed b that amx_takes; false where a's steps
// leave it to the library.
inline bool amx_product(const AmxMatrix& a, const void* packed, int64_t columns, AmxResult out) {
  if (!amx_fits(a)) return false;
  const int64_t parts = a.rest ? 2 : 1;
  amx()->multiply(a, packed, columns, out, amx_scratch(parts * amx_panel(a.columns)));
  return true;
}

// The same of a b as it is.
inline bool amx_product(const AmxMatrix& a, const AmxMatrix& b, AmxResult out) {
  if (!amx_takes(b) || !amx_fits(a)) return false;
  const int64_t panel = amx_panel(b.rows), most = kAmxPacked / panel * kAmxBlock;
  const int64_t panels = amx_blocks(b.columns < most ? b.columns : most);
  const int64_t parts = a.rest ? 2 : 1;
  bf16* const left = amx_scratch((panels + parts) * panel);
  bf16* const right = left + parts * panel;
  for (int64_t c = 0; c < b.columns; c += most) {
    const int64_t width = b.columns - c < most ? b.columns - c : most;
    amx()->pack(b, c, width, right);
    void* const to = static_cast<char*>(out.data) + c * (out.sums ? 4 : 2);
    const float* const bias = out.bias ? out.bias + c : nullptr;
    bf16* const rest = out.rest ? out.rest + c : nullptr;
    amx()->multiply(a, right, width, {to, out.stride, out.sums, bias, out.relu, rest}, left);
  }
  return true;
}

}  // namespace solera
#endif  // SOLERA_FRONT
