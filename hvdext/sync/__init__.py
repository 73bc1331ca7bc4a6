"""Parameter sync: what is exchanged, when, how it travels, with whom, and what becomes of it."""

from hvdext.common.public_names import unknown_name
from hvdext.sync.attachment import attached
from hvdext.sync.engine.engine import Exchanged, Totals
from hvdext.sync.parameter_sync import ParameterSync
from hvdext.sync.presets import (
    EASGD,
    SMA,
    AsyncGossip,
    DiLoCo,
    LocalSGD,
    PartialSync,
    PostLocalSGD,
    SlowMo,
    StreamingDiLoCo,
)
from hvdext.sync.rule import Corrected, Mean, Outer, Pull
from hvdext.sync.what import All, Matching, Rotating
from hvdext.sync.when import Adaptive, Always, AtEnd, Every, EveryEpoch
from hvdext.sync.whom import Everyone, Exponential, Group, Hierarchical, Pairs, Ring
from hvdext.sync.wire import Wire

__all__ = [
    "EASGD",
    "SMA",
    "Adaptive",
    "All",
    "Always",
    "AsyncGossip",
    "AtEnd",
    "Corrected",
    "DiLoCo",
    "Every",
    "EveryEpoch",
    "Everyone",
    "Exchanged",
    "Exponential",
    "Group",
    "Hierarchical",
    "LocalSGD",
    "Matching",
    "Mean",
    "Outer",
    "Pairs",
    "ParameterSync",
    "PartialSync",
    "PostLocalSGD",
    "Pull",
    "Ring",
    "Rotating",
    "SlowMo",
    "StreamingDiLoCo",
    "Totals",
    "Wire",
    "attached",
]


def __getattr__(name: str) -> None:
    raise unknown_name(__name__, name, __all__)
