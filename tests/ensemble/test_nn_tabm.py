"""TabM's modules beside the PyPI package tabm: same start, checkpoints both ways, same values, its own examples."""

import copy
import doctest
import inspect
import io
import pickle
import warnings

import pytest
import torch
from helpers import DEVICE, assert_accurate, randn

from solera import nn

tabm = pytest.importorskip("tabm")

pytestmark = (
    pytest.mark.no_interpreter
)  # compositions of cores that their own tests run interpreted

NAMES = (
    "BatchNorm1dEnsemble", "ElementwiseAffine", "EnsembleView", "LayerNormEnsemble",
    "LinearBatchEnsemble", "LinearEnsemble", "MLPBackbone", "MLPBackboneBatchEnsemble",
    "MLPBackboneEnsemble", "MLPBackboneEnsembleBase", "MLPBackboneMiniEnsemble", "TabM",
    "batchensemble_linear_layers_", "ensemble_batchnorm1d_layers_", "ensemble_layernorm_layers_",
    "ensemble_linear_layers_", "ensemble_view", "init_scaling_", "make_tabm_backbone",
)  # fmt: skip
BACKBONE = {"d_in": 7, "n_blocks": 3, "d_block": 12, "dropout": 0.0, "k": 4}
START = {"tabm_init": True, "scaling_init": "normal", "start_scaling_init_chunks": [3, 4]}
MINI = {"affine_bias": True, "affine_scaling_init": "random-signs"}
CASES = {
    "affine": ("ElementwiseAffine", ((4, 7),), {"bias": True, "scaling_init": "normal"}),
    "batch_norm": ("BatchNorm1dEnsemble", (7,), {"k": 4}),
    "batch_norm_plain": ("BatchNorm1dEnsemble", (7,), {"k": 4, "affine": False, "momentum": 0.3}),
    "layer_norm": ("LayerNormEnsemble", (7,), {"k": 4}),
    "layer_norm_2d": ("LayerNormEnsemble", ((4, 7),), {"k": 1}),
    "layer_norm_bias": ("LayerNormEnsemble", (7,), {"k": 4, "bias": False}),
    "backbone": ("MLPBackbone", (), {n: v for n, v in BACKBONE.items() if n != "k"}),
    "packed": ("MLPBackboneEnsemble", (), BACKBONE),
    "mini": ("MLPBackboneMiniEnsemble", (), {**BACKBONE, **MINI, "activation": "SiLU"}),
    "batch": ("MLPBackboneBatchEnsemble", (), {**BACKBONE, **START}),
    "batch_gelu": ("MLPBackboneBatchEnsemble", (), {**BACKBONE, **START, "activation": "GELU"}),
    "batch_tanh": ("MLPBackboneBatchEnsemble", (), {**BACKBONE, **START, "activation": "Tanh"}),
}
MODELS = {
    "tabm": {"start_scaling_init": "normal"},
    "tabm-mini": {"start_scaling_init": "random-signs"},
    "tabm-packed": {"start_scaling_init": None},
}


def pair(name, *args, **options):
    out = []
    for package in (nn, tabm):
        torch.manual_seed(1)
        out.append(getattr(package, name)(*args, **options).to(DEVICE))
    return out


def same_start(ours, theirs):
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)


def same_values(ours, theirs, *inputs):
    """Outputs and gradients: within twice tabm's error against itself in float64."""
    exact = copy.deepcopy(theirs).double()
    doubles = [x.double() if x.is_floating_point() else x for x in inputs]
    a, b, c = ours(*inputs), exact(*doubles), theirs(*inputs)
    assert_accurate(a, b, c)
    g = randn(*a.shape)
    for out, grad in ((a, g), (b, g.double()), (c, g)):
        if out.requires_grad:
            out.backward(grad)
    for (name, p), (_, q), (_, r) in zip(
        ours.named_parameters(), exact.named_parameters(), theirs.named_parameters()
    ):
        scale = q.grad.norm() + 1e-30
        error, other = (p.grad - q.grad).norm() / scale, (r.grad - q.grad).norm() / scale
        assert error <= max(2 * other, 1e-6), name


