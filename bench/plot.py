"""The picture: how many times as fast as eager, compile and the peers, one row a line of the table."""

from __future__ import annotations

from pathlib import Path

from .report import families, times

# Okabe and Ito's colours, told apart in every common form of colour blindness.
COLOURS = {"eager": "#0072B2", "compile": "#E69F00", "peer": "#009E73"}
NAMES = {
    "eager": "beside eager torch",
    "compile": "beside torch.compile",
    "peer": "beside the peer named",
}


def bars(line: dict) -> list[tuple[str, str, float]]:
    """(kind, name, ratio) of a line, eager first."""
    found = []
    for name, value in line["ratios"].items():
        kind = name if name in ("eager", "compile") else "peer"
        found.append((kind, name, value["median"]))
    return found


def draw(result: dict, path: Path) -> bool:
    """Write the picture; False where matplotlib is missing or nothing was timed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    groups = {
        family: [line for line in lines if line["ratios"] and line["ok"]]
        for family, lines in families(result["lines"]).items()
    }
    groups = {family: lines for family, lines in groups.items() if lines}
    if not groups:
        return False
    heights = [sum(0.24 * len(bars(x)) + 0.26 for x in lines) + 0.5 for lines in groups.values()]
    ratios = [r for lines in groups.values() for x in lines for _, _, r in bars(x)]
    # Room for what is written beside the shortest and the longest bar.
    low, high = min(0.9, *ratios) * 0.4, max(2.0, *ratios) * 6
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(11, sum(heights) + 1.2), squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": heights}, facecolor="white",
    )  # fmt: skip
    for axis, (family, lines) in zip(axes[:, 0], groups.items()):
        y, ticks, labels = 0.0, [], []
        for line in lines:
            top = y
            for kind, name, value in bars(line):
                axis.barh(y, value - 1, left=1, height=0.8, color=COLOURS[kind])
                text = times(value) + (f" {name}" if kind == "peer" else "")
                outside = value >= 1
                axis.annotate(
                    text, (value, y), (4 if outside else -4, 0), textcoords="offset points",
                    va="center", ha="left" if outside else "right", fontsize=8, color="#222222",
                )  # fmt: skip
                y += 1
            ticks.append((top + y - 1) / 2)
            labels.append(f"{line['op'].split('.', 1)[-1]}, {line['label']}, {line['dtype']}")
            if line.get("floor_fraction"):
                share = f"{100 * line['floor_fraction']:.0f}% of floor"
                axis.text(
                    0.995, ticks[-1], share, transform=axis.get_yaxis_transform(), ha="right",
                    va="center", fontsize=8, color="#555555",
                )  # fmt: skip
            y += 1.1
        axis.set(xscale="log", xlim=(low, high), ylim=(y - 0.6, -0.9), title=family)
        axis.title.set(fontsize=12, fontweight="bold", ha="left", x=0)
        axis.set_yticks(ticks, labels, fontsize=9)
        axis.axvline(1, color="#222222", linewidth=1)
        shown = [v for v in (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low < v < high]
        axis.set_xticks(shown, [f"{v:g}x" for v in shown], fontsize=8)
        axis.minorticks_off()
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    present = [
        k for k in COLOURS if any(k == b[0] for ls in groups.values() for x in ls for b in bars(x))
    ]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[k]) for k in present]
    figure.legend(
        handles, [NAMES[k] for k in present], loc="outside upper left", ncols=len(present),
        frameon=False, fontsize=9,
    )  # fmt: skip
    machine = result["machine"]
    name = machine["gpu"]["name"] if machine["gpu"] else machine["cpu"]["model"]
    figure.supxlabel(
        f"how many times as fast Solera is (log scale; more is better). {name}, "
        f"{machine['threads']} threads, torch {machine['versions']['torch']}",
        fontsize=8,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
