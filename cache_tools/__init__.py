"""The on-disk format, which both stages read and write byte for byte. It does not import torch.

`Cache` and `Dataset` open the two folders; NumPy is enough to read them. A name is imported when it
is first used, because the programs set up signals before slow imports.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import Cache
    from .dataset import Dataset

__all__ = ["Cache", "Dataset"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{name.lower()}"), name)
