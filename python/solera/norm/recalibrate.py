r"""AdaBN: the running statistics of batch normalisation estimated again on the data a model is to be used on.

Means and sums of squared deviations are merged batch by batch, and rank by rank, by Chan's rule: with
$\delta = \mu_B - \mu_A$, $\mu = \mu_A + \delta\,n_B/n$ and $M = M_A + M_B + \delta^2\,n_A n_B/n$. The result is that of
all the data at once, whatever the batches were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from ._statistics import check_correction, positions
from .batch_norm import update_running
from .channel_norm import moments

Progress = Callable[[int, int], None]


class BatchStatistics:
    """Count, mean and sum of squared deviations of each channel over any number of batches, in float64.

    >>> statistics = BatchStatistics()
    >>> for x in batches:
    ...     statistics.update(x)
    >>> statistics.mean, statistics.var()

    Shapes: batches (N, C, *) -> mean and variance (C,).
    """

    def __init__(self) -> None:
        self.count: int = 0
        self.mean: Tensor | None = None  # (C,)
        self.m2: Tensor | None = None  # (C,)

    @torch.no_grad()
    def update(self, x: Tensor) -> BatchStatistics:
        """Take in a batch (N, C, *)."""
        _check.tensor("x", x, min_dim=2)
        if self.mean is not None and self.mean.shape != x.shape[1:2]:
            raise ValueError(f"x: expected {self.mean.shape[0]} channels, got {tuple(x.shape)}")
        part = BatchStatistics()
        if x.numel() > 0:
            per_sample = positions(x)
            mean, var = (t.double() for t in moments(x.detach()))
            part.count = x.shape[0] * per_sample
            part.mean = mean.mean(0)
            part.m2 = (var + (mean - part.mean).square()).sum(0) * per_sample
        return self.merge(part)

    def merge(self, other: BatchStatistics) -> BatchStatistics:
        """Take in what another accumulator has seen."""
        if other.mean is None or other.m2 is None or other.count == 0:
            return self
        if self.mean is None or self.m2 is None or self.count == 0:
            self.count, self.mean, self.m2 = other.count, other.mean.clone(), other.m2.clone()
            return self
        total = self.count + other.count
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / total)
        self.m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / total)
        self.count = total
        return self

    def all_merge(self, group: torch.distributed.ProcessGroup | None, like: Tensor) -> None:
        """Take in what the other ranks of a process group have seen, in the order of the ranks.

        One sum of a table in which each rank fills its own row: all ranks get the same bits. `like` (C,) gives
        the width and the device to a rank that saw nothing.
        """
        rank = torch.distributed.get_rank(group)
        size = torch.distributed.get_world_size(group)
        table = torch.zeros(size, 3, like.shape[0], dtype=torch.float64, device=like.device)
        if self.mean is not None and self.m2 is not None:
            table[rank, 0] = self.count
            table[rank, 1], table[rank, 2] = self.mean, self.m2
        torch.distributed.all_reduce(table, group=group)
        self.count, self.mean, self.m2 = 0, None, None
        for counts, mean, m2 in table:
            part = BatchStatistics()
            part.count, part.mean, part.m2 = int(counts[0]), mean, m2
            self.merge(part)

    def var(self, correction: int = 0) -> Tensor:
        """(C,): the variance; correction=1 divides by count - 1."""
        check_correction(correction)
        if self.m2 is None or self.count <= correction:
            raise ValueError(
                f"BatchStatistics: expected more than {correction} value(s) a channel, "
                f"got {self.count}"
            )
        return self.m2 / (self.count - correction)


def _store(statistics, running_mean, running_var, momentum, group):
    if group is not None:
        statistics.all_merge(group, running_mean)
    if statistics.count < 2:
        raise ValueError(
            f"batches: expected more than one value a channel over all batches, "
            f"got {statistics.count}"
        )
    for running, new in ((running_mean, statistics.mean), (running_var, statistics.var(1))):
        update_running(running, new, momentum)


def _norms(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and getattr(module, "running_mean", None) is not None
    }
    if not found:
        raise ValueError("target: expected a model with batch norms that have running statistics")
    return found


def _record(seen, _, arguments):
    seen.update(arguments[0])


@contextmanager
def _recording(model: nn.Module, norms: dict[str, Any], statistics):
    """The model in evaluation, its batch norms on the batch's statistics, their inputs recorded."""
    training = [(m, m.training) for m in model.modules()]
    tracked = [(m, m.track_running_stats) for m in norms.values()]
    hooks: list[Any] = []
    try:
        model.eval()
        for name, norm in norms.items():
            seen = statistics[name]
            norm.training, norm.track_running_stats = True, False
            hooks.append(norm.register_forward_pre_hook(partial(_record, seen)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training:
            module.training = mode
        for norm, mode in tracked:
            norm.track_running_stats = mode


def _call(model, batch):
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


@torch.no_grad()
def batch_norm_recalibrate(
    target: nn.Module | tuple[Tensor, Tensor],
    batches: Iterable,
    *,
    momentum: float = 1.0,
    group: torch.distributed.ProcessGroup | None = None,
    progress: Progress | None = None,
) -> dict[str, BatchStatistics] | BatchStatistics:
    r"""AdaBN: running statistics re-estimated over batches of the target domain; weights and biases stay.

    Mean and variance (unbiased, as torch keeps it) are those of all the batches at once, merged in float64:
    $\text{running} \leftarrow (1-m)\,\text{running} + m\,\text{target}$.

    Args:
        target: a model, all of whose batch norms (torch's and Solera's) are recalibrated in one pass; or the
            pair (running_mean, running_var), each (C,), of one.
        batches: the model's inputs (a tensor, a tuple of arguments, or a mapping of keywords), or the
            (N, C, *) inputs of the one batch norm. While a model runs, it is in evaluation except that its
            batch norms use each batch's own statistics; every mode is restored.
        momentum: m; 1 forgets the source.
        group: a process group whose ranks hold parts of the data; a rank may hold none. All ranks end with
            the same statistics.
        progress: called as progress(batches done, samples seen) after every batch.

    Shapes: batches (N, C, *); running statistics (C,), changed in place.

    Returns the accumulated `BatchStatistics`, by module name for a model.

    Raises:
        ValueError, TypeError: naming the argument that does not fit; also if fewer than two values came.

    Source: Li, Wang, Shi, Liu, Hou, "Revisiting Batch Normalization For Practical Domain Adaptation", 2016, as
    used in "ConvLoRA and AdaBN based Domain Adaptation via Self-Training", 2024.
    """
    momentum = _check.number("momentum", momentum, low=0.0, high=1.0)
    done = samples = 0

    def count(batch):
        nonlocal done, samples
        parts = batch.values() if isinstance(batch, Mapping) else batch
        first = batch if isinstance(batch, Tensor) else next(iter(parts))
        done, samples = done + 1, samples + len(first)
        if progress is not None:
            progress(done, samples)

    if not isinstance(target, nn.Module):
        try:
            running_mean, running_var = target
        except (TypeError, ValueError):
            raise TypeError(
                "target: expected a model or the pair (running_mean, running_var), got "
                f"{type(target).__name__}"
            ) from None
        _check.tensor("running_mean", running_mean, dim=1)
        _check.like("running_var", running_var, running_mean.shape, running_mean, "running_mean")
        statistics = BatchStatistics()
        for batch in batches:
            statistics.update(batch)
            count(batch)
        _store(statistics, running_mean, running_var, momentum, group)
        return statistics
    norms = _norms(target)
    every = {name: BatchStatistics() for name in norms}
    with _recording(target, norms, every):
        for batch in batches:
            _call(target, batch)
            count(batch)
    for name, module in norms.items():
        _store(every[name], module.running_mean, module.running_var, momentum, group)
    return every