@pytest.mark.parametrize("case", CASES)
def test_module_is_tabms(case):
    name, args, options = CASES[case]
    ours, theirs = pair(name, *args, **options)
    same_start(ours, theirs)
    same_values(
        ours,
        theirs,
        randn(
            6, 1 if case == "layer_norm_2d" else 4, *((4, 7) if case == "layer_norm_2d" else (7,))
        ),
    )
    if isinstance(theirs, tabm.MLPBackboneEnsembleBase):
        assert isinstance(ours, nn.MLPBackboneEnsembleBase)
        assert ours.get_original_output_shape() == theirs.get_original_output_shape()
        shared = randn(6, 7).unsqueeze(1).expand(-1, 4, -1)
        assert_accurate(ours(shared), theirs.double()(shared.double()), theirs.float()(shared))


@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.parametrize("categories", [[], [2, 3]])
def test_whole_model_is_tabms(arch, categories):
    options = {
        "n_num_features": 5, "cat_cardinalities": categories, "d_out": 2, "n_blocks": 2,
        "d_block": 9, "dropout": 0.0, "k": 3, "arch_type": arch, **MODELS[arch],
    }  # fmt: skip
    ours, theirs = pair("TabM", **options)
    same_start(ours, theirs)
    inputs = [randn(8, 5)]
    if categories:
        inputs.append(torch.stack([torch.randint(c, (8,), device=DEVICE) for c in categories], 1))
    same_values(ours, theirs, *inputs)
    own = [x.unsqueeze(1).repeat(1, 3, 1) for x in inputs]  # a batch for each member
    torch.testing.assert_close(ours(*own), theirs(*own))
    assert ours(*(x[:0] for x in own)).shape == (0, 3, 2)
    folded = ours.eval().fold_for_inference()
    torch.testing.assert_close(folded(*inputs), ours(*inputs))
    assert torch.equal(pickle.loads(pickle.dumps(ours))(*inputs), ours(*inputs))
    assert "LinearEnsemble" in repr(copy.deepcopy(ours))


def test_all_public_names_take_tabms_arguments():
    public = [n for n, v in vars(tabm).items() if getattr(v, "__module__", "") == "tabm"]
    functions = [n for n in public if not n.startswith("_") and not n.endswith("Kwargs")]
    assert sorted(functions) == sorted(NAMES)
    for name in NAMES:
        theirs, ours = getattr(tabm, name), getattr(nn, name)
        calls = [(theirs, ours)]
        if inspect.isclass(theirs):
            methods = [m for c in theirs.__mro__ if c.__module__ == "tabm" for m in vars(c)]
            calls = [(getattr(theirs, m), getattr(ours, m)) for m in methods if m[0] != "_"]
            calls.append((theirs.__init__, ours.__init__))
        for old, new in calls:
            if not callable(old):
                continue
            parameters = inspect.signature(new).parameters.values()
            open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
            found = {p.name: p.default for p in parameters}
            for p in inspect.signature(old).parameters.values():
                if p.kind is not p.VAR_KEYWORD and p.name != "options":
                    assert found[p.name] == p.default if p.name in found else open_ended, (name, p)


def test_functions_are_tabms():
    def network():
        layers = torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.LayerNorm(5)
        return torch.nn.Sequential(*layers, torch.nn.Sequential(torch.nn.Linear(5, 2)))

    made = []
    for package in (nn, tabm):
        torch.manual_seed(4)
        net = network()
        package.batchensemble_linear_layers_(net, include=[net[0]], k=3, scaling_init="normal")
        package.ensemble_linear_layers_(net, exclude=[], k=3)
        package.ensemble_batchnorm1d_layers_(net, k=3)
        package.ensemble_layernorm_layers_(net, k=3)
        chunks = package.init_scaling_(torch.empty(2, 5), "normal", [2, 3])
        backbone = package.make_tabm_backbone(
            **BACKBONE, start_scaling_init="random-signs", start_scaling_init_chunks=[3, 4]
        )
        made.append((net, backbone, chunks))
    (ours, backbone, chunks), (theirs, other, their_chunks) = made
    assert torch.equal(chunks, their_chunks)
    same_start(ours, theirs)
    same_start(backbone, other)
    members = ours[3][0].weight
    assert not torch.equal(members[0], members[1])  # drawn anew: copies would stay copies
    x = torch.randn(8, 6)
    view = nn.ensemble_view(x, 3, True)
    torch.testing.assert_close(ours(view), theirs(view))
    assert view.data_ptr() == x.data_ptr() and view.shape == (8, 3, 6)


