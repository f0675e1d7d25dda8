"""Averages across processes: two of them, on gloo, beside one that holds all. And shards as FSDP2 makes them."""

import datetime
import sys
import time

import pytest
import torch
import torch.distributed as dist
from helpers import DEVICE, INTERPRETED

from solera.weights import (
    SAM,
    anchor_decay_,
    average_parameters_,
    ema_,
    ema_over_group_,
    lincomb,
    lookahead_,
    merge,
    sam_perturb_,
    sam_restore_,
    soup_over_group,
)
from solera.weights.methods import Linear

pytestmark = pytest.mark.skipif(
    INTERPRETED
    or DEVICE != "cpu"
    or not dist.is_available()
    or not sys.platform.startswith("linux"),
    reason="two processes on gloo; the kernels have tests of their own",
)
SHAPES = [(3, 5), (700,), (), (0, 4), (40, 30), (1,)]
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
SECONDS = 180


def model_of(rank):
    """The parameters process `rank` holds; one of them strided."""
    generator = torch.Generator().manual_seed(rank)
    made = []
    for i, shape in enumerate(SHAPES):
        t = torch.randn(shape, generator=generator, dtype=torch.float64).to(DTYPES[i % 4])
        made.append(t.t().contiguous().t() if i == 4 else t)
    return made


def net():
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2))


def refused(call):
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def plain_cases(rank):
    mine, weight = model_of(rank), float(1 + 2 * rank)
    equal = [t.clone() for t in mine]
    average_parameters_(equal)
    weighted = [torch.nn.Parameter(t.clone()) for t in mine]
    average_parameters_(iter(weighted), weight, bucket_bytes=1000)
    on_device = [t.clone() for t in mine]
    average_parameters_(on_device, torch.tensor(weight), dist.new_group([0, 1]))
    named = {f"p{i}": t for i, t in enumerate(mine)} | {"steps": torch.tensor(rank)}
    soup = soup_over_group(named, weight)
    averages = [torch.ones(s) for s in SHAPES]
    ema_over_group_(averages, mine, 0.75, weights=weight, bucket_bytes=100)
    own = dist.new_group([rank], use_local_synchronization=True)
    alone = [t.clone() for t in mine]
    average_parameters_(alone, 0.3, own)
    return {
        "equal": equal, "weighted": [p.detach() for p in weighted], "on device": on_device,
        "soup": soup, "ema": averages, "alone": alone, "version": weighted[0]._version,
        "kept": [torch.equal(a, b) for a, b in zip(mine, model_of(rank))],
        "errors": [
            refused(lambda: average_parameters_(mine, -1)),
            refused(lambda: average_parameters_(mine, "a")),
            refused(lambda: average_parameters_(mine, torch.ones(2))),
            refused(lambda: average_parameters_([])),
            refused(lambda: average_parameters_([mine[0], mine[0]])),
            refused(lambda: ema_over_group_(averages[:1], mine, 0.5)),
        ],
    }  # fmt: skip


def shard_cases(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    line = init_device_mesh("cpu", (2,))
    whole = [model_of(0)[0], model_of(0)[1]]
    split = lambda ts: [distribute_tensor(t.clone(), line, [Shard(0)]) for t in ts]
    found = {}
    w, g, kept = split(whole), split(model_of(1)[:2]), split(whole)
    found["norm"] = sam_perturb_(w, g, 0.5, backup=kept)
    found["climbed"] = [t.full_tensor() for t in w]
    sam_restore_(w, backup=kept)
    found["restored"] = [t.full_tensor() for t in w]
    found["asam"] = sam_perturb_([*w, whole[0].clone()], [*g, whole[0]], adaptive=True)
    w = split(whole)
    anchor_decay_(w, g, 0.25)
    found["decayed"] = [t.full_tensor() for t in w]
    w = split(whole)
    ema_(w, g, 0.75)
    found["ema"] = [t.full_tensor() for t in w]
    w, fast = split(whole), split(model_of(1)[:2])
    lookahead_(w, fast, 0.25)
    found["lookahead"] = [t.full_tensor() for t in (*w, *fast)]
    # Shards of one shape and no address of their own are not one tensor.
    named = [{"a": t, "b": t + 1} for t in (split(whole)[0], g[0])]
    merged = merge(named, Linear([1, 3]))
    found["merged"] = [merged["a"].full_tensor(), merged["b"].full_tensor()]
    w = [t.requires_grad_() for t in split(whole)]
    mixed = lincomb([[*w, whole[0]], [*g, whole[0]]], [0.25, 0.75], base=[*g, whole[0]])
    sum(t.square().sum() for t in mixed[:2]).backward()
    found["mixed"] = [*(t.full_tensor().detach() for t in mixed[:2]), mixed[2]]
    found["gradients"] = [t.grad.full_tensor() for t in w]
    with torch.no_grad():
        named = lincomb([{"a": w[0]}, {"a": g[0]}], [0.25, 0.75])
        lincomb([w[0], g[0]], [0.25, 0.75], out=w[0])
        assert torch.equal(named["a"].full_tensor(), w[0].full_tensor())
    c = torch.ones(1, requires_grad=True)
    assert "coefficients: their gradient" in refused(lambda: lincomb([w[0]], c))
    assert "redistribute them alike" in refused(lambda: lincomb([w[0], whole[0]], [1.0, 1.0]))
    grid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    mine = [
        DTensor.from_local(t.clone(), grid, [Replicate(), Shard(0)], run_check=False)
        for t in model_of(rank)[:2]
    ]
    soup = soup_over_group(mine, 1.0 + 2 * rank)
    found["soup"] = [t.to_local() for t in soup]
    assert all(isinstance(t, DTensor) for t in soup)
    average_parameters_(mine, 1.0 + 2 * rank)
    found["hsdp"] = [t.to_local() for t in mine]
    partial = DTensor.from_local(torch.ones(3), line, [Partial()])
    found["errors"] = [
        refused(lambda: average_parameters_(w)),
        refused(lambda: average_parameters_(w, group=line.get_group())),
        refused(lambda: average_parameters_([mine[0], whole[1]])),
        refused(lambda: average_parameters_([partial])),
    ]
    return found


def fsdp_case(rank):
    from torch.distributed.fsdp import fully_shard

    model = net()
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    sam = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.2)
    train(model, sam)
    return [p.full_tensor().detach() for p in model.parameters()]


