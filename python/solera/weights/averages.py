"""Averages of models: thin functions over cores `lincomb`, `ema` and `sweep`."""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._registry import accumulate_type
from .._route import without_autocast
from . import _lists, _models
from .ema import ema_
from .lincomb import lincomb
from .sweep import Weights, sweep


def combined(
    name: str,
    models: Sequence[Any],
    names: Sequence[str],
    coefficients: Any,
    base: Any = None,
) -> tuple[str, list, dict, list[Tensor]]:
    """(kind, keys, other entries, results) of lincomb, with errors that name the caller's arguments."""
    around = [] if base is None else [base]
    kind, keys, whole, flat = _models.gather([*models, *around], names)
    length = len(keys)
    lists = [flat[i : i + length] for i in range(0, len(flat), length)]
    try:
        out = lincomb(
            lists[: len(models)], coefficients, base=lists[-1] if base is not None else None
        )
    except (ValueError, TypeError) as error:
        if str(error).startswith("coefficients"):
            raise type(error)(name + str(error)[len("coefficients") :]) from None
        raise
    return kind, keys, whole, out


def soup(
    models: Sequence[Weights],
    weights: Tensor | Sequence[float] | Sequence[Sequence[float]] | None = None,
) -> Any:
    r"""Weighted average of K models in one pass: $\sum_k \alpha_k \theta_k$.

    Args:
        models: K tensors, lists of tensors, state dicts or modules (of which the state dicts are taken, without
            gradient). float32, float64, bfloat16 or float16, also mixed; summed in float32 (float64 for float64), the
            result in the promoted dtype. Integer and boolean entries of state dicts must be equal and are copied.
        weights: (K,), or (K, L) with a column for each floating-point tensor; used as given (not normalised); None is
            1 / K each.

    Shapes: K of any shape S -> S; lists -> a list; state dicts and modules -> a state dict.

    Differentiable in weights and models.

    Raises:
        ValueError, TypeError: naming the argument: no models, keys, shapes, dtypes or devices that do not fit.

    Source: Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
    increasing inference time", 2022.
    """
    models = _models.model_list("models", models)
    if weights is None:
        weights = [1.0 / len(models)] * len(models)
    names = [f"models[{k}]" for k in range(len(models))]
    return _models.as_given(*combined("weights", models, names, weights))


@dataclass(frozen=True)
class GreedyStep:
    """One candidate: the model that was added, the score of the average with it, whether it was kept.

    Shapes: three values.
    """

    model: int
    score: float
    kept: bool