def test_embeddings_and_defaults():
    embeddings = pytest.importorskip("rtdl_num_embeddings")
    for make in (
        lambda: embeddings.LinearReLUEmbeddings(4, 3),
        lambda: embeddings.PeriodicEmbeddings(4, 3, lite=False),
    ):
        models = []
        for package in (nn, tabm):
            torch.manual_seed(2)
            model = package.TabM.make(
                n_num_features=4, d_out=1, num_embeddings=make(), k=5, d_block=16
            )
            models.append(model.eval())
        same_start(*models)
        x = randn(7, 4).cpu()
        torch.testing.assert_close(models[0](x), models[1](x))
    default = nn.TabM.make(n_num_features=3, d_out=None)
    assert default.k == 32 and default(torch.randn(2, 3)).shape == (2, 32, 512)


def test_trains_like_tabm_and_drops_out():
    ours, theirs = pair(
        "TabM", n_num_features=6, d_out=3, n_blocks=2, d_block=16, dropout=0.0, k=4,
        start_scaling_init="random-signs",
    )  # fmt: skip
    x, y = randn(32, 6), torch.randint(3, (32, 4), device=DEVICE)
    for model in (ours, theirs):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        for _ in range(4):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
            optimizer.step()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    for block in ours.backbone.blocks:
        block[2].p = 0.5
    torch.manual_seed(3)
    first = ours(x)
    torch.manual_seed(3)
    assert torch.equal(ours(x), first) and not torch.equal(ours(x), first)
    assert torch.equal(ours.eval()(x), ours(x))


def test_hooks_and_replaced_layers_are_respected():
    ours, theirs = pair("MLPBackboneBatchEnsemble", **BACKBONE, **START)
    x, seen = randn(3, 4, 7), []
    want = ours(x)
    ours.blocks[1][1].register_forward_hook(lambda module, args, out: seen.append(out))
    torch.testing.assert_close(ours(x), want)
    assert len(seen) == 1
    ours.blocks[1][1]._forward_hooks.clear()
    everyone = torch.nn.modules.module.register_module_forward_hook(lambda *a: seen.append(a[0]))
    try:
        torch.testing.assert_close(ours(x), want)
    finally:
        everyone.remove()
    assert ours.blocks[0][0] in seen
    ours.blocks[0] = torch.nn.Sequential(ours.blocks[0][0], torch.nn.Tanh(), torch.nn.Dropout(0))
    theirs.blocks[0] = torch.nn.Sequential(
        theirs.blocks[0][0], torch.nn.Tanh(), torch.nn.Dropout(0)
    )
    torch.testing.assert_close(ours(x), theirs(x))


def test_tabms_own_examples_run_with_these_classes(monkeypatch):
    for name in NAMES:
        monkeypatch.setattr(tabm, name, getattr(nn, name))
    finder = doctest.DocTestFinder(recurse=True)
    runner, said = doctest.DocTestRunner(), io.StringIO()
    ran = 0
    for name, value in [*vars(tabm).items()]:
        original = getattr(ORIGINALS, name, value)  # the docstring is tabm's, the class is not
        if getattr(original, "__module__", None) != "tabm":
            continue
        for test in finder.find(original, name, globs={**vars(tabm), "torch": torch}):
            if test.examples:
                runner.run(test, out=said.write)
                ran += 1
    assert ran >= 11 and runner.failures == 0, said.getvalue()


class ORIGINALS:
    """tabm's classes before a test puts others in their place."""


for _name in NAMES:
    setattr(ORIGINALS, _name, getattr(tabm, _name))


def test_from_torchs_layers_copies_values():
    linear, x = torch.nn.Linear(7, 5), torch.randn(6, 3, 7)
    made = nn.LinearBatchEnsemble.from_linear(linear, k=3, scaling_init="ones", copy=True)
    torch.testing.assert_close(made(x), linear(x))
    copies = nn.LinearEnsemble.from_linear(linear, k=3, copy=True)
    torch.testing.assert_close(copies(x), linear(x))
    norm = torch.nn.LayerNorm(7)
    torch.nn.init.normal_(norm.weight)
    torch.testing.assert_close(nn.LayerNormEnsemble.from_layernorm(norm, k=3)(x), norm(x))
    plain = torch.nn.LayerNorm(7, elementwise_affine=False)
    torch.testing.assert_close(nn.LayerNormEnsemble.from_layernorm(plain, k=3)(x), plain(x))
    batch = torch.nn.BatchNorm1d(7)
    torch.nn.init.normal_(batch.weight)
    batch(torch.randn(20, 7))
    made = nn.BatchNorm1dEnsemble.from_batchnorm1d(batch, k=3).eval()
    torch.testing.assert_close(made(x)[:, 1], batch.eval()(x[:, 1]))


