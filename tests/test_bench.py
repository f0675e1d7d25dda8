"""The benchmark harness on lines of its own: what it refuses, writes and compares."""

import copy
import dataclasses
import importlib
import json
import sys
import types
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench import report
from bench.__main__ import arguments
from bench.case import Case, Spec, step
from bench.check import check, relative_error
from bench.collect import collect
from bench.compare import compare, table
from bench.floor import Rates
from bench.measure import Clock, ratio, time_rounds
from bench.run import Budget, Options, run_line
from bench.session import session

CPU = torch.device("cpu")
RATES = Rates(1e10, "copy_", 2e10, {"float32": 1e11, "bfloat16": 1e10}, 1 << 20)


def spec(op="norm.square", wrong=0.0, compiled=None, dtype=torch.float32, **options):
    def make():
        x = torch.linspace(-1, 1, 1000).to(dtype)
        return Case(
            ours=step(lambda x: x * x + wrong, [x]),
            exact=step(lambda x: x.double() * x.double(), [x]),
            eager=step(lambda x: x**2, [x]),
            compiled=compiled,
            peers={"abs": step(lambda x: x.abs() ** 2, [x])},
            bytes=2 * x.nbytes,
            saved_bytes=x.nbytes,
        )

    return Spec(op, "fwd 1000", dtype, make, **options)


@pytest.fixture
def module(monkeypatch):
    """A function that makes importable modules of specs; returns their names."""

    def add(name, *specs):
        made = types.ModuleType(name)
        made.specs = lambda device: specs
        monkeypatch.setitem(sys.modules, name, made)
        return name

    return add


def run(line, rates=RATES, **options):
    return run_line(line, Options(min_time=0.001, **options), Clock(CPU), rates, Budget())


def quick_session(tmp_path, names, *more):
    args = f"--no-showcase --check-only --json {tmp_path / 'r.json'}".split()
    code = session(arguments([*args, *more]), names)
    return code, json.loads((tmp_path / "r.json").read_text())


@pytest.fixture(scope="module")
def result():
    lines = [run(spec(targets={"eager": 1e-6, "abs": 1e6, "absent": 2}))[0]]
    lines.append(run(spec("weights.square", dtype=torch.bfloat16))[0])
    machine = {
        "cpu": {"model": "a cpu", "cores": 2, "flags": ["avx2"]}, "isa": "avx2", "gpu": None,
        "versions": {"torch": "2"}, "commit": "0" * 40, "changed": False, "threads": 2, "device": "cpu",
        "allocator": {"tuned": False, "settings": {}, "preload": ""},
    }  # fmt: skip
    part = {
        "title": "a part", "columns": ["", "Solera", "plain torch"], "rows": [["time", "1x", "2x"]],
        "note": "a | note", "pictures": ["part.png"],
    }  # fmt: skip
    return {
        "date": "2026-01-01", "quick": True, "machine": machine, "rates": RATES.as_dict(),
        "lines": lines, "showcase": [part], "failures": [],
    }  # fmt: skip


def test_a_right_line_has_times_ratios_floor_and_targets():
    line, failures = run(spec(targets={"eager": 1e-6, "abs": 1e6, "absent": 2, "floor": 1e-9}))
    assert not failures and line["ok"] is True
    assert set(line["times"]) == {"ours", "eager", "abs"}
    assert set(line["ratios"]) == {"eager", "abs"}
    assert 0 < line["floor_fraction"] == pytest.approx(8e-7 / line["times"]["ours"]["median"])
    met = {name: target["met"] for name, target in line["targets"].items()}
    assert met == {"eager": True, "abs": False, "absent": None, "floor": True}


def test_a_wrong_value_makes_the_exit_code_1_and_the_others_still_run(module, tmp_path, capsys):
    names = [module("wrong_specs", spec(wrong=1e-3), spec("norm.other"))]
    code, result = quick_session(tmp_path, names)
    assert code == 1
    assert [line["ok"] for line in result["lines"]] == [False, True]
    assert "WRONG VALUE" in result["failures"][0]["what"]
    assert "WRONG VALUE" in capsys.readouterr().out