@dataclass(frozen=True)
class GreedyLog:
    """What a greedy soup did: each model's own score, in the order given, and the steps in the order tried.

    Shapes: K scores and K steps, the first of them the best model alone.
    """

    scores: tuple[float, ...]
    steps: tuple[GreedyStep, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        """The models in the soup, in the order they came in."""
        return tuple(s.model for s in self.steps if s.kept)

    @property
    def score(self) -> float:
        """The soup's score."""
        return [s.score for s in self.steps if s.kept][-1]


@contextlib.contextmanager
def _progress(total: int, wanted: bool | None) -> Iterator[Callable[[str], None]]:
    """A function to call after each evaluation; draws a bar on a terminal where rich is installed."""
    quiet: Callable[[str], None] = lambda text: None
    if not (sys.stderr.isatty() if wanted is None else wanted):
        yield quiet
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Left
    except ImportError:
        yield quiet
        return
    text = TextColumn("{task.description}")
    columns = (TextColumn("greedy soup"), BarColumn(), MofNCompleteColumn(), Left(), text)
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda description: bar.update(task, advance=1, description=description)


def greedy_soup(
    models: Sequence[Weights],
    evaluate: Callable[[Any], float],
    *,
    higher_is_better: bool = True,
    progress: bool | None = None,
) -> tuple[Any, GreedyLog]:
    r"""Greedy soup: models in the order of their own scores, each kept if the average with it is no worse.

    The average is a running mean, $\bar\theta \leftarrow \bar\theta + (\theta_k - \bar\theta)/(n + 1)$, kept in float32
    (float64 for float64) and rounded to the models' dtype for each evaluation.

    Args:
        models: K tensors, lists of tensors, state dicts or modules.
        evaluate: called with one model of the kind given (for modules with a copy of the first that holds the weights)
            and returns its score on held-out data. It must not keep or change what it is given.
        higher_is_better: False for losses. A score of NaN is worse than any other.
        progress: a bar on stderr (with `rich` installed); None is a bar where stderr is a terminal.

    Shapes: K models -> (one list, tensor or state dict, a `GreedyLog`). Evaluates 2K - 1 times.

    Raises:
        ValueError, TypeError: naming the argument: no models, keys, shapes, dtypes or devices that do not fit, a score
            that is no number.

    Source: Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
    increasing inference time", 2022, recipe 1.
    """
    given = models
    models = _models.model_list("models", models)
    if not callable(evaluate):
        raise TypeError(f"evaluate: expected a callable, got {type(evaluate).__name__}")
    names = [f"models[{k}]" for k in range(len(models))]
    kind, keys, whole, flat = _models.gather(models, names)
    length = len(keys)
    lists = [[t.detach() for t in flat[k * length :][:length]] for k in range(len(models))]
    module = copy.deepcopy(given[0]) if isinstance(given[0], torch.nn.Module) else None

    def score(tensors: Sequence[Tensor]) -> float:
        rounded = [t.to(like.dtype) for t, like in zip(tensors, lists[0])]
        value = _models.as_given(kind, keys, whole, rounded)
        if module is not None:
            module.load_state_dict(value)
            value = module
        found = evaluate(value)
        try:
            return float(found)
        except (TypeError, ValueError):
            raise TypeError(
                f"evaluate: expected it to return a number, got {found!r:.200}"
            ) from None

    def rank(value: float) -> float:
        if math.isnan(value):
            return -math.inf
        return value if higher_is_better else -value

    with torch.no_grad(), _progress(2 * len(models) - 1, progress) as done:
        scores = []
        for k, tensors in enumerate(lists):
            scores.append(score(tensors))
            done(f"model {k}: {scores[-1]:.4g}")
        order = sorted(range(len(models)), key=lambda k: -rank(scores[k]))
        best = scores[order[0]]
        steps = [GreedyStep(order[0], best, True)]
        average = [t.to(accumulate_type(t), copy=True) for t in lists[order[0]]]
        trial = [torch.empty_like(t) for t in average]
        count = 1
        for k in order[1:]:
            lincomb([lists[k]], [1 / (count + 1)], base=average, out=trial)
            found = score(trial)
            keep = rank(found) >= rank(best)
            steps.append(GreedyStep(k, found, keep))
            done(f"model {k} {'kept' if keep else 'left out'}: {found:.4g}")
            if keep:
                average, trial, best, count = trial, average, found, count + 1
        merged = [t.to(like.dtype) for t, like in zip(average, lists[0])]
    return _models.as_given(kind, keys, whole, merged), GreedyLog(tuple(scores), tuple(steps))


def wise_ft(base: Weights, tuned: Weights, alpha: float | Sequence[float] | Tensor) -> Any:
    r"""Weights between a pretrained and a fine-tuned model: $(1 - \alpha)\,\theta_0 + \alpha\,\theta_1$.

    Args:
        base, tuned: two tensors, lists of tensors, state dicts or modules.
        alpha: a number; or a vector (A,): all A interpolations from one read of both; or (A, L), with a value for each
            floating-point tensor.

    Shapes: a number -> base's shapes; (A,) or (A, L) -> (A, *S) for each tensor of shape S.

    Differentiable in alpha, $\mathrm d\alpha = \langle G, \theta_1 - \theta_0\rangle$, and in both models. Otherwise as
    `interpolate`, which it is.

    Source: Wortsman et al., "Robust fine-tuning of zero-shot models", 2022; used in "Spurious Feature Diversification
    Improves Out-of-distribution Generalization", Lin et al., 2024.
    """
    return sweep(base, tuned, alpha, ("base", "tuned", "alpha"))


def running_mean_(
    average: Tensor | Iterable[Tensor] | Mapping[str, Tensor],
    new: Tensor | Iterable[Tensor] | Mapping[str, Tensor],
    n: int,
) -> None:
    r"""One more model into the mean of n, in place: $\bar\theta \leftarrow \bar\theta + (\theta - \bar\theta)/(n + 1)$.

    Args:
        average: the mean of n models: a tensor, an iterable of tensors or a state dict (floating-point entries only).
            Keep it in float32 where the models are of half precision. new: the same of one more. n: at least 0; 0
            copies.

    Shapes: each average and its new tensor have one shape, any.

    Raises:
        ValueError, TypeError: naming the argument, as `ema_`.

    Source: Wortsman et al., "Model soups", 2022; averaged perceptrons: Collins, 2002. It is `ema_` with decay
    n / (n + 1).
    """
    if isinstance(n, bool) or not isinstance(n, int | torch.SymInt) or n < 0:
        raise ValueError(f"n: expected an int of at least 0, got {n!r}")
    ema_(average, new, n / (n + 1))


def windowed_ema(
    ring: Tensor | Sequence[Weights],
    decay: float,
    window: int,
    *,
    newest: int = -1,
    rule: str = "normalized",
) -> Any:
    r"""Moving average over the last checkpoints of a ring buffer: $\sum_{j < w} c_j\,\theta_{\mathrm{newest} - j}$.

    Args:
        ring: m checkpoints: one tensor (m, ...), or m tensors, lists, state dicts or modules.
        decay: d in [0, 1]. window: w in [1, m]; it may grow on a schedule.
        newest: where in the ring the newest checkpoint is; older ones lie before it, cyclically.
        rule: "normalized", $c_j = d^j / \sum_i d^i$; or "recursive", what `ema_` gives when it starts at the oldest of
            the window: $c_j = (1 - d) d^j$, and $d^{w-1}$ for the oldest.

    Shapes: (m, *S) -> S, or as one checkpoint of the list. Reads the w checkpoints once.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Zang et al., "Overcoming the Pitfalls of Vision-Language Model Finetuning for OOD Generalization", 2024 (an
    EMA restricted to a window that grows); both sets of weights are derived.
    """
    checkpoints = list(ring.unbind(0)) if isinstance(ring, Tensor) and ring.dim() else ring
    checkpoints = _models.model_list("ring", checkpoints)
    decay = _check.number("decay", decay, low=0.0, high=1.0)
    count = len(checkpoints)
    if isinstance(window, bool) or not isinstance(window, int) or not 1 <= window <= count:
        raise ValueError(f"window: expected an int in [1, {count}], got {window!r}")
    if isinstance(newest, bool) or not isinstance(newest, int) or not -count <= newest < count:
        raise ValueError(f"newest: expected an int in [{-count}, {count}), got {newest!r}")
    _check.choice("rule", rule, ("normalized", "recursive"))
    shares = [decay**j for j in range(window)]
    if rule == "normalized":
        total = sum(shares)
        shares = [s / total for s in shares]
    else:
        shares = [(1 - decay) * s for s in shares[:-1]] + [shares[-1]]
    places = [(newest - j) % count for j in range(window)]
    names = [f"ring[{p}]" for p in places]
    return _models.as_given(*combined("decay", [checkpoints[p] for p in places], names, shares))


def task_arithmetic(
    base: Weights,
    tuned: Sequence[Weights],
    weights: Tensor | Sequence[float],
    *,
    adapters: Sequence[Any] = (),
) -> Any:
    r"""Task vectors added to a base: $\theta_0 + \sum_k \lambda_k(\theta_k - \theta_0) + \sum_j \lambda_{K+j} B_j A_j$.

    Args:
        base: a tensor, list of tensors, state dict or module.
        tuned: K models like it (K may be 0 where there are adapters).
        weights: (K + J,), one for each model and adapter in order; or (K, L), by tensor, without adapters.
        adapters: J low-rank deltas: each a mapping from a key (an index, for lists) of a matrix (O, I) to its pair
            (A, B), (r, I) and (O, r), or that pair itself where base is a tensor. Keys that are left out have none. A
            scale alpha / r belongs into the weight.

    Shapes: base's. Differentiable in weights (also learned: the gradient is $\langle G, \theta_k - \theta_0\rangle$),
    base, tuned and adapters.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Source: Ilharco et al., "Editing models with task arithmetic", 2022; Fleshman, Van Durme, "RE-Adapt: Reverse
    Engineered Adaptation of Large Language Models", 2024 (instruction vector tuned - base kept, domain vector or
    adapter added, both partially) and "RE-AdaptIR: Improving Information Retrieval through Reverse Engineered
    Adaptation", 2024.
    """
    for name, value in (("tuned", tuned), ("adapters", adapters)):
        if not isinstance(value, Sequence | Tensor) or isinstance(value, str):
            raise TypeError(f"{name}: expected a list, got {type(value).__name__}")
    count, extra = len(tuned), len(adapters)
    if not count and not extra:
        raise ValueError("tuned: expected at least one model or adapter, got none")
    names = [*(f"tuned[{k}]" for k in range(count)), "base"]
    if not extra:
        return _models.as_given(*combined("weights", tuned, names, weights, base))
    dtype = torch.float64
    c = weights if isinstance(weights, Tensor) else torch.tensor(weights, dtype=dtype)
    if c.shape != (count + extra,):
        raise ValueError(
            f"weights: expected shape ({count + extra},) for {count} models and {extra} adapters, got "
            f"{tuple(c.shape)}"
        )
    if count:
        kind, keys, whole, out = combined("weights", tuned, names, c[:count], base)
    else:
        kind, keys, whole, flat = _models.gather([base], ["base"])
        out = list(flat)
    given = {id(t) for t in out} if not count else set()
    place = {key: i for i, key in enumerate(keys)}
    for j, adapter in enumerate(adapters):
        pairs = {0: adapter} if kind == "tensor" else adapter
        if not isinstance(pairs, Mapping):
            raise TypeError(
                f"adapters[{j}]: expected a mapping of pairs, got {type(adapter).__name__}"
            )
        for key, pair in pairs.items():
            name = _lists.spelled(f"adapters[{j}]", kind, key)
            if key not in place:
                raise ValueError(f"{name}: base has no floating-point entry of that name")
            out[place[key]] = _plus_product(name, out[place[key]], pair, c[count + j])
    # Without models what no adapter changes would be the base's own tensor.
    out = [t.clone() if id(t) in given else t for t in out]
    return _models.as_given(kind, keys, whole, out)


def _plus_product(name: str, w: Tensor, pair: Any, weight: Tensor) -> Tensor:
    """w + weight B A, rounded once more."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"{name}: expected a pair (A, B), got {type(pair).__name__}")
    a, b = (_check.tensor(f"{name}[{i}]", t, dim=2) for i, t in enumerate(pair))
    if w.dim() != 2 or (b.shape[0], a.shape[1]) != w.shape or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{name}: expected A (r, I) and B (O, r) for a matrix (O, I) of shape {tuple(w.shape)}, got "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    acc = accumulate_type(w)
    scaled = weight.to(device=w.device, dtype=acc) * b.to(acc)
    with without_autocast(w):
        return torch.addmm(w.to(acc), scaled, a.to(acc)).to(w.dtype)
