"""TabM trained on a table: the digits' 64 features, 10 classes, dropout and all, beside the package tabm."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from . import Outcome, median_ratio, seconds

BATCH = 256
MODEL = {
    "n_num_features": 64, "d_out": 10, "k": 32, "n_blocks": 3, "d_block": 512, "dropout": 0.1,
    "start_scaling_init": "random-signs",
}  # fmt: skip


def accuracy(model: torch.nn.Module, x: Tensor, y: Tensor) -> float:
    """In percent, of the members' mean probabilities."""
    model.eval()
    with torch.no_grad():
        right = model(x).float().softmax(-1).mean(1).argmax(-1) == y
    model.train()
    return 100 * float(right.double().mean())


def run(quick: bool, folder: Path) -> Outcome:
    import tabm
    from sklearn.datasets import load_digits

    from solera.ensemble import member_mean_loss
    from solera.nn import TabM

    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32)
    y = torch.tensor(data.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    train, test = order[:768], order[768:1168]
    mean, deviation = x[train].mean(0), x[train].std(0) + 1e-6
    x = (x - mean) / deviation
    rows: list[list[str]] = []
    numbers: dict[str, float] = {}
    ratios: dict[str, float] = {}
    epochs = 2 if quick else 6
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        models = []
        for make in (TabM, tabm.TabM):
            torch.manual_seed(1)
            models.append(make(**MODEL))
        models[1].load_state_dict(models[0].state_dict())
        sides = [(m, torch.optim.AdamW(m.parameters(), lr=2e-3, weight_decay=3e-4)) for m in models]
        times: list[list[float]] = [[], []]

        def step(side: int, batch: Tensor) -> None:
            model, optimizer = sides[side]
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = model(x[batch])
            loss = member_mean_loss(logits.float(), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        for epoch in range(epochs):
            shuffled = train[torch.randperm(len(train), generator=generator)]
            for index, batch in enumerate(shuffled.split(BATCH)):
                for side in (0, 1) if (epoch + index) % 2 == 0 else (1, 0):
                    times[side].append(seconds(lambda: step(side, batch)))
        scores = [accuracy(m, x[test], y[test]) for m in models]
        ratios[name] = median_ratio(*times)
        rows.append([f"{name}: accuracy after {epochs} epochs", *(f"{s:.2f}%" for s in scores)])
        rows.append([f"{name}: an epoch, time", "1x", f"{ratios[name]:.2f}x"])
        numbers |= {
            f"{name}_accuracy": scores[0],
            f"{name}_plain": scores[1],
            f"{name}_ratio": ratios[name],
        }
    gap = max(abs(numbers[f"{n}_accuracy"] - numbers[f"{n}_plain"]) for n in ratios)
    return Outcome(
        name="tabm_training",
        title="TabM, 32 members of 3 x 512, trained on 768 digits as a table",
        rows=rows,
        ratio=ratios["float32"],
        agrees=gap < 1.5,
        problem=f"accuracies differ by {gap:.2f} points" if gap >= 1.5 else "",
        note="Same start and batches, dropout 0.1 with masks of each side's own, AdamW; bfloat16 is autocast. "
        "The plain side is the package tabm.",
        numbers=numbers,
        columns=["", "Solera", "tabm"],
    )