BAD = [
    (lambda: nn.EnsembleView(k=0), ValueError, "k: expected"),
    (lambda: nn.EnsembleView(k=3)(torch.ones(2, 4, 5)), ValueError, r"x: expected shape \(B, D\)"),
    (lambda: nn.ElementwiseAffine((4,), bias=False, scaling_init="zeros"), ValueError, "scaling_init"),
    (lambda: nn.ElementwiseAffine((4,), bias=False, scaling_init="ones")(torch.ones(3)), ValueError, "x: "),
    (lambda: nn.LayerNormEnsemble(4, k=2)(torch.ones(3, 1, 4)), ValueError, "x: expected shape"),
    (lambda: nn.BatchNorm1dEnsemble(4, k=2)(torch.ones(3, 4, 2)), ValueError, "x: expected shape"),
    (lambda: nn.MLPBackboneEnsemble(**{**BACKBONE, "activation": "Relu"}), ValueError, "activation"),
    (lambda: nn.MLPBackboneEnsemble(**{**BACKBONE, "d_in": 0}), ValueError, "d_in: expected"),
    (lambda: nn.MLPBackboneEnsemble(**BACKBONE)(torch.ones(2, 1, 7)), ValueError, "x: expected shape"),
    (lambda: nn.TabM.make(d_out=1), ValueError, "n_num_features: expected"),
    (lambda: nn.TabM.make(n_num_features=2, d_out=1, d_in=3), TypeError, "d_in"),
    (lambda: nn.TabM.make(n_num_features=2, d_out=1, arch_type="x"), ValueError, "arch_type"),
    (lambda: nn.TabM.make(n_num_features=2, d_out=1, start_scaling_init=None), ValueError, "start_sc"),
    (lambda: nn.TabM.make(n_num_features=2, d_out=1, num_embeddings=3), TypeError, "num_embeddings"),
    (lambda: nn.TabM.make(n_num_features=2, d_out=1, k=2)(), RuntimeError, "x_num: expected"),
    (lambda: nn.TabM.make(n_num_features=2, d_out=1, k=2)(torch.ones(3, 4)), RuntimeError, "x_num"),
    (lambda: nn.TabM.make(n_num_features=2, d_out=1, k=2)([[1.0, 2.0]]), TypeError, "x_num: expected a torch"),
    (lambda: nn.TabM.make(n_num_features=2, d_out=1, k=2)(torch.ones(3, 2).long()), TypeError, "x_num: exp"),
    (lambda: nn.TabM.make(cat_cardinalities=[2], d_out=1, k=2)(None, torch.ones(3, 1)), TypeError, "x_cat: "),
    (lambda: nn.init_scaling_(torch.ones(3), "zeros"), ValueError, "distribution: expected"),
    (lambda: nn.init_scaling_(torch.ones(3), "normal", [2]), ValueError, "chunks: expected"),
    (lambda: nn.ensemble_view(torch.ones(3), 2, True), ValueError, "x: expected shape"),
    (lambda: nn.ensemble_linear_layers_(torch.nn.ReLU(), include=[], exclude=[], k=2), ValueError, "include: "),
    (lambda: nn.ensemble_linear_layers_(torch.nn.ReLU(), include=[torch.nn.Tanh()], k=2), ValueError, "include.0"),
    (lambda: nn.ensemble_linear_layers_(torch.nn.ReLU(), exclude=[torch.nn.Linear(1, 1)], k=2), ValueError, "excl"),
    (lambda: nn.make_tabm_backbone(**BACKBONE, arch_type="tabm-packed", start_scaling_init=None,
        start_scaling_init_chunks=[7]), ValueError, "start_scaling_init_chunks"),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(BAD)))
def test_bad_input(index):
    call, error, message = BAD[index]
    with pytest.raises(error, match=message):
        call()


def test_own_batches_outside_training_are_warned_of():
    view = nn.EnsembleView(k=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        view(torch.ones(3, 2, 4))
        view.eval()(torch.ones(3, 4))
    with pytest.warns(UserWarning, match="outside training"):
        view(torch.ones(3, 2, 4))
