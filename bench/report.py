"""What the reader sees: table, summary, JSON, markdown. Works without rich, in plain text."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

try:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ImportError:  # a machine without the bench extra
    Console = None  # type: ignore[assignment,misc]

COLUMNS = (
    "op", "case", "dtype", "error", "time", "x eager", "x compile", "x peer", "% of floor", "saved",
)  # fmt: skip
LEFT = ("op", "case", "dtype", "x peer")
MARKS = ("<!-- benchmark -->", "<!-- /benchmark -->")


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def amount(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value / 1e6:.4g} MB" if value >= 1e5 else f"{value / 1e3:.3g} kB"


def times(value: float) -> str:
    return f"{value:.2f}x" if value < 10 else f"{value:.1f}x" if value < 100 else f"{value:.0f}x"


def mark(line: dict, name: str) -> str:
    """✓ where the target is met, ✗ and the figure wanted where it is not."""
    target = line["targets"].get(name)
    if target is None or target["met"] is None:
        return ""
    return " ✓" if target["met"] else f" ✗{target['want']:g}"


def _ratio(line: dict, name: str) -> str:
    if name in line["ratios"]:
        return times(line["ratios"][name]["median"]) + mark(line, name)
    if reason := line["skipped"].get(name):
        return "skip" if "--quick" in reason else "failed"
    return "–"


def _floor(line: dict) -> str:
    share = line.get("floor_fraction")
    text = "–" if share is None else f"{100 * share:.0f}%" + mark(line, "floor")
    if "copy" in line["targets"] and line.get("copy_fraction"):
        text += f" ({100 * line['copy_fraction']:.0f}% of copy{mark(line, 'copy')})"
    return text


def worst(line: dict) -> float | str | None:
    errors = [c["error"] for c in line["checks"]]
    return "inf" if "inf" in errors else max(errors, default=None)


def row(line: dict) -> list[str]:
    error = worst(line)
    text = "–" if error is None else error if isinstance(error, str) else f"{error:.1e}"
    if line["failure"]:
        text = "FAILED"
    elif line["ok"] is False:
        text = f"WRONG {text}"
    skipped = line["skipped"].get("ours")
    time = seconds(line["times"]["ours"]["median"]) if line["times"] else skipped or "–"
    if line["times"]:
        peers = [n for n in line["ratios"] if n not in ("eager", "compile")]
        peers += [n for n in line["skipped"] if n not in ("eager", "compile", "ours")]
        beside = [_ratio(line, "eager"), _ratio(line, "compile")]
        beside.append(", ".join(f"{_ratio(line, n)} {n}" for n in peers) or "–")
    else:
        beside = ["–", "–", "–"]
    saved = amount(line.get("saved_bytes"))
    return [line["op"], line["label"], line["dtype"], text, time, *beside, _floor(line), saved]


def families(lines: list[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for line in lines:
        found.setdefault(line["family"], []).append(line)
    return found


class Printer:
    """rich where it is installed, plain aligned text where it is not."""

    def __init__(self) -> None:
        self.console = None
        if Console is not None:
            console = Console(highlight=False)
            wide = None if console.is_terminal else max(console.width, 170)
            self.console = Console(highlight=False, width=wide)

    @property
    def live(self) -> bool:
        return self.console is not None and self.console.is_terminal

    def say(self, text: str = "", style: str | None = None) -> None:
        if self.console is None:
            print(text, flush=True)
        else:
            self.console.print(escape(text), style=style, soft_wrap=True)
            sys.stdout.flush()

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        if self.console is None:
            print(plain_table(title, columns, rows), flush=True)
            return
        table = Table(title=title, title_justify="left", title_style="bold")
        for column in columns:
            table.add_column(column, justify="left" if column in (*LEFT, "") else "right")
        for cells in rows:
            bad = any("WRONG" in c or "FAILED" in c for c in cells)
            shown = [f"[red]{escape(c)}[/red]" if "✗" in c else escape(c) for c in cells]
            table.add_row(*shown, style="bold white on red" if bad else None)
        self.console.print(table)


def plain_table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    widths = [
        max(len(c), *(len(r[i]) for r in rows)) if rows else len(c) for i, c in enumerate(columns)
    ]

    def text(cells: list[str]) -> str:
        return "  ".join(
            c.ljust(w) if name in (*LEFT, "") else c.rjust(w)
            for c, w, name in zip(cells, widths, columns)
        ).rstrip()

    return "\n".join([title, text(columns), text(["-" * w for w in widths]), *map(text, rows), ""])


def rate_lines(result: dict) -> list[str]:
    rates = result.get("rates")
    if not rates:
        return []
    end = "" if rates["end"] is None else f", {rates['end'] / 1e9:.1f} at the end of the run"
    products = ", ".join(f"{v / 1e9:.0f} GFLOP/s {k}" for k, v in rates["matrix"].items())
    size = rates["buffer_bytes"] >> 20
    return [
        f"measured here: copy {rates['copy'] / 1e9:.1f} GB/s ({rates['copy_by']}, {size} MiB buffers{end}), "
        f"read {rates['read'] / 1e9:.1f} GB/s; products {products}"
    ]


def machine_lines(machine: dict) -> list[str]:
    cpu, gpu, versions = machine["cpu"], machine["gpu"], machine["versions"]
    name = (
        f"{cpu['model']}, {cpu['cores']} cores ({' '.join(cpu['flags'])}), kernels {machine['isa']}"
    )
    if gpu:
        name = f"{gpu['name']}, {gpu['memory'] >> 30} GiB, on {name}"
    packages = ", ".join(f"{k} {v}" for k, v in versions.items())
    commit = (machine["commit"] or "unknown")[:12] + (" with changes" if machine["changed"] else "")
    settings = machine["allocator"]["settings"]
    malloc = (
        "tuned: " + " ".join(f"{k}={v}" for k, v in settings.items()) if settings else "default"
    )
    return [name, packages, f"{machine['threads']} threads, commit {commit}, malloc {malloc}"]


def target_lines(lines: list[dict]) -> list[str]:
    """One sentence on the targets, then one line for each that was missed or not measured."""
    every = [(line, n, t) for line in lines for n, t in line["targets"].items()]
    if not every:
        return []
    met = sum(t["met"] is True for _, _, t in every)
    out = [f"{met} of {len(every)} targets met"]
    for line, name, t in every:
        if t["met"]:
            continue
        share = name in ("floor", "copy")
        got = "not measured" if t["got"] is None else f"{t['got']:.2f}" + ("" if share else "x")
        out.append(
            f"  {line['op']} {line['label']} {line['dtype']}, beside {name}: {got}, wanted {t['want']:g}"
        )
    return out


def write_json(result: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def _markdown_table(columns: list[str], rows: list[list[str]]) -> list[str]:
    def text(cells: list[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    rule = "|" + "|".join("---" if c in (*LEFT, "") else "---:" for c in columns) + "|"
    return [text(columns), rule, *map(text, rows), ""]


def markdown(result: dict, pictures: list[tuple[str, str]]) -> str:
    """The page that docs/benchmarks.md is. `pictures` are (title, relative path)."""
    machine = result["machine"]
    out = ["# Benchmarks", ""]
    out += ["Generated by `python -m bench --render`; do not edit.", ""]
    kind = "the quick form of the run" if result["quick"] else "the full run"
    out += [f"{result['date']}, {kind} on {machine['device']}:", ""]
    out += [f"- {text}" for text in (*machine_lines(machine), *rate_lines(result))]
    out += ["", *(f"![{title}]({path})\n" for title, path in pictures)]
    out += [
        "Every value is checked against float64 before it is timed. `x eager`, `x compile` and "
        "`x peer` say how many times as fast Solera is: medians of the rounds' ratios in one "
        "interleaved run. `% of floor` is the least time for the bytes and operations, at the rates "
        "measured in the same run, over Solera's time; above 100% the data stayed in a cache. "
        "✓ and ✗ mark the targets.",
        "",
    ]
    for family, lines in families(result["lines"]).items():
        out += [f"## {family}", "", *_markdown_table(list(COLUMNS), [row(x) for x in lines])]
        out += [f"- {x['op']} {x['label']}: {x['notes']}" for x in lines if x["notes"]]
        out.append("")
    if summary := target_lines(result["lines"]):
        head = summary[0] + ("." if len(summary) == 1 else "; not:")
        out += ["## Targets", "", head, ""]
        out += [f"- {text.strip()}" for text in summary[1:]] + [""]
    if result["showcase"]:
        out += ["## On real data", ""]
    for part in result["showcase"]:
        out += [f"### {part['title']}", "", *_markdown_table(part["columns"], part["rows"])]
        out += [part["note"], ""] if part["note"] else []
    return "\n".join(out).replace("\n\n\n", "\n\n").rstrip() + "\n"


def summary(result: dict) -> str:
    """The lines that have a target, in one table: what README.md shows between its marks."""
    lines = [x for x in result["lines"] if x["targets"]]
    out = ["; ".join(machine_lines(result["machine"])) + ".", ""]
    return "\n".join([*out, *_markdown_table(list(COLUMNS), [row(x) for x in lines])])


def fill(page: Path, result: dict, picture: str) -> bool:
    """Put the summary between the page's benchmark marks; False if it has none."""
    head, open_mark, rest = (page.read_text() if page.exists() else "").partition(MARKS[0])
    _, close_mark, tail = rest.partition(MARKS[1])
    if not close_mark:
        return False
    middle = f"\n{summary(result)}\n\n![speed-up by op]({picture})\n"
    page.write_text(head + open_mark + middle + close_mark + tail)
    return True


def render(source: Path, target: Path) -> None:
    """Write the markdown page of a JSON result; pictures are those that lie beside it.

    A page with the benchmark marks (README.md) gets the lines with targets between them.
    """
    result = json.loads(source.read_text())
    wanted = [("speed", source.with_suffix(".png"))]
    for part in result["showcase"]:
        wanted += [(part["title"], source.parent / name) for name in part["pictures"]]
    pictures = [
        (title, os.path.relpath(path, target.parent)) for title, path in wanted if path.exists()
    ]
    if fill(target, result, pictures[0][1] if pictures else ""):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(markdown(result, pictures))
