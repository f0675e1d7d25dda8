// Linear combination of K weight lists with coefficients of their own for every row (the slices
// along the first dimension): lincomb's kernels, called on rows. Forward, backward and bytes are
// lincomb's.
#include "lincomb_kernels.h"

#ifdef SOLERA_FRONT
#include "lincomb_lists.h"
#include "tensor_lists.h"

namespace solera {

SOLERA_PICK(LincombTable, lincomb_table)

namespace {

std::vector<Tensor> row_lincomb(const std::vector<Tensor>& tensors, const Tensor& coefficients,
                                const std::vector<Tensor>& base,
                                std::optional<ScalarType> out_dtype) {
  const int64_t length = int64_t(tensors.size()) / coefficients.size(0);
  const std::vector<Tensor> first(tensors.begin(), tensors.begin() + length);
  const WeightRows rows(first, true);
  const LincombLists lists("row_lincomb", tensors, coefficients, base, length, rows.total());
  lists.same_shapes(tensors, first);
  lists.same_shapes(base, first);
  std::vector<Tensor> out;
  std::vector<WeightOutput> outputs;
  std::vector<char> wide;
  int64_t bytes = 0;
  for (int64_t l = 0; l < length; ++l) {
    out.push_back(
        empty_like(tensors[l], sizes_of(tensors[l]),
                   out_dtype.has_value() ? *out_dtype : scalar_type_of(lists.promoted(l))));
    const int dtype = dtype_of(out[l]);
    outputs.push_back({out[l].mutable_data_ptr(), dtype});
    wide.push_back(lists.wide(l, dtype));
    bytes += out[l].numel() * int64_t(out[l].element_size());
  }
  const auto& table = pick_lincomb_table();
  const bool streaming = bytes >= kStreamBytes;
  rows.chunks().parallel(
      kListChunk * 4 * (lists.models + 1), [&](size_t row, int64_t offset, int64_t count, int64_t) {
        const auto at = rows.find(int64_t(row));
        table.forward[int(wide[at.tensor])](lists.item(at.tensor, int64_t(row)), outputs[at.tensor],
                                            at.start + offset, count, streaming);
      });
  return out;
}

std::tuple<Tensor, std::vector<Tensor>> row_lincomb_backward(
    const std::vector<Tensor>& grads, const std::vector<Tensor>& tensors,
    const Tensor& coefficients, const std::vector<Tensor>& base, bool need_coefficients,
    const std::vector<bool>& need_tensors) {
  const WeightRows rows(grads, true);
  const int64_t K = coefficients.size(0), L = int64_t(grads.size()), R = rows.total();
  const LincombLists lists("row_lincomb", tensors, coefficients, base, L, R);
  if (need_coefficients) {
    lists.same_shapes(tensors, grads);
    lists.same_shapes(base, grads);
  }
  STD_TORCH_CHECK(int64_t(need_tensors.size()) == K * L + int64_t(base.size()),
                  "row_lincomb_backward: need_tensors has ", need_tensors.size(), " entries");
  Tensor dots = empty_like(coefficients,
                           need_coefficients ? std::vector<int64_t>{K, R} : std::vector<int64_t>{0},
                           ScalarType::Double);
  std::vector<Tensor> gradients, incoming;
  std::vector<WeightOutput> outputs(size_t((K + 1) * L), WeightOutput{nullptr, 0});
  std::vector<int> grad_dtypes;
  std::vector<char> wide;
  int64_t bytes = 0;
  for (int64_t l = 0; l < L; ++l) {
    incoming.push_back(dense(grads[l]));
    grad_dtypes.push_back(dtype_of(grads[l]));
    wide.push_back(lists.wide(l, grad_dtypes.back()));
  }
  for (size_t i = 0; i < need_tensors.size(); ++i) {
    if (!need_tensors[i]) continue;
    const int64_t k = int64_t(i) / L, l = int64_t(i) % L;
    const Tensor& like = k < K ? tensors[i] : base[l];
    gradients.push_back(empty_like(like, sizes_of(grads[l]), like.scalar_type()));
    bytes += grads[l].numel() * int64_t(like.element_size());
    outputs[l * (K + 1) + k] = {gradients.back().mutable_data_ptr(), dtype_of(like)};
  }
  const TensorChunks& chunks = rows.chunks();
  std::vector<double> partial(need_coefficients ? size_t(chunks.total() * K) : 0);
  const auto& table = pick_lincomb_table();
  const bool streaming = bytes >= kStreamBytes;
  chunks.parallel(kListChunk * 4 * (K + 1), [&](size_t row, int64_t offset, int64_t count,
                                                int64_t chunk) {
    const auto at = rows.find(int64_t(row));
    const int64_t l = at.tensor;
    const LincombGradient grad{incoming[l].const_data_ptr(), grad_dtypes[l], &outputs[l * (K + 1)],
                               need_coefficients ? &partial[chunk * K] : nullptr};
    table.backward[int(wide[l])](lists.item(l, int64_t(row)), grad, at.start + offset, count,
                                 streaming);
  });
  if (need_coefficients) {
    double* total = static_cast<double*>(dots.mutable_data_ptr());
    for (int64_t k = 0; k < K; ++k)
      for (int64_t row = 0; row < R; ++row) {
        double sum = 0;
        for (int64_t i = chunks.first(row); i < chunks.first(row + 1); ++i)
          sum += partial[i * K + k];
        total[k * R + row] = sum;
      }
  }
  return {dots, gradients};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(solera, CPU, m) {
  m.impl("row_lincomb", TORCH_BOX(&row_lincomb));
  m.impl("row_lincomb_backward", TORCH_BOX(&row_lincomb_backward));
}

}  // namespace solera
#endif  // SOLERA_FRONT
