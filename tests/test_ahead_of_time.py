"""Every Triton kernel compiles for NVIDIA and AMD GPUs without one, within a written budget.

The budget (registers a thread, shared memory a block, no spills to memory) is tests/budgets.json:

    python tests/test_ahead_of_time.py                       print the table, fail as the tests would
    python tests/test_ahead_of_time.py --write [family.core ...]  and write it as the budget
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import ahead_of_time as aot
import pytest

try:
    import triton
except ImportError:
    triton = None

pytestmark = [
    pytest.mark.skipif(triton is None, reason="Triton is not installed"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1",
        reason="TRITON_INTERPRET=1 leaves nothing to compile; run this file without it",
    ),
]


def rows(module, target, used):
    for name, u in used.items():
        place = f"{module:<26} {name:<34} {target:<7}"
        yield f"{place} {u.registers:>4} {u.spills:>6} {u.scalar_spills:>6} {u.shared:>7}"


HEAD = (
    f"{'module':<26} {'kernel':<34} {'target':<7} "
    f"{'regs':>4} {'spills':>6} {'scalar':>6} {'shared':>7}"
)


def faults(module, target, used, allowed):
    """What is wrong with a module's kernels on a target, one line each."""
    for name, usage in used.items():
        where = f"{module} {name} on {target}"
        budget = allowed.get(name, {}).get(target)
        if usage.error:
            yield f"{where}: {usage.error}"
        elif usage.spills:
            yield f"{where}: spills {usage.spills} ({usage.registers} registers)"
        elif aot.written_for() != triton.__version__:
            continue
        elif budget is None:
            yield f"{where}: no budget; run `python tests/test_ahead_of_time.py --write {module}`"
        else:
            for key, limit in budget.items():
                if getattr(usage, key) > limit:
                    yield f"{where}: {key} {getattr(usage, key)}, budget {limit}"


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("module", aot.modules())
def test_within_budget(module, target):
    used = aot.compile_module(module, target)
    wrong = list(faults(module, target, used, aot.budgets().get(module, {})))
    assert not wrong, "\n".join(wrong)


def stale_budgets():
    """Kernels that tests/budgets.json names and that are gone."""
    known = {m: {case.name for case in aot.cases(m)} for m in aot.modules()}
    return [
        f"{m} {name}: tests/budgets.json has it, triton_kernels/ has not"
        for m, names in aot.budgets().items()
        for name in names
        if name not in known.get(m, ())
    ]


def test_no_budget_without_a_kernel():
    stale = stale_budgets()
    assert not stale, "\n".join(stale)


def main(arguments: list[str]) -> int:
    write = "--write" in arguments
    names = [a for a in arguments if not a.startswith("-")] or aot.modules()
    unknown = set(names) - set(aot.modules())
    if unknown:
        print(f"no such module: {sorted(unknown)}; there are {aot.modules()}")
        return 2
    results = {}
    print(HEAD)
    with aot.workers(int(os.environ.get("JOBS", "2"))) as pool:
        for (module, target), future in aot.compile_all(names, pool).items():
            results[module, target] = used = future.result()
            print(*rows(module, target, used), sep="\n", flush=True)
    if write:
        kernels = {m: v for m, v in aot.budgets().items() if m in aot.modules() and m not in names}
        for (module, target), used in results.items():
            for name, usage in used.items():
                if not usage.error and not usage.spills:
                    budget = kernels.setdefault(module, {}).setdefault(name, {})
                    budget[target] = aot.budget_of(usage)
        table = {"triton": triton.__version__, "kernels": dict(sorted(kernels.items()))}
        aot.BUDGETS.write_text(json.dumps(table, indent=1) + "\n")
        print(f"wrote {aot.BUDGETS.relative_to(aot.ROOT)}; look at its diff before committing it")
    allowed = aot.budgets()
    wrong = [
        fault
        for (m, t), used in results.items()
        for fault in faults(m, t, used, allowed.get(m, {}))
    ]
    wrong += stale_budgets()
    print(*wrong, sep="\n")
    print(f"{sum(map(len, results.values()))} kernels compiled, {len(wrong)} faults")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
