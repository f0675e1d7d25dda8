"""Merges of files as runs: memory, kills, full disks, errors of the system, progress."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import assert_same, load, saved, sharded, state, two_sweeps
from helpers import SANITIZED

from solera.weights import merge, merge_files
from solera.weights.methods import Karcher, Linear

MiB = 1 << 20


MEASURE = """
import sys, threading, time
from solera.weights import merge_files
from solera.weights.methods import Karcher, ModelStock, TaskArithmetic, Ties, Dare, Breadcrumbs
import solera.weights._ring

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(l.split()[1]) for l in file if l.startswith("RssAnon")) * 1024

*inputs, base, output, budget, method = sys.argv[1:]
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

thread = threading.Thread(target=watch, daemon=True)
thread.start()
merge_files(inputs, output, eval(method), base=base, max_memory=int(budget))
done = True
thread.join()
print(max(peak, anonymous()) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells the memory")
@pytest.mark.skipif(SANITIZED, reason="AddressSanitizer keeps what was freed")
@pytest.mark.parametrize(
    "method",
    [
        "TaskArithmetic(0.5)",
        pytest.param("Karcher()", marks=two_sweeps),
        pytest.param("ModelStock()", marks=two_sweeps),
        "Ties()",
        "Breadcrumbs()",
        "Dare()",
        pytest.param("Dare(rescale='l1')", marks=two_sweeps),
    ],
)
def test_memory_stays_within_the_budget(tmp_path, ring, method):
    n, budget = 6_000_000, (72 if method.startswith("Task") else 60) * MiB
    states = [{"w": torch.randn(n), "v": torch.randn(n // 8, 4)} for _ in range(3)]
    paths = saved(tmp_path, states)
    assert sum(p.stat().st_size for p in paths) > 1.4 * budget
    command = [sys.executable, "-c", MEASURE, *map(str, paths), str(tmp_path / "out.safetensors")]
    command += [str(budget), method]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < budget


KILLED = """
import sys, time
from solera.weights import merge_files
from solera.weights.methods import Karcher, Linear

def stop(done, total):
    if done > total // 2:
        print("half", flush=True)
        time.sleep(600)

*inputs, output, method = sys.argv[1:]
merge_files(inputs, output, eval(method), max_memory="48MiB", progress=stop)
"""


@pytest.mark.parametrize("method", [Linear(), pytest.param(Karcher(), marks=two_sweeps)], ids=str)
def test_a_killed_run_leaves_no_result_and_can_be_run_again(tmp_path, ring, method):
    states = [{f"w{i}": torch.randn(300_000) for i in range(12)} for _ in range(2)]
    if (
        method == Karcher()
    ):  # half of it is done in the first sweep's last tiles, or the second's first
        states = [{"w": torch.randn(6_000_000), "v": s["w0"]} for s in states]
    folders = [sharded(tmp_path / str(i), s) for i, s in enumerate(states)]
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, *map(str, folders), str(out), str(method)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline().strip() == "half"
    with pytest.raises(RuntimeError, match="another process is writing"):
        merge_files(folders, out, method)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not out.exists() and (tmp_path / ".out.part").exists()
    merge_files(folders, out, method, max_memory="48MiB")
    assert_same(load(out), merge(states, method))
    assert not (tmp_path / ".out.part").exists()


def test_a_replacement_killed_between_its_renames_is_undone(tmp_path):
    paths, out = saved(tmp_path, [state()]), tmp_path / "out"
    other = saved(tmp_path, [{**state(), "steps": torch.tensor(1)}], "z")
    merge_files(paths, out, Linear())
    (tmp_path / ".out.part").mkdir()
    out.rename(tmp_path / ".out.part/old")
    with pytest.raises(ValueError, match="'steps'"):
        merge_files([*paths, *other], out, Linear(), overwrite=True)
    assert_same(load(out), load(paths[0]))


def test_what_was_put_back_is_not_replaced_unasked(tmp_path):
    paths, out = saved(tmp_path, [state()]), tmp_path / "out"
    merge_files(paths, out, Linear())
    (tmp_path / ".out.part").mkdir()
    out.rename(tmp_path / ".out.part/old")
    with pytest.raises(FileExistsError, match="overwrite"):
        merge_files(paths, out, Linear())
    assert_same(load(out), load(paths[0]))
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "out"]


def test_a_full_disk_is_named_with_the_file(tmp_path, monkeypatch):
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("space is reserved by posix_fallocate")

    def full(*_):
        raise OSError(28, "No space left on device")

    paths = saved(tmp_path, [state()] * 2)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"out\.safetensors") as error:
        merge_files(paths, tmp_path / "out.safetensors", Linear())
    assert error.value.errno == 28
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors"]


def test_dtypes_that_safetensors_has_not_are_named(tmp_path):
    torch.save({"w": torch.ones(3, dtype=torch.complex128)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"'w' is of torch\.complex128"):
        merge_files([tmp_path / "a.pt"], tmp_path / "out.safetensors", Linear(), dry_run=True)


def test_errors_of_the_system_carry_path_and_number(tmp_path, ring):
    paths = saved(tmp_path, [state(rows=4000), state(rows=4000)])

    def cut(done, total):
        os.truncate(paths[1], 5000)

    with pytest.raises(OSError) as error:
        merge_files(paths, tmp_path / "out.safetensors", Linear(), progress=cut)
    assert str(paths[1]) in str(error.value) and error.value.errno
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "b.safetensors"]


def test_progress_counts_to_the_end(tmp_path, ring):
    seen = []
    plan = merge_files(
        saved(tmp_path, [state()] * 2), tmp_path / "out.safetensors", Linear(),
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    total = plan.bytes_read + plan.bytes_written
    assert seen[0] == (0, total) and seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
