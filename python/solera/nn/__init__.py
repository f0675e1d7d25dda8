"""Modules: drop-ins with the argument names and state_dict keys of the modules they replace."""

from .ada_norm import (
    AdaLayerNorm,
    AdaLayerNormZero,
    AdaRMSNorm,
    DeepNorm,
    TimeDependentParameter,
    TimeLayerNorm,
)
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
from .conversion import Conversion, convert, revert
from .ensemble import LinearBatchEnsemble, LinearEnsemble
from .evonorm import EvoNorm2dB0, EvoNorm2dB1, EvoNorm2dB2, EvoNorm2dS0
from .logits import NormalizedSoftmaxCrossEntropyLoss, StableMaxCrossEntropyLoss, ZLoss
from .norm import LayerNorm, RMSNorm
from .online_norm import OnlineNorm1d, OnlineNorm2d
from .scaled_std_conv import ScaledStdConv2d
from .style import ILN, AdaLIN, MomentShortcut, PositionalNorm
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
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conversion",
    "DeepNorm",
    "EvoNorm2dB0",
    "EvoNorm2dB1",
    "EvoNorm2dB2",
    "EvoNorm2dS0",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LinearBatchEnsemble",
    "LinearEnsemble",
    "MomentShortcut",
    "NormalizedSoftmaxCrossEntropyLoss",
    "OnlineNorm1d",
    "OnlineNorm2d",
    "PositionalNorm",
    "QKNorm",
    "RMSNorm",
    "ScaledStdConv2d",
    "StableMaxCrossEntropyLoss",
    "TimeDependentParameter",
    "TimeLayerNorm",
    "ZLoss",
    "convert",
    "revert",
]
