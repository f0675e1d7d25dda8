"""Merging in memory: methods and rules as values, and what each makes of named tensors."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers import DEVICE

import solera.weights
from solera.weights import merge, merge_files
from solera.weights._rules import checked_rules, chosen, parse
from solera.weights._safetensors import write_file
from solera.weights.methods import (
    Breadcrumbs,
    Copy,
    Dare,
    Della,
    FromBase,
    Karcher,
    Linear,
    Method,
    ModelStock,
    MultiSlerp,
    Slerp,
    TaskArithmetic,
    Ties,
)

EVERY = [
    Linear(), Linear([1, 3]), Linear([0.5, 0.25], normalize=False), TaskArithmetic(0.4),
    TaskArithmetic([0.3, 0.2]), Copy(1), FromBase(), Slerp(0.25), MultiSlerp(), Karcher([1, 2]),
    ModelStock(), Ties(0.3), Dare(0.5), Breadcrumbs(), Della(),
]  # fmt: skip
OTHER_VOTES = [Dare(0.5, consensus="mass"), Breadcrumbs(consensus="count"), Della(consensus=None)]
CALLED = {
    Slerp: "slerp", MultiSlerp: "multi_slerp", Karcher: "karcher_mean", ModelStock: "model_stock",
    Ties: "ties", Dare: "dare", Breadcrumbs: "breadcrumbs", Della: "della",
}  # fmt: skip


def needs(method):
    """Skips where the function that a method calls is not there."""
    name = CALLED.get(type(method))
    if name is not None and not hasattr(solera.weights, name):
        pytest.skip(f"solera.weights.{name} is not there")


def states(count, dtype=torch.float32):
    return [
        {
            "a.weight": torch.randn(5, 7, device=DEVICE).to(dtype),
            "a.bias": torch.randn(7, device=DEVICE).to(dtype),
            "steps": torch.tensor(3, device=DEVICE),
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("method", EVERY, ids=repr)
def test_methods_are_values(method):
    assert pickle.loads(pickle.dumps(method)) == method == copy.deepcopy(method)
    assert hash(method) == hash(copy.deepcopy(method))
    assert eval(repr(method)) == method
    with pytest.raises(AttributeError):
        method.seed = 1


@pytest.mark.parametrize("method", [*EVERY, *OTHER_VOTES], ids=repr)
def test_each_method_merges_state_dicts(method):
    needs(method)
    models, base = states(2), states(1)[0]
    merged = merge(models, method, base=base, seed=3)
    assert list(merged) == list(base) and merged["steps"] == 3
    for name in ("a.weight", "a.bias"):
        assert merged[name].shape == base[name].shape and merged[name].isfinite().all()
    again = merge(models, method, base=base, seed=3)
    assert all(torch.equal(merged[name], again[name]) for name in base)


def test_linear_and_task_arithmetic_are_their_formulas():
    models, base = states(3, torch.float64), states(1, torch.float64)[0]
    a, b, c = (m["a.weight"] for m in models)
    z = base["a.weight"]

    def weight(method):
        return merge(models, method, base=base)["a.weight"]

    torch.testing.assert_close(weight(Linear()), (a + b + c) / 3)
    torch.testing.assert_close(weight(Linear([1, 2, 5])), (a + 2 * b + 5 * c) / 8)
    torch.testing.assert_close(weight(Linear([1, 2, 5], normalize=False)), a + 2 * b + 5 * c)
    torch.testing.assert_close(weight(TaskArithmetic(0.5)), z + 0.5 * (a + b + c - 3 * z))
    exact = z + 0.1 * (a - z) - 0.2 * (b - z) + (c - z)
    torch.testing.assert_close(weight(TaskArithmetic([0.1, -0.2, 1])), exact)
    assert torch.equal(weight(Copy(2)), c) and torch.equal(weight(FromBase()), z)


@pytest.mark.parametrize("method", [m for m in EVERY if type(m) in CALLED], ids=repr)
def test_the_other_methods_are_their_functions(method):
    needs(method)
    models, base = states(2, torch.float64), states(1, torch.float64)[0]
    found = merge(models, method, base=base, seed=5)["a.weight"]
    a, b = (m["a.weight"] for m in models)
    z, function = base["a.weight"], getattr(solera.weights, CALLED[type(method)])
    name = "a.weight"
    named = ({name: z}, [{name: a}, {name: b}], [0.5, 0.5])
    expected = {
        Slerp: lambda: function(a, b, 0.25),
        MultiSlerp: lambda: function([a, b], [0.5, 0.5]),
        Karcher: lambda: function([a, b], [1.0, 2.0]),
        ModelStock: lambda: function(z, [a, b])[0],
        Ties: lambda: function(z, [a, b], [1.0, 1.0], 0.3),
        Dare: lambda: function(*named, 0.5, seed=5)[name],
        Breadcrumbs: lambda: function(z, [a, b], [0.5, 0.5], 0.9, 0.01),
        Della: lambda: function(*named, 0.5, epsilon=0.1, seed=5)[name],
    }[type(method)]()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", [Dare(0.5), Della()], ids=repr)
def test_random_methods_do_not_depend_on_the_order_of_tensors(method):
    needs(method)
    models, base = states(2), states(1)[0]
    turned = [dict(reversed(list(m.items()))) for m in models]
    first = merge(models, method, base=base, seed=1)
    second = merge(turned, method, base=dict(reversed(list(base.items()))), seed=1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = merge(models, method, base=base, seed=2)
    assert not torch.equal(first["a.weight"], other["a.weight"])


def test_rules_choose_by_name_and_the_first_match_wins():
    rules = checked_rules([("a.b*", Copy(0)), ("re:a\\..*", Copy(1)), ("*", FromBase())])
    names = ("a.bias", "a.weight", "xa.weight")
    found = [chosen(name, Linear(), rules)[0] for name in names]
    assert found == [Copy(0), Copy(1), FromBase()]
    assert chosen("a.bias.b", Linear(), checked_rules({"a.bias": Copy(0)})) == (Linear(), None)
    models = states(2)
    merged = merge(models, Linear(), rules={"*.bias": Copy(1), "steps": Copy(0)})
    assert torch.equal(merged["a.bias"], models[1]["a.bias"])
    torch.testing.assert_close(
        merged["a.weight"], (models[0]["a.weight"] + models[1]["a.weight"]) / 2
    )


def test_a_rule_that_matches_nothing_is_warned_of():
    models = [{"w": torch.ones(2)}] * 2
    with pytest.warns(UserWarning, match=r"'v\*' matches the whole name of no tensor"):
        merge(models, Linear(), rules={"w": Copy(0), "v*": Copy(0)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge(models, Linear(), rules={"w": Copy(0)})


def test_a_dry_run_knows_unused_rules_and_useless_devices(tmp_path):
    write_file(tmp_path / "a.safetensors", {"layer.0.bias": torch.ones(3)}, {})
    rules = {"re:layer": Copy(), "re:layer.*": Copy(), "layer.0.bias": Copy()}
    path = tmp_path / "a.safetensors"
    plan = merge_files([path], tmp_path / "out", Linear(), rules=rules, dry_run=True)
    assert plan.notes == ["rule 're:layer' matches the whole name of no tensor"]
    assert "note     rule 're:layer'" in str(plan)
    for device in ("nowhere", "meta"):
        with pytest.raises(ValueError, match=f"device: .*{device}"):
            merge_files([path], tmp_path / "out", Linear(), device=device, dry_run=True)


def test_results_share_no_memory_with_the_models():
    models = states(2)
    before = copy.deepcopy(models)
    merged = merge(models, Copy(0))
    for t in merged.values():
        t.zero_()
    for model, kept in zip(models, before):
        assert all(torch.equal(model[name], t) for name, t in kept.items())


def test_modules_give_a_module_and_tied_weights_stay_tied():
    def network():
        net = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4, bias=False))  # noqa: E501  # fmt: skip
        net[2].weight = net[0].weight
        return net.to(DEVICE)

    nets = [network() for _ in range(2)]
    merged = merge(nets, Linear())
    assert isinstance(merged, torch.nn.Sequential) and merged[0].weight is merged[2].weight
    torch.testing.assert_close(merged[0].weight, (nets[0][0].weight + nets[1][0].weight) / 2)
    assert merged(torch.randn(3, 4, device=DEVICE)).shape == (3, 4)
    half = merge(nets, Linear(), out_dtype="bfloat16")
    assert half[0].weight.dtype == torch.bfloat16
    state = merge([net.state_dict() for net in nets], Linear())
    assert state["0.weight"] is state["2.weight"]


def test_names_tied_in_one_model_only_or_with_two_rules_are_merged_apart():
    shared, a, b = (torch.randn(3, 3, device=DEVICE) for _ in range(3))
    tied, free = {"a": shared, "b": shared}, {"a": a, "b": b}
    for models in ([tied, free], [free, tied]):
        merged = merge(models, Linear())
        torch.testing.assert_close(merged["a"], (shared + a) / 2)
        torch.testing.assert_close(merged["b"], (shared + b) / 2)
    merged = merge([tied, {"a": a, "b": a}], Linear(), rules={"b": Copy(1)})
    assert torch.equal(merged["b"], a) and merged["b"] is not merged["a"]
    torch.testing.assert_close(merged["a"], (shared + a) / 2)
    merged = merge([{"a": a, "b": a}], Dare(0.5), base=tied)
    assert merged["a"] is merged["b"]  # one mask, although masks go by name

    def network(tie):
        net = torch.nn.Sequential(*(torch.nn.Linear(3, 3, bias=False) for _ in range(2))).to(DEVICE)
        if tie:
            net[1].weight = net[0].weight
        return net

    with pytest.raises(ValueError, match=r"'1\.weight' and '0\.weight' are one tensor"):
        merge([network(True), network(False)], Linear())
    assert isinstance(merge([network(False), network(True)], Linear()), torch.nn.Sequential)


def test_mixed_dtypes_are_rounded_once():
    a, b = torch.randn(1000), torch.randn(1000)
    models = [{"w": a.bfloat16()}, {"w": b.bfloat16()}]
    exact = (models[0]["w"].double() + models[1]["w"].double()) / 2
    assert merge(models, Linear())["w"].dtype == torch.bfloat16
    wide = merge(models, Linear(), out_dtype=torch.float32)["w"]
    torch.testing.assert_close(wide.double(), exact, rtol=1e-6, atol=1e-7)
    mixed = merge([{"w": a}, {"w": b.bfloat16()}], Linear())["w"]
    assert mixed.dtype == torch.float32


def test_paths_and_state_dicts_mix(tmp_path):
    models = [{k: t.cpu() for k, t in m.items()} for m in states(2)]
    write_file(tmp_path / "a.safetensors", models[0], {})
    torch.save(models[0], tmp_path / "a.pt")
    expected = merge(models, Linear())
    for first in (tmp_path / "a.safetensors", tmp_path / "a.pt"):
        found = merge([first, models[1]], Linear())
        assert all(torch.equal(found[name], t) for name, t in expected.items())


def test_gradients_reach_the_models():
    models = [{"w": torch.randn(3, dtype=torch.float64, requires_grad=True)} for _ in range(2)]
    merge(models, Linear([1, 3]))["w"].sum().backward()
    torch.testing.assert_close(models[1]["w"].grad, torch.full((3,), 0.75, dtype=torch.float64))


def test_not_strict_copies_from_the_base():
    models, base = states(2), states(1)[0]
    del models[0]["a.bias"]
    models[1]["a.weight"] = torch.randn(2, 2, device=DEVICE)
    models[1]["extra"] = torch.randn(3, device=DEVICE)
    models[1]["steps"] = torch.tensor(4, device=DEVICE)
    with pytest.raises(ValueError, match=r"models\[0\] beside base: lacks 'a.bias'") as error:
        merge(models, Linear(), base=base)
    for text in ("'extra'", "'a.weight' of shape (2, 2), not (5, 7)"):
        assert text in str(error.value)
    merged = merge(models, Linear(), base=base, strict=False)
    assert list(merged) == list(base)
    assert all(torch.equal(merged[name], t) for name, t in base.items())


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda m: merge([], Linear()), ValueError, "K = 0"),
        (lambda m: merge(m[0], Linear()), TypeError, "models"),
        (lambda m: merge(m, "linear"), TypeError, "method"),
        (lambda m: merge([3], Linear()), TypeError, r"models\[0\]"),
        (lambda m: merge([{"a": 3}], Linear()), TypeError, r"models\[0\]\['a'\]"),
        (lambda m: merge(m, Linear([1, 2, 3])), ValueError, "expected 2, one for each model, got 3"),
        (lambda m: merge(m, TaskArithmetic(1)), ValueError, "base"),
        (lambda m: merge(m, Ties()), ValueError, "base"),
        (lambda m: merge(m, Copy(2)), ValueError, "0 to 1"),
        (lambda m: merge([*m, m[0]], Slerp()), ValueError, "Slerp takes two"),
        (lambda m: merge(m, Linear(), rules=[("re:(", Copy())]), ValueError, "regular expression"),
        (lambda m: merge(m, Linear(), rules=[("a", "copy")]), TypeError, "rules"),
        (lambda m: merge(m, Linear(), rules=["ab"]), TypeError, "rules"),
        (lambda m: merge(m, Linear(), rules={"steps": Slerp(), "*": Ties()}), ValueError, "by rule"),
        (lambda m: merge(m, Linear(), out_dtype="int8"), ValueError, "out_dtype"),
        (lambda m: merge(m, Linear(), out_dtype="no"), ValueError, "out_dtype"),
        (lambda m: merge(["/no/such"], Linear()), FileNotFoundError, "/no/such"),
        (lambda m: merge(m, Linear(), seed=2**63), ValueError, "seed"),
        (lambda m: merge(m, Linear(), seed=1.0), TypeError, "seed"),
        (lambda m: Linear([1, -1]), ValueError, "zero"),
        (lambda m: Linear("ab"), ValueError, "weights: expected a list of numbers"),
        (lambda m: Linear(3), TypeError, "weights"),
        (lambda m: Linear([float("nan")]), ValueError, "finite"),
        (lambda m: Ties(1.5), ValueError, "density"),
        (lambda m: Ties(elect="most"), ValueError, "elect"),
        (lambda m: Ties(elect=None), ValueError, "elect"),
        (lambda m: Ties(weigh="x"), ValueError, "weigh"),
        (lambda m: Ties(divide="x"), ValueError, "divide"),
        (lambda m: Ties(scale=float("nan")), ValueError, "scale"),
        (lambda m: Dare(rescale="x"), ValueError, "rescale"),
        (lambda m: Dare(consensus="x"), ValueError, "consensus"),
        (lambda m: Della(density=0.05, epsilon=0.1), ValueError, "epsilon"),
        (lambda m: Della(epsilon="x"), TypeError, "epsilon"),
        (lambda m: Breadcrumbs(gamma=-1), ValueError, "gamma"),
        (lambda m: Slerp(t=float("nan")), ValueError, "t: expected a finite"),
        (lambda m: Slerp(dim="x"), TypeError, "dim"),
        (lambda m: Slerp(colinear=2.0), ValueError, "colinear"),
        (lambda m: Della(epsilon=-0.1), ValueError, "epsilon"),
        (lambda m: MultiSlerp([1, -1]), ValueError, "zero"),
        (lambda m: Karcher([0, 0]), ValueError, "zero"),
        (lambda m: TaskArithmetic(float("nan")), ValueError, "weights"),
        (lambda m: merge(m, Slerp(dim=2)), ValueError, "dim: 2 is out of range for 'a.weight'"),
        (lambda m: ModelStock(dim=0.5), TypeError, "dim"),
        (lambda m: merge([m[0], {**m[1], "steps": torch.tensor(9)}], Linear()), ValueError, "'steps'"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, kind, says):
    with pytest.raises(kind, match=says):
        call([{k: t.cpu() for k, t in m.items()} for m in states(2)])


def test_methods_from_text():
    assert parse("linear") == Linear()
    assert parse("ties(density=0.3, weights=[1, 2])") == Ties(0.3, [1, 2])
    assert parse("task-arithmetic", weights=[1.0]) == TaskArithmetic([1.0])
    assert parse("copy(index=1)") == Copy(1) and parse("base") == FromBase()
    for text, says in {
        "tie": "one of", "ties(0.2)": "name", "ties(x=1)": "no argument 'x'", "a b": "name",
        "base(x=1)": "takes no", "task_arithmetic": "needs weights", "ties(density=f())": "name",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=says):
            parse(text)
    assert issubclass(Ties, Method)
