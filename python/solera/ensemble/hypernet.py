"""Layers run with parameters that another network made."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _check


def hypernet_linear(x: Tensor, theta: Tensor, out_features: int, *, bias: bool = True) -> Tensor:
    r"""Linear layers with parameters as flat rows: $y_t = x_t W_t^\top + b_t$, $\theta_t = [\mathrm{vec} W_t, b_t]$.

    A composition: one batched product over views of theta, which is never copied.

    Args:
        x: (T, B, I), a batch for each task.
        theta: (T, O I + O), or (T, O I) without bias; W row by row, then b.
        out_features: O.
        bias: whether theta ends in biases.

    Shapes: x (T, B, I), theta (T, O I + O) -> (T, B, O).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Ha, Dai, Le, "HyperNetworks", 2017; for continual learning von Oswald et al., 2020, and "Continual
    Learning with Dependency Preserving Hypernetworks", 2023.
    """
    _check.tensor("x", x, dim=3)
    _check.tensor("theta", theta, dim=2)
    tasks, _, inputs = x.shape
    size = _check.count("out_features", out_features) * inputs
    _check.like("theta", theta, (tasks, size + (out_features if bias else 0)), x)
    theta = theta.to(x.dtype)
    weight = theta[:, :size].unflatten(1, (out_features, inputs)).mT
    if not bias:
        return torch.bmm(x, weight)
    return torch.baddbmm(theta[:, size:].unsqueeze(1), x, weight)


def chunked_hypernet(
    task: Tensor, chunks: Tensor, weight: Tensor, rnn: nn.Module | None = None
) -> Tensor:
    r"""A network's flat parameters, chunk by chunk: $h_l = \mathrm{RNN}(h_{l-1}, [e_t, c_l])$, $\theta_l = U h_l$.

    A composition. Without `rnn` the chunks do not depend on each other: $\theta_l = U [e_t, c_l]$, the chunked
    hypernetwork of von Oswald et al.

    Args:
        task: (T, E), task embeddings.
        chunks: (L, C), chunk embeddings.
        weight: U (S, H), S parameters a chunk; H = E + C without `rnn`.
        rnn: a module that takes (T, L, E + C) and returns (T, L, H), alone or first of a tuple, such as
            `torch.nn.GRU(E + C, H, batch_first=True)`.

    Shapes: task (T, E), chunks (L, C), weight (S, H) -> (T, L S), rows as `hypernet_linear` takes them.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: "Continual Learning with Dependency Preserving Hypernetworks", 2023.
    """
    _check.tensor("task", task, dim=2)
    _check.tensor("chunks", chunks, dim=2)
    _check.like("chunks", chunks, tuple(chunks.shape), task, "task")
    _check.tensor("weight", weight, dim=2)
    tasks, count = task.shape[0], chunks.shape[0]
    pairs = torch.cat(
        [task.unsqueeze(1).expand(-1, count, -1), chunks.unsqueeze(0).expand(tasks, -1, -1)], 2
    )
    h = pairs if rnn is None else rnn(pairs)
    h = h[0] if isinstance(h, tuple) else h
    _check.like("weight", weight, (weight.shape[0], h.shape[-1]), task, "task")
    return F.linear(h, weight.to(h.dtype)).flatten(1)


def hypernet_regularizer(theta: Tensor, before: Tensor) -> Tensor:
    r"""What keeps earlier tasks: $\sum_{s<t} \lVert H(e_s;\Phi) - H(e_s;\Phi^*)\rVert^2$.

    Shapes: theta, before (T, P), the parameters made now and those made before the task -> a scalar; before gets
    no gradient.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: von Oswald et al., "Continual Learning with Hypernetworks", ICLR 2020.
    """
    _check.tensor("theta", theta, dim=2)
    _check.like("before", before, tuple(theta.shape), theta, "theta")
    return (theta - before.detach()).square().sum()


def mpo_linear(x: Tensor, left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    r"""A linear layer as a matrix product operator: W is the contraction of three tensors, and never formed.

    $$y_{b,o_1 o_2 o_3} = \sum A_{i_1 o_1 p}\; C_{p\,i_2 o_2\,q}\; D_{q\,i_3 o_3}\; x_{b,i_1 i_2 i_3} .$$

    A composition. The central tensor is shared by the layers of a deep network and holds nearly all parameters; the
    outer ones are a layer's own.

    Args:
        x: (..., I) with I = i1 i2 i3.
        left: (i1, o1, p), core: (p, i2, o2, q), right: (q, i3, o3).

    Shapes: x (..., i1 i2 i3) -> (..., o1 o2 o3).

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: "Scaling Pre-trained Language Models to Deeper via Parameter-efficient Architecture", 2023; the
    contraction is that of matrix product operators (Gao et al., 2020).
    """
    _check.tensor("x", x, min_dim=1)
    _check.tensor("left", left, dim=3)
    _check.tensor("core", core, dim=4)
    _check.tensor("right", right, dim=3)
    bonds = (left.shape[2], right.shape[0])
    if (core.shape[0], core.shape[3]) != bonds:
        raise ValueError(f"core: expected bonds {bonds}, got shape {tuple(core.shape)}")
    inputs = (left.shape[0], core.shape[1], right.shape[1])
    if x.shape[-1] != inputs[0] * inputs[1] * inputs[2]:
        raise ValueError(
            f"x: expected {inputs} features in the last dimension, got {tuple(x.shape)}"
        )
    for name, t in (("left", left), ("core", core), ("right", right)):
        _check.like(name, t, tuple(t.shape), x)
        _check.product_dtype(name, t, x)
    h = x.unflatten(-1, inputs)
    h = torch.einsum("...abc,aop->...bcop", h, left)
    h = torch.einsum("...bcop,pbrq->...corq", h, core)
    return torch.einsum("...corq,qcs->...ors", h, right).flatten(-3)
