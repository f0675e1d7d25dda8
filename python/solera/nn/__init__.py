"""Modules: drop-ins with the argument names and state_dict keys of the modules they replace."""

from .ada_norm import (
    AdaLayerNorm,
    AdaLayerNormZero,
    AdaRMSNorm,
    DeepNorm,
    TimeDependentParameter,
    TimeLayerNorm,
)
from .adapters import MultiLoRALinear
from .attention import QKNorm
from .channel_norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
)
from .connections import HyperConnections
from .contrastive import MultiHeadContrastiveLoss
from .conversion import Conversion, convert, revert
from .ensemble import LinearBatchEnsemble, LinearEnsemble
from .ensemble_conv import BatchEnsembleConv2d, EnsembleConv2d
from .evonorm import EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dB2, EvoNorm2dS0
from .hyper_linear import HyperConv2d, HyperLinear
from .logits import NormalizedSoftmaxCrossEntropyLoss, StableMaxCrossEntropyLoss, ZLoss
from .mixout import MixoutLinear
from .norm import LayerNorm, RMSNorm
from .online_norm import OnlineNorm1d, OnlineNorm2d
from .samples_loss import SamplesLoss
from .scaled_std_conv import ScaledStdConv2d
from .sliced import SelfAttentionProjection
from .style import ILN, AdaLIN, MomentShortcut, PositionalNorm
from .tabm import TabM
from .tabm_backbones import (
    MLPBackbone,
    MLPBackboneBatchEnsemble,
    MLPBackboneEnsemble,
    MLPBackboneEnsembleBase,
    MLPBackboneMiniEnsemble,
    make_tabm_backbone,
)
from .tabm_functions import (
    batchensemble_linear_layers_,
    ensemble_batchnorm1d_layers_,
    ensemble_layernorm_layers_,
    ensemble_linear_layers_,
    ensemble_view,
    init_scaling_,
)
from .tabm_layers import (
    BatchNorm1dEnsemble,
    ElementwiseAffine,
    EnsembleView,
    LayerNormEnsemble,
)
from .test_time import AlphaBatchNorm1d, AlphaBatchNorm2d, AlphaBatchNorm3d

__all__ = [
    "ILN",
    "AdaLIN",
    "AdaLayerNorm",
    "AdaLayerNormZero",
    "AdaRMSNorm",
    "AlphaBatchNorm1d",
    "AlphaBatchNorm2d",
    "AlphaBatchNorm3d",
    "BatchEnsembleConv2d",
    "BatchNorm1d",
    "BatchNorm1dEnsemble",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conversion",
    "DeepNorm",
    "ElementwiseAffine",
    "EnsembleConv2d",
    "EnsembleView",
    "EvoNorm2dB0",
    "EvoNorm2dB1",
    "EvoNorm2dB2",
    "EvoNorm2dS0",
    "GroupNorm",
    "HyperConnections",
    "HyperConv2d",
    "HyperLinear",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LayerNormEnsemble",
    "LinearBatchEnsemble",
    "LinearEnsemble",
    "MLPBackbone",
    "MLPBackboneBatchEnsemble",
    "MLPBackboneEnsemble",
    "MLPBackboneEnsembleBase",
    "MLPBackboneMiniEnsemble",
    "MixoutLinear",
    "MomentShortcut",
    "MultiHeadContrastiveLoss",
    "MultiLoRALinear",
    "NormalizedSoftmaxCrossEntropyLoss",
    "OnlineNorm1d",
    "OnlineNorm2d",
    "PositionalNorm",
    "QKNorm",
    "RMSNorm",
    "SamplesLoss",
    "ScaledStdConv2d",
    "SelfAttentionProjection",
    "StableMaxCrossEntropyLoss",
    "TabM",
    "TimeDependentParameter",
    "TimeLayerNorm",
    "ZLoss",
    "batchensemble_linear_layers_",
    "convert",
    "ensemble_batchnorm1d_layers_",
    "ensemble_layernorm_layers_",
    "ensemble_linear_layers_",
    "ensemble_view",
    "init_scaling_",
    "make_tabm_backbone",
    "revert",
]
