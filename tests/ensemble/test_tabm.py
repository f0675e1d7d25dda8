"""TabM's formula, what surrounds its network, and papers that are a line or two over the ensemble layers."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, randn

from solera.ensemble import (
    batch_ensemble_linear,
    ensemble_linear,
    fold_for_inference,
    member_mean_loss,
    scale_ensemble,
    tabm_mlp,
)

pytestmark = (
    pytest.mark.no_interpreter
)  # compositions of cores that their own tests run interpreted

D = torch.float64


def network(B=6, K=3, I=5, widths=(8, 7)):
    layers = []
    for O in widths:
        layers.append(tuple(randn(*s, dtype=D) for s in ((O, I), (K, I), (K, O), (K, O))))
        I = O
    return layers


def test_tabm_against_the_papers_formula():
    """l(x_i) for each member: shared weight, adapters r, s, b; the prediction is the mean over members."""
    x, layers, head = (
        randn(6, 5, dtype=D),
        network(),
        (randn(3, 7, 2, dtype=D), randn(3, 2, dtype=D)),
    )
    y = tabm_mlp(x, layers, head=head)
    members = []
    for k in range(3):
        h = x
        for w, r, s, b in layers:
            h = F.relu(s[k] * ((r[k] * h) @ w.T) + b[k])
        members.append(h @ head[0][k] + head[1][k])
    torch.testing.assert_close(y, torch.stack(members, 1))
    target = torch.randint(2, (6,), device=DEVICE)
    want = torch.stack([F.cross_entropy(m, target) for m in members]).mean()
    torch.testing.assert_close(member_mean_loss(y, target), want)


def test_scale_ensemble():
    x, r, b = (randn(*s, dtype=D, grad=True) for s in ((6, 5), (3, 5), (3, 5)))
    torch.testing.assert_close(scale_ensemble(x, r), x[:, None] * r)
    torch.testing.assert_close(scale_ensemble(x[:, None] + r, r, b), (x[:, None] + r) * r + b)
    assert torch.autograd.gradcheck(scale_ensemble, (x, r, b))
    with pytest.raises(ValueError, match="r: expected shape"):
        scale_ensemble(x, r[:, :4])
    with pytest.raises(ValueError, match="x: expected shape"):
        scale_ensemble(x[0], r)


@pytest.mark.parametrize("own", [False, True])
def test_member_mean_loss(own):
    p = randn(6, 3, 4, dtype=D)
    classes = torch.randint(4, (6, 3) if own else (6,), device=DEVICE)
    values = randn(*((6, 3, 4) if own else (6, 4)), dtype=D)
    each = lambda t, k: t[:, k] if own else t
    cases = {
        "cross_entropy": (classes, F.cross_entropy),
        "mse": (values, F.mse_loss),
        "l1": (values, F.l1_loss),
        "binary_cross_entropy": (values.sigmoid(), F.binary_cross_entropy_with_logits),
    }
    for name, (target, function) in cases.items():
        want = torch.stack([function(p[:, k], each(target, k)) for k in range(3)]).mean()
        torch.testing.assert_close(member_mean_loss(p, target, name), want)
    huber = torch.stack([F.huber_loss(p[:, k], each(values, k)) for k in range(3)]).mean()
    torch.testing.assert_close(member_mean_loss(p, values, F.huber_loss), huber)
    single = member_mean_loss(
        p[..., 0], each(values, 0)[..., 0] if not own else values[..., 0], "mse"
    )
    torch.testing.assert_close(
        single, F.mse_loss(p[..., 0], values[..., 0].view(6, -1).expand(6, 3))
    )
    torch.testing.assert_close(
        member_mean_loss(p[..., :1], each(values, 0)[:, 0], "mse"),
        F.mse_loss(p[..., 0], each(values, 0)[:, :1].expand(6, 3)),
    )
    with pytest.raises(ValueError, match="target: expected shape"):
        member_mean_loss(p, values[:2], "mse")
    with pytest.raises(ValueError, match="loss: expected one of"):
        member_mean_loss(p, values, "hinge")
    with pytest.raises(ValueError, match=r"prediction: expected shape \(B, K, C\)"):
        member_mean_loss(p[..., 0], torch.zeros(6, dtype=torch.int64))
    with pytest.raises(TypeError, match="target: expected class numbers"):
        member_mean_loss(p, torch.zeros(6))
    with pytest.raises(TypeError, match=r"target: expected a torch\.Tensor"):
        member_mean_loss(p, [0] * 6)


def test_fold_for_inference():
    x, layers = randn(6, 5, dtype=D), network()
    layers[1] = (layers[1][0], None, layers[1][2], layers[1][3][0])
    y = x
    for weight, bias in fold_for_inference(layers):
        y = ensemble_linear(y, weight, bias, activation="relu")
    torch.testing.assert_close(y, tabm_mlp(x, layers))
    plain = [(layers[0][0], None, None, None)]
    assert fold_for_inference(plain, members=4)[0][0].shape == (4, 5, 8)
    with pytest.raises(ValueError, match="members: expected"):
        fold_for_inference(plain)
    with pytest.raises(ValueError, match="layers: expected a list"):
        fold_for_inference([], members=3)
    with pytest.raises(ValueError, match=r"layers\[0\] r: expected shape \(2, 5\)"):
        fold_for_inference(layers, members=2)


def test_encoder_based_domain_tuning():
    """W (1 + D) x with D of rank R, its factors as members of one shared weight."""
    x, w, a, b = (randn(*s, dtype=D) for s in ((4, 6), (5, 6), (3, 5), (3, 6)))
    one = lambda n: x.new_ones(1, n)
    y = batch_ensemble_linear(x, w, torch.cat([one(6), b]), torch.cat([one(5), a])).sum(1)
    torch.testing.assert_close(y, x @ (w * (1 + a.T @ b)).T)


def test_inductive_bias_losses_of_random_hypotheses():
    """Losses of K networks with weights drawn at random, in one pass."""
    x, y = randn(9, 4, dtype=D), randn(9, dtype=D)
    w1, b1, w2 = randn(20, 4, 8, dtype=D), randn(20, 8, dtype=D), randn(20, 8, 1, dtype=D)
    out = ensemble_linear(ensemble_linear(x, w1, b1, activation="relu"), w2)
    losses = (out[..., 0] - y[:, None]).square().mean(0)
    want = [((F.relu(x @ w1[k] + b1[k]) @ w2[k])[:, 0] - y).square().mean() for k in range(20)]
    torch.testing.assert_close(losses, torch.stack(want))


def test_weakly_supervised_detection_in_artworks():
    """MI-max: R restarts of C linear classifiers, each image by its best box."""
    boxes, w, b = randn(5, 7, 6, dtype=D), randn(3, 6, 2, dtype=D), randn(3, 2, dtype=D)
    scores = ensemble_linear(boxes.flatten(0, 1), w, b).unflatten(0, (5, 7)).amax(1)
    want = (torch.einsum("nkd,rdc->nkrc", boxes, w) + b).amax(1)
    torch.testing.assert_close(scores, want)


def test_relevance_mapping():
    """RMN: one weight under a relevance mask of each task, each row by its own task."""
    x, w, masks = (
        randn(8, 5, dtype=D),
        randn(4, 5, dtype=D),
        torch.rand(3, 4, 5, dtype=D, device=DEVICE),
    )
    task = torch.randint(3, (8,), device=DEVICE)
    y = ensemble_linear(x, (w * masks).mT)[torch.arange(8, device=DEVICE), task]
    torch.testing.assert_close(y, torch.stack([(w * masks[t]) @ row for row, t in zip(x, task)]))


def test_noprop_blocks_train_at_once():
    """All T denoising blocks on (z_t, x) as members; the update is a combination of three tensors."""
    B, T, C, E = 6, 3, 4, 5
    x, embed = randn(B, 7, dtype=D), randn(C, E, dtype=D)
    z = randn(B, T, E, dtype=D)  # z_{t-1} of every block, drawn by the forward noise process
    w1, b1 = randn(T, E + 7, 9, dtype=D), randn(T, 9, dtype=D)
    w2 = randn(T, 9, C, dtype=D, grad=True)
    a, b, c, snr = (torch.rand(T, 1, dtype=D, device=DEVICE) for _ in range(4))
    inputs = torch.cat([z, x[:, None].expand(-1, T, -1)], -1)
    logits = ensemble_linear(ensemble_linear(inputs, w1, b1, activation="relu"), w2)
    guess = logits.softmax(-1) @ embed
    target, noise = embed[torch.randint(C, (B,), device=DEVICE)], randn(B, T, E, dtype=D)
    loss = (snr[:, 0] * (guess - target[:, None]).square().sum(-1)).mean()
    after = a * guess + b * z + c.sqrt() * noise
    for t in range(T):
        h = F.relu(torch.cat([z[:, t], x], 1) @ w1[t] + b1[t])
        single = (h @ w2[t]).softmax(-1) @ embed
        torch.testing.assert_close(
            after[:, t], a[t] * single + b[t] * z[:, t] + c[t].sqrt() * noise[:, t]
        )
        own = (snr[t] * (single - target).square().sum(-1)).mean() / T
        (grad,) = torch.autograd.grad(own, w2, retain_graph=True)
        (every,) = torch.autograd.grad(loss, w2, retain_graph=True)
        torch.testing.assert_close(grad[t], every[t])  # no block's gradient reaches another
