"""This run beside an earlier one."""

from __future__ import annotations

SLOWER = 1.15


def key(line: dict) -> tuple[str, str, str]:
    return line["op"], line["label"], line["dtype"]


def compare(old: dict, new: dict) -> list[dict]:
    """One entry a line that both runs timed.

    `time` is new over old. `beside_eager` is the same with each time divided by eager's of its own run,
    which takes out a machine that is slower today. A line is slower if both (or the one there is) rose
    by more than 15%.
    """
    before = {key(line): line for line in old["lines"] if line["times"]}
    out = []
    for line in new["lines"]:
        was = before.get(key(line))
        if was is None or not line["times"]:
            continue
        time = line["times"]["ours"]["median"] / was["times"]["ours"]["median"]
        beside = None
        if "eager" in line["ratios"] and "eager" in was["ratios"]:
            beside = was["ratios"]["eager"]["median"] / line["ratios"]["eager"]["median"]
        slower = time > SLOWER and (beside is None or beside > SLOWER)
        out.append({"key": key(line), "time": time, "beside_eager": beside, "slower": slower})
    return out


def table(entries: list[dict]) -> tuple[list[str], list[list[str]]]:
    columns = ["op", "case", "dtype", "new / old time", "same, beside eager", ""]
    rows = []
    for entry in entries:
        beside = entry["beside_eager"]
        text = "–" if beside is None else f"{beside:.2f}"
        slower = "✗ slower" if entry["slower"] else ""
        rows.append([*entry["key"], f"{entry['time']:.2f}", text, slower])
    return columns, rows
