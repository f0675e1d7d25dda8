"""Every function of `solera.ensemble` with one argument at a time gone wrong: errors name its own arguments."""

import inspect
import re

import pytest
import torch
from torch import Tensor

from solera import ensemble

pytestmark = pytest.mark.no_interpreter  # no kernel runs


def T(*shape):
    return torch.randn(shape)


idx = torch.tensor([0, 2, 1, 0, 2])
GIVEN = {
    "batch_ensemble_linear": lambda: dict(x=T(5, 6), weight=T(8, 6), r=T(3, 6), s=T(3, 8), bias=T(3, 8)),
    "ensemble_linear": lambda: dict(x=T(5, 6), weight=T(3, 6, 8), bias=T(3, 8)),
    "batch_ensemble_conv2d": lambda: dict(
        x=T(2, 4, 5, 5), weight=T(6, 4, 3, 3), r=T(3, 4), s=T(3, 6), bias=T(3, 6),
    ),
    "ensemble_conv2d": lambda: dict(x=T(2, 4, 5, 5), weight=T(3, 6, 4, 3, 3), bias=T(3, 6)),
    "boosted_mlp": lambda: dict(
        x=T(5, 4), weight=T(3, 2, 4), bias=T(3, 2), out_weight=T(3, 7, 2), out_bias=T(3, 7), rho=T(3),
        start=T(7),
    ),
    "hyper_linear": lambda: dict(
        x=T(5, 4), h=T(5, 3), weight=T(6, 4), hyper_weight=T(6, 4), hyper=T(12, 3), bias=T(6),
        hyper_bias=T(6),
    ),
    "hyper_conv2d": lambda: dict(
        x=T(2, 4, 5, 5), h=T(2, 3), weight=T(6, 4, 3, 3), hyper_weight=T(6, 4, 3, 3), hyper=T(12, 3),
        bias=T(6), hyper_bias=T(6),
    ),
    "mixture_linear": lambda: dict(x=T(5, 6), weight=T(3, 8, 6), gate=T(5, 3), bias=T(3, 8)),
    "mixing_gate": lambda: dict(x=T(5, 6), weight=T(3, 6), epsilon=.1),
    "indexed_mlp": lambda: dict(x=T(5, 6), index=idx, w1=T(3, 4, 6), w2=T(3, 8, 4), b1=T(3, 4), b2=T(3, 8)),
    "cat_linear": lambda: dict(features=[T(5, 4), T(5, 3)], weight=T(2, 7), bias=T(2)),
    "layer_ensemble_heads": lambda: dict(
        h=T(3, 5, 4), g=T(1, 5, 6), w1_h=T(3, 4, 8), w1_g=T(3, 6, 8), b1=T(3, 8), w2=T(3, 8, 2), b2=T(3, 2),
        weights=T(3),
    ),
    "fanout_scale_grad": lambda: dict(x=T(5, 6), heads=3),
    "dual_head_linear": lambda: dict(x=T(5, 6), weight=T(2, 4, 6), bias=T(2, 4)),
    "binary_kl_norm": lambda: dict(student=T(5, 4), teacher=T(5, 4), tau=2.),
    "gated_mix": lambda: dict(h=T(3, 5, 6), gates=T(5, 3)),
    "hypernet_linear": lambda: dict(x=T(2, 5, 4), theta=T(2, 30), out_features=6),
    "chunked_hypernet": lambda: dict(task=T(2, 3), chunks=T(4, 5), weight=T(6, 8)),
    "hypernet_regularizer": lambda: dict(theta=T(2, 6), before=T(2, 6)),
    "mpo_linear": lambda: dict(x=T(5, 24), left=T(2, 3, 2), core=T(2, 3, 4, 3), right=T(3, 4, 2)),
    "multi_lora_linear": lambda: dict(
        x=T(5, 6), weight=T(8, 6), a=T(3, 2, 6), b=T(3, 8, 2), index=idx, bias=T(8), scaling=T(3),
    ),
    "moe_lora_linear": lambda: dict(
        x=T(5, 6), weight=T(8, 6), a=T(3, 2, 6), b=T(3, 8, 2), gates=T(5, 3), bias=T(8),
    ),
    "melora_linear": lambda: dict(
        x=T(5, 6), weight=T(8, 6), a=T(2, 2, 3), b=T(2, 4, 2), bias=T(8), scaling=T(2),
    ),
    "melora_merge_": lambda: dict(weight=T(8, 6), a=T(2, 2, 3), b=T(2, 4, 2), scaling=T(2)),
    "hydra_linear": lambda: dict(
        x=T(5, 6), weight=T(8, 6), a_parallel=T(2, 6), b_parallel=T(8, 2), a_sequential=T(3, 8),
        b_sequential=T(8, 3), bias=T(8),
    ),
    "hydra_merge": lambda: dict(
        weight=T(8, 6), a_parallel=T(2, 6), b_parallel=T(8, 2), a_sequential=T(3, 8), b_sequential=T(8, 3),
        bias=T(8),
    ),
    "adapter_bank_mix": lambda: dict(h=T(5, 6), down=T(3, 2, 6), up=T(3, 6, 2), omega=T(3, 6)),
    "batched_adapter": lambda: dict(
        x=T(5, 6), down=T(3, 2, 6), up=T(3, 6, 2), index=idx, down_bias=T(3, 2), up_bias=T(3, 6),
    ),
    "adapter_fusion": lambda: dict(
        query=T(5, 6), outputs=T(3, 5, 6), w_query=T(6, 6), w_key=T(6, 6), w_value=T(6, 6), residual=T(5, 6),
    ),
    "rank_one_shift": lambda: dict(h=T(5, 6), w=T(6), b=T(1), v=T(6)),
    "average_lora": lambda: dict(a=T(3, 2, 6), b=T(3, 8, 2), weights=T(3)),
    "goat_split": lambda: dict(weight=T(8, 6), experts=3, rank=6),
    "moe_ffn": lambda: dict(
        x=T(5, 6), router_logits=T(5, 4), w1=T(4, 3, 6), w2=T(4, 8, 3), top_k=2, shared=T(5, 8),
    ),
    "embed_router": lambda: dict(x=T(5, 6), embeddings=T(4, 6)),
    "threshold_gate": lambda: dict(logits=T(5, 4), tau_logit=T(5, 1)),
    "top_k_gate": lambda: dict(logits=T(5, 4), k=2),
    "norm_top_k_gate": lambda: dict(x=T(5, 6), weight=T(4, 6), k=2),
    "load_balance_loss": lambda: dict(probabilities=T(5, 4), index=idx[:, None]),
    "multi_hot_router_loss": lambda: dict(
        logits=T(5, 3), expert_prediction=torch.ones(5, 3).long(), target=idx,
    ),
    "threshold_balance_loss": lambda: dict(over=T(5, 4)),
    "fastweight_accumulate": lambda: dict(state=T(2, 3, 4), h=T(2, 5, 6), a2=T(3, 6), a3=T(4, 6)),
    "fastweight_lora_linear": lambda: dict(
        x=T(2, 5, 6), weight=T(8, 6), a1=T(3, 6), state=T(2, 3, 4), b=T(8, 4), bias=T(8),
    ),
    "polar_normalize": lambda: dict(state=T(2, 3, 4)),
    "ensemble_cross_entropy": lambda: dict(logits=T(5, 3, 7), target=idx, weights=T(3)),
    "ensemble_statistics": lambda: dict(logits=T(5, 3, 7)),
    "ensemble_distillation_loss": lambda: dict(student=T(5, 7), teachers=T(5, 3, 7), weights=T(3)),
    "diversity_loss": lambda: dict(logits=T(5, 3, 7), target=idx, gamma=.1),
    "multi_expert_loss": lambda: dict(logits=T(6, 3, 7), target=torch.zeros(6).long(), log_prior=T(7)),
    "log_mean_softmax": lambda: dict(logits=T(5, 3, 7), weights=T(3)),
    "ensemble_mean_prob": lambda: dict(logits=T(5, 3, 7), weights=T(3)),
    "prompt_ensemble_logits": lambda: dict(images=T(5, 6), prompts=T(3, 7, 6), scale=T()),
    "el2n": lambda: dict(logits=T(5, 3, 7), target=idx),
    "combine_logits": lambda: dict(logits=T(5, 3, 7), weights=T(5, 3)),
    "mix_log_probs": lambda: dict(logits=T(5, 3, 7), weights=T(5, 3)),
    "knn_mix_log_probs": lambda: dict(
        logits=T(5, 7), ids=torch.zeros(5, 3).long(), distances=T(5, 3).exp(), tau=1.,
    ),
    "mixture_nll": lambda: dict(logits=T(3, 2, 4, 7), target=torch.zeros(2, 4).long(), log_prior=T(3)),
    "mixture_next": lambda: dict(logits=T(3, 2, 7), log_posterior=T(3, 2)),
    "posterior_update": lambda: dict(log_posterior=T(3, 2), token_log_prob=T(3, 2)),
    "domain_prior_scan": lambda: dict(sequence_log_prob=T(3, 4)),
    "bayes_mixture_nll": lambda: dict(logits=T(3, 5, 7), target=idx, log_weights=T(3)),
    "crps_ensemble": lambda: dict(x=T(4, 3), y=T(3), weights=T(4).exp()),
    "ensemble_moments": lambda: dict(x=T(4, 3), y=T(3)),
    "score_ensemble": lambda: dict(scores=T(3, 2, 5), weights=T(3)),
    "weighted_vote": lambda: dict(scores=T(4, 3, 5), weights=T(5, 2), bias=T(), threshold=T(5)),
    "token_confidence": lambda: dict(log_probs=T(5, 4), mask=torch.ones(5, 4).bool()),
    "uncertainty_scores": lambda: dict(logits=T(5, 4)),
    "window_exit": lambda: dict(logits=T(5, 4), low=0., high=1.),
    "cascade_merge_": lambda: dict(out=T(5, 4), compact=T(2, 4), index=torch.tensor([1, 3])),
    "self_distillation_loss": lambda: dict(logits=T(5, 7), target=idx, past_logits=T(5, 7), alpha=.3),
    "pass_at_n_loss": lambda: dict(log_prob=-T(5).exp(), n=4),
    "cca_loss": lambda: dict(
        log_prob=T(5), reference_log_prob=T(5), negative_log_prob=T(5), negative_reference_log_prob=T(5),
    ),
    "boost_margin_loss": lambda: dict(scores=T(4, 4), anchor_scores=T(4, 4)),
    "l2_momentum_step_": lambda: dict(
        x=T(5, 4), grad=T(5, 4), momentum=T(5, 4), origin=T(5, 4), step_size=.1, radius=.1,
    ),
    "flops_reg": lambda: dict(weights=T(5, 4), factor=T(4)),
    "ensloss": lambda: dict(output=T(5), target=T(5).sign(), draws=T(5).exp()),
    "pairwise_sigmoid_mean": lambda: dict(z1=T(5, 3, 4), z2=T(5, 3, 4), a=1., b=0.),
    "energy_hinge": lambda: dict(inliers=T(5, 7), outliers=T(4, 7)),
    "prompt_scores": lambda: dict(images=T(5, 6), texts=T(4, 3, 6), bias=T(4, 3)),
    "prompt_bias": lambda: dict(texts=T(4, 3, 6), test=T(5, 6), pretrain=T(5, 6)),
    "prompt_weights": lambda: dict(scores=T(4)),
    "merge_text_heads": lambda: dict(texts=T(4, 3, 6), weights=T(4)),
    "segment_similarity": lambda: dict(x=T(5, 6), texts=T(7, 6), offsets=torch.tensor([0, 2, 3, 7])),
    "select_descriptions": lambda: dict(
        images=T(9, 6), labels=torch.arange(9)%3, texts=T(7, 6), offsets=torch.tensor([0, 2, 3, 7]), count=1,
        neighbours=torch.tensor([[1], [2], [0]]),
    ),
    "cosine_logits": lambda: dict(x=T(5, 6), prototypes=T(3, 6), scale=T()),
    "cosine_route": lambda: dict(x=T(5, 6), centroids=T(3, 6)),
    "prototype_calibrate": lambda: dict(new=T(2, 6), base=T(3, 6)),
    "subspace_cosine_logits": lambda: dict(features=T(2, 5, 4), prototypes=T(2, 3, 4), weights=T(2, 3)),
    "prototype_complement": lambda: dict(old=T(3, 6), new=T(2, 6), new_in_new=T(2, 4)),
    "class_stats": lambda: dict(x=T(9, 4), labels=torch.arange(9)%3, num_classes=3),
    "gda_head": lambda: dict(means=T(3, 4), covariance=torch.eye(4), count=9, log_prior=T(3)),
    "dual_head_logits": lambda: dict(x=T(5, 6), texts=T(3, 6), weight=T(3, 6), bias=T(3), alpha=.5),
    "fkc_step": lambda: dict(
        x=T(5, 6), scores=T(2, 5, 6), betas=T(2), f_div=T(5), noise=T(5, 6), drift=T(5, 6),
    ),
    "afdps_step": lambda: dict(
        x=T(5, 6), b=T(5, 6), grad_mu=T(5, 6), lap_mu=T(5), V=1., dt=.1, noise=T(5, 6),
    ),
    "smc_resample": lambda: dict(logw=T(5), x=T(5, 3), u=.3),
    "hyper_connection_width": lambda: dict(
        H=T(5, 4, 8), alpha=T(4, 5), beta=T(4), alpha_weight=T(8, 5), beta_weight=T(8), alpha_scale=T(1),
        beta_scale=T(1), norm_weight=T(8), norm_bias=T(8),
    ),
    "hyper_connection_depth": lambda: dict(out=T(5, 8), H_r=T(5, 4, 8), beta=T(5, 4)),
    "hyper_connection_depth_width": lambda: dict(
        out=T(5, 8), H_r=T(5, 4, 8), out_beta=T(5, 4), alpha=T(4, 5), beta=T(4), alpha_weight=T(8, 5),
        beta_weight=T(8),
    ),
    "manifold_connection": lambda: dict(
        H=T(5, 4, 8), weight=T(32, 24), bias=T(24), scale=T(3), norm_weight=T(32), out=T(5, 8),
        out_beta=T(5, 4),
    ),
    "multi_head_contrastive_loss": lambda: dict(z1=T(4, 2, 6), z2=T(4, 2, 6), phi=torch.sin),
    "oblivious_forest": lambda: dict(
        x=T(5, 4), features=torch.zeros(3, 2).long(), thresholds=T(3, 2), leaves=T(3, 4, 2),
        learning_rate=T(2), start=T(2),
    ),
    "leaf_kernel_apply": lambda: dict(
        query=torch.zeros(3, 2).long(), train=torch.zeros(6, 2).long(), y=T(6, 2), leaves=4,
    ),
    "smoother_weights": lambda: dict(
        query=torch.zeros(3, 2).long(), train=torch.zeros(6, 2).long(), leaves=4,
    ),
    "nearest_keys": lambda: dict(x=T(2, 5, 3), keys=T(2, 6, 3)),
    "kv_bottleneck": lambda: dict(x=T(2, 5, 3), keys=T(2, 6, 3), values=T(2, 6, 4)),
    "vq_ema_update_": lambda: dict(
        keys=T(2, 6, 3), key_sum=T(2, 6, 3), size=T(2, 6).exp(), x=T(2, 5, 3), index=torch.zeros(2, 5).long(),
    ),
    "scale_ensemble": lambda: dict(x=T(5, 6), r=T(3, 6), bias=T(3, 6)),
    "member_mean_loss": lambda: dict(prediction=T(5, 3, 7), target=idx),
    "fold_for_inference": lambda: dict(layers=[(T(7, 6), T(3, 6), T(3, 7), T(3, 7))]),
    "tabm_mlp": lambda: dict(
        x=T(5, 6), layers=[(T(7, 6), T(3, 6), T(3, 7), T(3, 7))], head=(T(3, 7, 2), T(3, 2)),
    ),
    "ensemble_mlp": lambda: dict(x=T(5, 6), params=[(T(3, 6, 4), T(3, 4)), (T(3, 4, 2), T(3, 2))]),
    "fit_windows": lambda: dict(logits=T(3, 9, 4), fractions=[.5, .2]),
    "pseudo_residuals": lambda: dict(logits=T(5, 7), target=idx),
    "adaptive_aux_coefficient": lambda: dict(coefficient=.1, drop_rate=.2),
    "grad_scale": lambda: dict(x=T(5, 3), scale=T(5, 1)),
}  # fmt: skip
# Sizes that torch's own convolution refuses, in its words.
TORCHS = {("batch_ensemble_conv2d", "weight", "wide"), ("ensemble_conv2d", "weight", "wide")}
TORCHS.add(
    ("cascade_merge_", "out", "empty")
)  # a value past the rows: the kernel's own error, and its type


