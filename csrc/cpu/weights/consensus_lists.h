// The arguments of the consensus ops, checked and laid out for its kernels. Included once, by
// consensus.cpp, below its structs.
#pragma once

#include <limits>

#include "delta_lists.h"
#include "tensor_lists.h"

namespace solera {
namespace {

// K numbers for each of L positions, in both accumulator types.
struct ConsensusNumbers {
  std::vector<float> narrow;
  std::vector<double> wide;
  void add(double value) {
    narrow.push_back(float(value));
    wide.push_back(value);
  }
};

struct ConsensusLists : DeltaLists {
  ConsensusNumbers low, high, election, value, divisor;  // [L][K]
  std::vector<double> factors;                           // [K][L]
  std::vector<int64_t> keys, keep, begins;               // begins: [L] or none
  uint64_t seed = 0;
  double scale;
  int vote;  // what the kernels are chosen by
  bool divide, by_weight, bounded;

  ConsensusLists(const std::vector<Tensor>& tensors, const std::vector<Tensor>& base,
                 const Tensor& weights, const OptTensor& given, const OptTensor& lows,
                 const OptTensor& highs, const OptTensor& seeds,
                 const std::vector<int64_t>& all_keys, const std::vector<int64_t>& bounds,
                 int64_t by, bool before, int64_t divide_by, double scaled,
                 const std::vector<int64_t>& parts)
      : DeltaLists("consensus", tensors, base, weights.size(0)),
        keys(all_keys),
        keep(bounds),
        begins(parts),
        scale(scaled),
        vote(by == kMass && before ? kOwnMass : int(by)),
        divide(divide_by != 0),
        by_weight(divide_by == 1),
        bounded(highs.has_value()) {
    STD_TORCH_CHECK(by >= kLinear && by <= kCount, "consensus: vote ", by);
    STD_TORCH_CHECK(seeds.has_value() ? int64_t(keys.size()) == length &&
                                            int64_t(keep.size()) == models && seeds->numel() == 1
                                      : keep.empty(),
                    "consensus: a seed comes with a key a tensor and a bound a model");
    STD_TORCH_CHECK(begins.empty() || int64_t(begins.size()) == length,
                    "consensus: begins are none or one a tensor");
    for (const int64_t begin : begins)
      STD_TORCH_CHECK(begin >= 0 && begin % generic::kMaskChunk == 0,
                      "consensus: a part begins at a multiple of ", generic::kMaskChunk, ", got ",
                      begin);
    if (seeds.has_value()) seed = uint64_t(*static_cast<const int64_t*>(seeds->const_data_ptr()));
    const double infinity = std::numeric_limits<double>::infinity();
    factors = numbers(given, 1);
    const std::vector<double>&f = factors, w = numbers(weights), from = numbers(lows, 0),
          to = numbers(highs, infinity);
    for (int64_t l = 0; l < length; ++l)
      for (int64_t k = 0; k < models; ++k) {
        const int64_t at = k * length + l;
        low.add(from[at]);
        high.add(to[at]);
        value.add(w[at] * f[at]);
        election.add(before ? w[at] * f[at] : f[at]);
        divisor.add(by_weight ? w[at] : 1.0);
      }
  }

  ConsensusItem item(int64_t l) const {
    const auto both = [&](const void*(&to)[2], const ConsensusNumbers& numbers) {
      to[0] = &numbers.narrow[l * models];
      to[1] = &numbers.wide[l * models];
    };
    ConsensusItem out{};
    out.streams = &streams[l * models];
    out.base = base(l);
    out.count = int(models);
    both(out.low, low);
    both(out.high, high);
    both(out.election, election);
    both(out.value, value);
    both(out.divisor, divisor);
    out.keep = keep.empty() ? nullptr : keep.data();
    out.key = keep.empty() ? 0 : uint32_t(keys[l]);
    out.seed = seed;
    out.begin = begins.empty() ? 0 : begins[l];
    out.scale = scale;
    out.divide = divide;
    out.bounded = bounded;
    return out;
  }

  // total[(i, k, l)] = sum over the chunks of l of partial[chunk][2 k + i], in order.
  void sum_in_order(const TensorChunks& chunks, const std::vector<double>& partial,
                    double* total) const {
    for (int64_t l = 0; l < length; ++l)
      for (int64_t k = 0; k < models; ++k)
        for (int64_t i = 0; i < 2; ++i) {
          double sum = 0;
          for (int64_t c = chunks.first(l); c < chunks.first(l + 1); ++c)
            sum += partial[(c * models + k) * 2 + i];
          total[(i * models + k) * length + l] = sum;
        }
  }

  // dweights (K, L) of the dots dv_k . d_k and ddivisor_k, (2, K, L).
  void weight_gradient(const std::vector<double>& dots, double* out) const {
    for (size_t i = 0; i < factors.size(); ++i)
      out[i] = factors[i] * dots[i] + (by_weight ? dots[factors.size() + i] : 0);
  }

 private:
  std::vector<double> numbers(const OptTensor& given, double missing = 0) const {
    if (!given.has_value()) return std::vector<double>(size_t(models * length), missing);
    const Tensor t = dense(*given);
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == models && t.size(1) == length,
                    "consensus: expected (", models, ", ", length, ") numbers");
    const WeightStream s{t.const_data_ptr(), dtype_of(t)};
    std::vector<double> out;
    for (int64_t i = 0; i < models * length; ++i) out.push_back(generic::element<double>(s, i));
    return out;
  }
};

}  // namespace
}  // namespace solera
