"""Stage two, from a cache to weights: masking, model, targets, training, probing and export.

A name of the public API is imported when it is first used, because importing torch takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcm.config import PretrainConfig
    from mcm.masking import mask_channels
    from mcm.model import MaskedChannelModel
    from mcm.stream import CacheDataset

__all__ = ["CacheDataset", "MaskedChannelModel", "PretrainConfig", "mask_channels"]
_MODULES = dict(zip(__all__, ("stream", "model", "config", "masking"), strict=True))


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