def train(model, sam):
    torch.manual_seed(6)
    x, y = torch.randn(8, 3), torch.randn(8, 2)

    def closure():
        sam.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        sam.step(closure)


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=SECONDS),
    )  # fmt: skip
    try:
        found = {"plain": plain_cases(rank), "shards": shard_cases(rank), "fsdp": fsdp_case(rank)}
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    running = torch.multiprocessing.spawn(process, (str(folder),), nprocs=2, join=False)
    end = time.monotonic() + SECONDS
    try:
        while not running.join(timeout=1):
            assert time.monotonic() < end, "two processes did not end in time"
    finally:
        for child in running.processes:
            if child.is_alive():
                child.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def close(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=max(1e-6, torch.finfo(a.dtype).eps), atol=1e-7)


@pytest.mark.parametrize(
    "name, weights",
    [("equal", [0.5, 0.5]), ("weighted", [0.25, 0.75]), ("on device", [0.25, 0.75])],
)
def test_the_numbers_of_one_process_that_holds_all(both, name, weights):
    wanted = lincomb([model_of(0), model_of(1)], weights)
    for found in both:
        close(found["plain"][name], wanted)
    assert all(torch.equal(a, b) for a, b in zip(*(f["plain"][name] for f in both)))
    assert both[0]["plain"]["version"] > 0


def test_soup_and_moving_average_leave_the_parameters(both):
    wanted = lincomb([model_of(0), model_of(1)], [0.25, 0.75])
    exact = lincomb([[t.double() for t in model_of(r)] for r in (0, 1)], [0.25, 0.75])
    averages = [torch.ones(s) + 0.25 * (t.float() - torch.ones(s)) for s, t in zip(SHAPES, exact)]
    for rank, found in enumerate(f["plain"] for f in both):
        assert all(found["kept"])
        assert found["soup"].pop("steps") == rank
        close(found["soup"].values(), wanted)
        close(found["ema"], averages)
        close(found["alone"], model_of(rank))  # a group of one


def test_errors_name_what_is_wrong(both):
    expected = [
        "ValueError: weights: expected a finite number not below 0, got -1",
        "TypeError: weights: expected this process's weight, a number, got 'a'",
        "ValueError: weights: expected this process's weight, one floating-point number, got shape (2,)",
        "ValueError: parameters: expected at least one",
        "ValueError: parameters: the same tensor is given twice",
        f"ValueError: averages: expected {len(SHAPES)} tensors like parameters, got 1",
    ]
    for error, start in zip(both[0]["plain"]["errors"], expected, strict=True):
        assert error.startswith(start)
    expected = [
        "ValueError: parameters: each shard exists once",
        "ValueError: group: parameters[0] is sharded over it",
        "ValueError: parameters: replicated along different mesh dimensions",
        "ValueError: parameters[0]: a DTensor of partial sums",
    ]
    for error, start in zip(both[1]["shards"]["errors"], expected, strict=True):
        assert error.startswith(start)
    with pytest.raises(RuntimeError, match=r"torch\.distributed: not initialised"):
        average_parameters_(model_of(0))


def test_shards_move_as_the_whole(both):
    w, g = model_of(0)[:2], model_of(1)[:2]
    climbed = [t.clone() for t in w]
    norm = sam_perturb_(climbed, g, 0.5)
    adaptive = sam_perturb_([*(t.clone() for t in w), w[0].clone()], [*g, w[0]], adaptive=True)
    decayed, averages = [t.clone() for t in w], [t.clone() for t in w]
    anchor_decay_(decayed, g, 0.25)
    ema_(averages, g, 0.75)
    for found in (f["shards"] for f in both):
        torch.testing.assert_close(found["norm"], norm)
        torch.testing.assert_close(found["asam"], adaptive)
        close(found["climbed"], climbed)
        assert all(torch.equal(a, b) for a, b in zip(found["restored"], w))
        close(found["decayed"], decayed)
        close(found["ema"], averages)
        close(found["lookahead"], [*averages, *averages])
        mixed = lincomb([w[0], g[0]], [0.25, 0.75])
        close(found["merged"], [mixed, mixed + 1])


def test_combinations_of_shards(both):
    w, g = [t.requires_grad_() for t in model_of(0)[:2]], model_of(1)[:2]
    whole = w[0].detach()
    mixed = lincomb([[*w, whole], [*g, whole]], [0.25, 0.75], base=[*g, whole])
    sum(t.square().sum() for t in mixed[:2]).backward()
    for found in (f["shards"] for f in both):
        close(found["mixed"], [t.detach() for t in mixed])
        close(found["gradients"], [t.grad for t in w])


def test_replicated_shards_are_averaged_over_their_replicas(both):
    wanted = lincomb([model_of(0)[:2], model_of(1)[:2]], [0.25, 0.75])
    for found in (f["shards"] for f in both):
        close(found["soup"], wanted)
        close(found["hsdp"], wanted)


def test_sam_on_fsdp2_is_sam_on_one_process(both):
    model = net()
    train(model, SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.2))
    for found in both:
        for a, b in zip(found["fsdp"], model.parameters(), strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)
