"""docs/papers.md: the calls of the ensembles' rows run as they are printed."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from solera import ensemble, nn, norm, weights

# The calls' values have their tests elsewhere.
pytestmark = pytest.mark.no_interpreter
PAGE = Path(__file__).resolve().parents[2] / "docs/papers.md"


def t(*shape):
    return torch.randn(shape, dtype=torch.float64)


def whole(high, *shape):
    return torch.randint(high, shape)


def names(**values):
    return values


def low_rank():
    return names(x=t(5, 6), weight=t(8, 6), a=t(3, 2, 6), b=t(3, 8, 2), s=2.0)


def moe():
    return names(x=t(5, 6), router_logits=t(5, 4), w1=t(4, 3, 6), w2=t(4, 8, 3), top_k=2, E=4)


def members():
    return names(logits=t(3, 5, 7), target=whole(7, 5))


OFFSETS = torch.tensor([0, 2, 3, 7])

# What the names in a row's calls stand for, by the start of its title. A tuple holds what a name is in one call after
# another.
GIVEN = {
    "TabM": lambda: names(
        x=t(5, 6), layers=[(t(7, 6), t(3, 6), t(3, 7), t(3, 7))], weight=t(3, 7, 2), bias=t(3, 2),
        y=t(5, 3, 2), target=whole(2, 5), r=t(3, 6),
    ),
    "Encoder-based": lambda: names(
        x=t(5, 6), W=t(8, 6), ones_i=t(1, 6), ones_o=t(1, 8), a=t(3, 8), b=t(3, 6)
    ),
    "Towards Exact": lambda: names(x=t(5, 6), w1=t(3, 6, 4), b1=t(3, 4), w2=t(3, 4, 1), y=t(5)),
    "Weakly": lambda: names(boxes=t(2, 4, 6), w=t(3, 6, 5), b=t(3, 5), N=2, K=4),
    "Understanding Catastrophic": lambda: names(
        x=t(5, 6), w=t(8, 6), masks=t(3, 8, 6), rows=torch.arange(5), task=whole(3, 5)
    ),
    "NoProp": lambda: names(
        x=t(5, 3, 6), z=t(5, 3, 4), w1=t(3, 10, 8), b1=t(3, 8), w2=t(3, 8, 7), embed=t(7, 4)
    ),
    "Self-Tuning": lambda: names(
        h=t(2, 3), H=t(12, 3), b_e=t(6), b_h=t(6), e=1.1, I=4, O=6, m=3, C=4,
        x=(t(2, 4), t(2, 4, 5, 5)), w_e=(t(6, 4), t(6, 4, 3, 3)), w_h=(t(6, 4), t(6, 4, 3, 3)),
    ),
    "Continual Learning with Dependency": lambda: names(
        e=t(2, 3), c=t(4, 5), U=t(6, 8), rnn=None, x=t(2, 5, 5), O=4, before=t(2, 24)
    ),
    "Contrastive Learning and Mixture": lambda: names(
        x=t(5, 2, 6), domain=whole(3, 5), w1=t(3, 4, 6), w2=t(3, 8, 4), router=t(3, 6)
    ),
    "Discrete": lambda: names(
        x=t(2, 5, 3), keys=t(2, 6, 3), values=t(2, 6, 4), key_sum=t(2, 6, 3), size=t(2, 6).exp()
    ),
    "Gradient Boosting": lambda: names(
        x=t(5, 4), features=whole(4, 3, 2), thresholds=t(3, 2), leaves=t(3, 4, 2), rates=t(2), start=t(2)
    ),
    "Improving Both": lambda: names(x=t(5, 6), weight=t(3, 8, 6), R=t(3, 6), epsilon=0.1),
    "LEVI": lambda: names(
        h=t(3, 5, 4), g=t(1, 5, 6), w1_h=t(3, 4, 8), w1_g=t(3, 6, 8), b1=t(3, 8), w2=t(3, 8, 2), b2=t(3, 2)
    ),
    "Learning useful": lambda: names(features=[t(5, 4), t(5, 3)], weight=t(2, 7), bias=t(2)),
    "One-Shot": lambda: names(x=t(5, 6), K=3, weight=t(3, 6, 2), bias=t(3, 2)),
    "Sequential Training": lambda: names(
        x=t(5, 4), W=t(3, 2, 4), b=t(3, 2), V=t(3, 7, 2), c=t(3, 7), rho=t(3), F0=t(7), logits=t(5, 7),
        target=whole(7, 5),
    ),
    "Boosting Multi-modal": lambda: names(f=t(5, 3), f_no_v=t(5, 3), f_no_a=t(5, 3), kappa=t(5, 1)),
    "Exact Learning": lambda: names(x=t(5, 6), w1=t(3, 4, 6), w2=t(3, 2, 4)),
    "Dual-Head": lambda: names(f=t(5, 6), weight=t(2, 4, 6), bias=t(2, 4), teacher=t(5, 4), tau=2.0),
    "Adaptive Ensemble": lambda: names(h=t(3, 5, 6), x=t(5, 4), G=t(3, 4)),
    "DER": lambda: names(old=t(5, 4), new=t(5, 3), s=2.0, e=t(3), weight=t(2, 7)),
    "Explore": lambda: names(features=t(5, 3, 6), weight=t(3, 6, 2), bias=t(3, 2)),
    "Why do Random": lambda: names(query=whole(4, 3, 2), train=whole(4, 6, 2), y=t(6, 2), leaves=4),
    "Scaling Pre-trained": lambda: names(
        x=t(5, 24), left=t(2, 3, 2), core=t(2, 3, 4, 3), right=t(3, 4, 2)
    ),
    "AdaMoLE": lambda: names(**low_rank(), wg=t(3, 6), wt=t(1, 6), alpha=4, r=2),
    "Adapters": lambda: names(
        x=t(5, 6), down=t(3, 2, 6), up=t(3, 6, 2), index=whole(3, 5), h=t(5, 6), outputs=t(3, 5, 6),
        wq=t(6, 6), wk=t(6, 6), wv=t(6, 6), a=t(3, 2, 6), b=t(3, 8, 2), weights=t(3),
    ),
    "DMoERM": low_rank,
    "Ensembles of Low-Rank": lambda: names(**low_rank(), delta=t(5, 4), centroids=t(3, 4)),
    "Hydra": lambda: names(
        x=t(5, 6), weight=t(8, 6), ap=t(2, 6), bp=t(8, 2), as_=t(3, 8), bs=t(8, 3), s=0.5, d=t(8)
    ),
    "Make LoRA": lambda: names(x=t(5, 6), weight=t(8, 6), experts=3, rank=6, logits=t(5, 3)),
    "Mini-Ensemble": lambda: names(x=t(5, 6), weight=t(8, 6), a=t(2, 2, 3), b=t(2, 4, 2), s=0.5),
    "Skywork": lambda: names(x=t(5, 6), weight=t(4, 6), k=2, scale=1.0, alpha=0.01, drop_rate=0.1),
    "Nexus": lambda: names(**moe(), embeddings=t(4, 6), y=t(5, 8)),
    "ScaLearn": lambda: names(h=t(5, 6), down=t(3, 2, 6), up=t(3, 6, 2), omega=t(3, 6)),
    "Scaling Laws for Fine": moe,
    "Generative Adapter": lambda: names(
        state=None, h=t(2, 5, 6), a2=t(3, 6), a3=t(4, 6), x=t(2, 5, 6), weight=t(8, 6), a1=t(3, 6), b=t(8, 4),
        s=0.5,
    ),
    "A Survey": lambda: names(**moe(), probabilities=t(5, 4).softmax(-1), index=whole(4, 5, 2)),
    "AdapterBias": lambda: names(h=t(5, 6), w=t(6), b=0.1, v=t(6)),
    "DriftMoE": lambda: names(logits=t(5, 3), expert_prediction=whole(4, 5, 3), target=whole(4, 5)),
    "HyperTuning": lambda: names(**{**low_rank(), "x": t(3, 4, 6)}, B=3),
    "Scaling Laws for Upcycling": lambda: names(**{**moe(), "w1": t(1, 3, 6), "w2": t(1, 8, 3)}),
    "To Repeat": moe,
    "Pathologies": lambda: names(logits=t(5, 3, 7), target=whole(7, 5), gamma=0.5),
    "MDCS": lambda: names(logits=t(6, 3, 7), target=whole(7, 6), log_prior=t(7)),
    "Pre-training": lambda: names(**members(), student=t(5, 7)),
    "Bayesian": lambda: names(images=t(5, 6), prompts=t(3, 7, 6), scale=2.0, target=whole(7, 5), kl=t()),
    "Shrinking": lambda: names(scores=t(4, 3, 5), weights=t(5, 2), bias=0.1),
    "Towards Competitive": lambda: names(
        scores=t(3, 2, 5), weights=t(3), s=2.0, w=t(4, 9).exp(), factor=t(9)
    ),
    "SEEDS": lambda: names(x=t(6, 4), y=t(4)),
    "Boosting EfficientNets": lambda: names(**members(), weights=t(3).exp()),
    "Deep Learning on a Data": members,
    "Ensemble One-dim": lambda: names(z1=t(5, 7), z2=t(5, 7), z3=t(5, 7), z4=t(5, 7), target=whole(7, 5)),
    "Inception": lambda: names(logits=t(5, 4, 7), x=t(5, 6), fx=t(5, 6)),
    "Uncertainty Quant": lambda: names(
        u=t(3, 5), log_probs=-t(5, 4).exp(), mask=torch.ones(5, 4, dtype=torch.bool)
    ),
    "EnsLoss": lambda: names(output=t(5), target=t(5).sign()),
    "Modeling": lambda: names(z1=t(5, 3, 4), z2=t(5, 3, 4), a=1.0, b=0.0),
    "Optimizing Calibration": lambda: names(
        views=t(3, 5, 7), confidence=t(5).sigmoid(), correct=t(5).sign().clamp(min=0)
    ),
    "OVOR": lambda: names(inliers=t(5, 7), outliers=t(4, 7)),
    "Branch": lambda: names(
        logits=(t(3, 2, 4, 7), t(3, 2, 7)), target=whole(7, 2, 4), log_prior=t(3), log_posterior=t(3, 2),
        token_log_prob=t(3, 2), scores=t(3, 6),
    ),
    "HDEE": lambda: names(
        z1=t(2, 4, 7), z2=t(2, 4, 7), z3=t(2, 4, 7), target=whole(7, 2, 4), scores=t(3, 6), log_prior=t(3)
    ),
    "MEAL": lambda: names(student=t(5, 7), teachers=[t(5, 7), t(5, 7)]),
    "AGLA": lambda: names(z=t(5, 7), z_view=t(5, 7), alpha=0.5, beta=0.1),
    "Model Editing": lambda: names(
        big=t(5, 7), edited=t(5, 7), original=t(5, 7), one=torch.tensor(1.0).double(), beta=t()
    ),
    "The Universality": lambda: names(**members(), log_weights=t(3)),
    "Deep Boosting": lambda: names(scores=t(4, 4), anchor_scores=t(4, 4)),
    "Rethinking Fine": lambda: names(log_prob=-t(5).exp(), n=8),
    "Rethinking Model": lambda: names(
        logits=t(5, 3, 7), K=3, x=t(5, 6), grad=t(5, 6), momentum=t(5, 6), origin=t(5, 6)
    ),
    "Self-Knowledge": lambda: names(
        logits=t(5, 7), target=whole(7, 5), past_logits=t(5, 7), alpha_T=0.8, t=3, T=10
    ),
    "Simple and Scalable": lambda: names(logits=t(5, 7), ids=whole(7, 5, 3), distances=t(5, 3).exp()),
    "Toward Guidance": lambda: names(
        z_c=t(5, 7), z_u=t(5, 7), s=2.0, log_p=t(5), ref=t(5), log_p_negative=t(5), ref_negative=t(5)
    ),
    "A Simple Zero": lambda: names(x=t(5, 6), t=t(4, 3, 6), pretrain=t(7, 6), a=t(4)),
    "Adaptive Multi": lambda: names(z1=t(4, 2, 6), z2=t(4, 2, 6), phi=torch.sin, dim=6, num_heads=2),
    "Window": lambda: names(
        models=[torch.sin, torch.cos], windows=[(0.0, 0.5)], logits=t(2, 9, 4), fractions=[0.5], x=t(9, 4),
        low=0.0, high=0.5, out=t(9, 4), rows=t(2, 4), index=torch.tensor([3, 1]),
    ),
    "A Hard": lambda: names(
        x=F.normalize(t(9, 4)), y=torch.arange(9) % 3, C=3, mu=t(3, 4), cov=torch.eye(4).double(), n=9,
        t=t(3, 4), w=t(3, 4), b=t(3), alpha=0.5,
    ),
    "Does VLM": lambda: names(
        x=t(9, 6), y=torch.arange(9) % 3, t=t(7, 6), offsets=OFFSETS, m=9, kept=torch.arange(7),
        neighbours=torch.tensor([[1], [2], [0]]),
    ),
    "Expandable": lambda: names(
        f=t(2, 5, 4), p=t(2, 3, 4), w=t(2, 3), old=t(3, 6), new=t(2, 6), new_in_new=t(2, 4)
    ),
    "Visual Class": lambda: names(x=t(5, 6), t=t(7, 6), offsets=OFFSETS),
    "Revisiting": lambda: names(
        f=t(9, 8), y=torch.arange(9) % 3, C=3, pretrained=t(9, 4), adapted=t(9, 4)
    ),
    "Feynman": lambda: names(x=t(5, 6), scores=t(2, 5, 6), g=1.5, sigma=0.8, dt=0.1, c=-0.5, logw=t(5)),
    "Solving": lambda: names(
        x=t(5, 6), b=t(5, 6), grad_mu=t(5, 6), lap_mu=t(5), V=0.8, dt=0.1, logw=t(5)
    ),
    "Hyper-Conn": lambda: names(
        H=t(5, 4, 8), alpha=t(4, 5), beta=(t(4), t(5, 4)), wa=t(8, 5), wb=t(8), sa=0.01, sb=0.01,
        nw=t(8), out=t(5, 8), H_r=t(5, 4, 8), b=(t(4), t(4), t(24)), w=t(32, 24), a=t(3), D=8,
    ),
}  # fmt: skip


def rows():
    for section in PAGE.read_text().split("\n## "):
        if section.startswith("Ensembles"):
            for line in section.splitlines():
                if line.startswith("|") and not line.startswith(("| paper |", "|---")):
                    title, _, call = re.split(r" (?<!\\)\| ", line.strip("| "))[:3]
                    yield title, call


def runs(code, known, several):
    """Runs code with the first value of the names in `several` with which it does."""
    most = max((len(v) for v in several.values()), default=1)
    for i in range(most):
        known |= {name: v[min(i, len(v) - 1)] for name, v in several.items()}
        try:
            return exec(code, known)
        except (ValueError, TypeError):
            if i == most - 1:
                raise


@pytest.mark.parametrize(("title", "call"), list(rows()), ids=lambda v: v[:24])
def test_a_rows_calls_run_as_printed(title, call):
    torch.manual_seed(0)
    starts = [start for start in GIVEN if title.startswith(start)]
    assert starts, f"the names in the calls of {title} stand for nothing here"
    values = GIVEN[max(starts, key=len)]()
    several = {name: v for name, v in values.items() if isinstance(v, tuple)}
    known = names(torch=torch, F=F, ensemble=ensemble, nn=nn, norm=norm, weights=weights) | values
    codes = re.findall(r"`([^`]+)`", call)
    assert codes
    for code in codes:
        runs(code, known, several)
