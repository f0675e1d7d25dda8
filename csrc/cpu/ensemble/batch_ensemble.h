// The backward of batch_ensemble.cpp, which the first layer of a network uses as well.
#pragma once
#include "tiles.h"

namespace solera {
namespace ensemble {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_ensemble_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, OptTensor r, OptTensor s,
    OptTensor saved, int64_t activation, bool bias_per_member, bool need_x, bool need_weight,
    bool need_r, bool need_s, bool need_bias);

}  // namespace ensemble
}  // namespace solera