def test_a_right_run_exits_0(module, tmp_path):
    code, result = quick_session(tmp_path, [module("right_specs", spec())])
    assert code == 0 and result["failures"] == []


def test_a_module_that_does_not_import_is_reported_and_the_others_run(module, tmp_path):
    code, result = quick_session(tmp_path, ["no_such_specs", module("right_specs", spec())])
    assert code == 1
    assert [line["ok"] for line in result["lines"]] == [True]
    assert result["failures"][0]["where"] == "no_such_specs"


def test_a_case_that_raises_is_reported():
    def make():
        raise ValueError("no data")

    line, failures = run(Spec("norm.x", "fwd", torch.float32, make))
    assert line["failure"] == "ValueError: no data" and failures[0].what == line["failure"]
    assert report.row(line)[3] == "FAILED"


def test_a_compile_that_fails_is_a_reason_in_the_column():
    def broken():
        raise RuntimeError("no compiler")

    line, failures = run(spec(compiled=broken))
    assert not failures
    assert line["skipped"]["compile"] == "RuntimeError: no compiler"
    assert report.row(line)[6] == "failed"


@pytest.mark.parametrize(
    ("options", "runs"),
    [({}, False), ({"targets": {"compile": 1.0}}, True), ({"compile_in_quick": True}, True)],
)
def test_quick_compiles_only_where_asked(options, runs):
    line, _ = run(spec(compiled=lambda: [torch.zeros(1000)], **options), quick=True)
    assert ("compile" in line["times"]) is runs


def test_quick_past_its_time_runs_only_lines_with_a_target():
    spent = Budget(total=-1.0)
    line, _ = run_line(spec(), Options(min_time=0.001), Clock(CPU), RATES, spent)
    assert line["ok"] is None and not line["times"] and "--quick" in line["skipped"]["ours"]
    line, _ = run_line(
        spec(targets={"eager": 1}), Options(min_time=0.001), Clock(CPU), RATES, spent
    )
    assert line["times"]


def test_tolerance_is_twice_eagers_error_or_one_ulp():
    exact = torch.ones(4, dtype=torch.float64)
    case = Case(ours=list, exact=list)
    off = lambda e: [(exact + e)]
    assert check(case, off(1.9e-3), [exact], off(1e-3))[0].ok
    assert not check(case, off(2.1e-3), [exact], off(1e-3))[0].ok
    assert check(case, [torch.ones(4)], [exact], None)[0].ok
    assert not check(case, [torch.ones(4) + 1e-6], [exact], None)[0].ok
    case.tolerance = 1e-2
    assert check(case, off(9e-3), [exact], off(0.0))[0].ok


def test_missing_tensors_shapes_and_nans_are_wrong():
    exact, case = torch.ones(4), Case(ours=list, exact=list)
    assert not check(case, [], [exact], None)[0].ok
    assert not check(case, [torch.ones(1)], [exact], None)[0].ok
    nan = torch.tensor([1.0, float("nan")])
    assert relative_error(nan, nan) == 0
    assert relative_error(torch.ones(2), nan) == float("inf")
    assert relative_error(nan, torch.ones(2)) == float("inf")
    assert relative_error(torch.tensor([float("inf"), 1]), torch.tensor([float("inf"), 1])) == 0


def test_rounds_are_paired_and_slow_contenders_leave_early():
    calls = {"ours": 0, "slow": 0}

    def clock(step, inner):
        step()
        return 0.001 if step is ours else 1.0

    def ours():
        calls["ours"] += 1

    def slow():
        calls["slow"] += 1

    samples, _ = time_rounds({"ours": ours, "slow": slow}, clock, 0.02)
    assert len(samples["ours"]) == 20 and len(samples["slow"]) == 3
    assert ratio(samples["slow"], samples["ours"]).median == pytest.approx(1000)