def wrong(v):
    """(what, value) in the place of v."""
    if isinstance(v, Tensor):
        yield from (("a list", v.tolist()), ("a string", "x"), ("None", None), ("deeper", v[None]))
        yield from (("elsewhere", v.to("meta")), ("complex", v.to(torch.complex64)))
        yield "another dtype", v.double() if v.is_floating_point() else v.float()
        if v.is_floating_point():
            yield "whole numbers", v.long()
        if v.dim():
            yield from (("short", v[:-1]), ("wide", torch.cat([v, v], -1)), ("empty", v[:0]))
            yield "flat", v.sum(-1) if v.is_floating_point() else v[0]
    elif isinstance(v, (int, float)):
        yield from (("a string", "x"), ("None", None), ("a list", [1]), ("NaN", float("nan")))
        yield from (("negative", -7), ("a fraction", 2.5))
    elif isinstance(v, (list, tuple)):
        yield from (
            ("empty", []),
            ("a string", "x"),
            ("None", None),
            ("one of them", v[0]),
            ("a number", 3),
        )


def copied(v):
    return v.clone() if isinstance(v, Tensor) else v


@pytest.mark.parametrize("name", GIVEN)
def test_errors_name_the_functions_own_arguments(name):
    torch.manual_seed(0)
    function, given = getattr(ensemble, name), GIVEN[name]()
    parameters = set(inspect.signature(function).parameters)
    function(**{k: copied(v) for k, v in given.items()})
    for argument, value in given.items():
        for what, other in wrong(value):
            if (name, argument, what) in TORCHS:
                continue
            changed = {k: copied(v) for k, v in given.items()} | {argument: other}
            try:
                function(**changed)
            except (ValueError, TypeError, IndexError) as error:
                said = str(error)
                named = re.match(r"\w+", said)
                beside = re.search(r"to go with (\w+) of shape", said)
                assert named and named[0] in parameters, f"{argument} {what}: {said}"
                assert beside is None or beside[1] in parameters, f"{argument} {what}: {said}"


def test_every_function_is_here():
    functions = {n for n in ensemble.__all__ if n[0].islower()}
    assert functions - set(GIVEN) == {"forest_leaves", "stack_members"}
