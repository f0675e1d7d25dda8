// Tables of kernels over two storage types, indexed by their Dtype codes.
#pragma once

#include "../simd.h"

// kernel<A, B> for every pair: [code of A][code of B].
#define SOLERA_DTYPE_ROW(kernel, A) \
  {kernel<A, float>, kernel<A, double>, kernel<A, bf16>, kernel<A, f16>}
#define SOLERA_DTYPE_PAIRS(kernel)                                    \
  {SOLERA_DTYPE_ROW(kernel, float), SOLERA_DTYPE_ROW(kernel, double), \
   SOLERA_DTYPE_ROW(kernel, bf16), SOLERA_DTYPE_ROW(kernel, f16)}
