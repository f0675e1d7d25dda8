// Products of small float32 matrices in vector registers, with what comes next to a product in a
// network: bias and relu, or relu's derivative and the sums of columns.
//
// torch's library packs both operands for every call and sums at 140 to 170 GFLOP/s a core where
// this, on operands that lie in the first two levels of cache, stays at 190 (AVX-512 at 3 GHz). A
// network's small layers are such operands.
//
// A result is one sum of its terms in order, whatever the other rows and columns are.
#pragma once
#include "../simd.h"

namespace solera {

// Element (i, j) at data + i * row_step + j * column_step.
struct FloatMatrix {
  const float* data;
  int64_t rows, columns, row_step, column_step;
};
// What becomes of the sums, in this order; each may be null or false.
struct FloatResult {
  float* data;
  int64_t stride;     // between rows
  bool add;           // to what is there
  const float* bias;  // one number a column
  bool relu;
  const float* gate;  // where it is not above zero the result is zero; rows `stride` apart
  float* sums;        // the result's columns are added to it, block by block of rows
};
// Memory that a later product reads first: asked for into the second-level cache while this one
// runs, a line a term.
struct FloatAhead {
  const void *begin = nullptr, *end = nullptr;
};

struct FloatTable {
  // out = a b. The columns of b are neighbours. Null where the library does better.
  void (*multiply)(const FloatMatrix& a, const FloatMatrix& b, const FloatResult& out,
                   const FloatAhead& ahead);
  // to (columns, step) = the transpose of from (rows, columns) whose rows lie row_step apart; what
  // is past `rows` is left alone.
  void (*transpose)(const float* from, int64_t row_step, int64_t rows, int64_t columns, float* to,
                    int64_t step);
};

}  // namespace solera

#ifdef SOLERA_FRONT
#include "../parallel.h"

namespace solera {

namespace generic {
extern const FloatTable float_table;
}
SOLERA_PICK(FloatTable, float_table)

}  // namespace solera
#endif  // SOLERA_FRONT