def test_short_calls_are_looped_inside_a_sample():
    _, inner = time_rounds({"ours": lambda: None}, Clock(CPU), 0.001)
    assert inner["ours"] > 1


def test_the_floor_takes_reads_without_writes_at_the_read_rate():
    assert RATES.floor(900, None, 0, "float32") == pytest.approx(900 / 1e10)
    assert RATES.floor(900, 100, 0, "float32") == pytest.approx(200 / 1e10 + 700 / 2e10)
    # float32 products are the faster ones here
    assert RATES.floor(900, 100, 10_000, "bfloat16") == pytest.approx(1e4 / 1e11)
    assert RATES.floor(0, None, 0, "float32") is None
    later = dataclasses.replace(RATES, end=4e10)
    assert later.floor(900, None, 0, "float32") == pytest.approx(900 / 4e10)


def test_filters(module):
    name = module("filtered", spec(), spec("weights.a", quick=False), spec("weights.b"))
    ops = lambda *options: [s.op for s in collect(CPU, *options, names=[name])[0]]
    assert ops() == ["norm.square", "weights.a", "weights.b"]
    assert ops("weights") == ["weights.a", "weights.b"]
    assert ops(None, "s.b") == ["weights.b"]
    assert ops("weights", None, True) == ["weights.b"]


def test_every_shipped_module_of_lines_imports():
    _, failures = collect(CPU)
    assert [f.where for f in failures] == []


def test_every_shipped_showcase_imports():
    from bench import showcase

    for name in showcase.MODULES:
        assert callable(importlib.import_module(f"bench.showcase.{name}").run)


@pytest.mark.parametrize("rich", [True, False])
def test_the_table_renders(result, monkeypatch, capsys, rich):
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setattr(report, "Console", None)
    rows = [report.row(line) for line in result["lines"]]
    report.Printer().table("norm", list(report.COLUMNS), rows)
    out = capsys.readouterr().out
    assert "norm.square" in out and "✓" in out and "✗1e+06" in out and "abs" in out


def test_json_round_trip(result, tmp_path):
    report.write_json(result, tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(result))


def test_render_writes_the_page_and_finds_the_pictures(result, tmp_path):
    source = tmp_path / "results" / "latest.json"
    report.write_json(result, source)
    for name in ("latest.png", "part.png"):
        source.with_name(name).write_bytes(b"")
    page = tmp_path / "docs" / "benchmarks.md"
    report.render(source, page)
    text = page.read_text()
    assert "![speed](../results/latest.png)" in text and "![a part](../results/part.png)" in text
    assert "## norm" in text and "## weights" in text and "1 of 3 targets met" in text
    assert "| time | 1x | 2x |" in text


def test_compare_marks_a_regression_and_forgives_a_slow_machine(result):
    def slowed(ours, eager):
        new = copy.deepcopy(result)
        line = new["lines"][0]
        line["times"]["ours"]["median"] *= ours
        line["ratios"]["eager"]["median"] *= eager / ours
        return compare(result, new)[0]

    assert slowed(1.3, 1.0)["slower"]
    assert not slowed(1.1, 1.0)["slower"]
    assert not slowed(1.3, 1.3)["slower"]
    columns, rows = table([slowed(1.3, 1.0)])
    assert len(columns) == len(rows[0]) and "slower" in rows[0][-1]


def test_the_picture_is_drawn(result, tmp_path):
    pytest.importorskip("matplotlib")
    from bench.plot import draw

    assert draw(result, tmp_path / "p.png") and (tmp_path / "p.png").stat().st_size > 1000
    assert not draw({**result, "lines": []}, tmp_path / "q.png")


def test_units():
    assert report.seconds(2.5e-6) == "2.5 us" and report.seconds(0.5) == "500 ms"
    assert report.amount(67108864) == "67.11 MB" and report.times(123.4) == "123x"
