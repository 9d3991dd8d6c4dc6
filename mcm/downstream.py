"""The interface of a fine-tuning task. Classification, segmentation and detection implement it."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from accelerate import Accelerator
from torch import Tensor, nn

from cache_tools.dataset import Dataset
from cache_tools.images import RGB
from mcm.backbones import Backbone
from mcm.config import FinetuneConfig
from mcm.stream import Batch, RowSource

Metrics = dict[str, float]
Classes = dict[str, list[float | None]]  # a metric of each class, in the order of the classes


class Prediction(NamedTuple):
    """The line of a picture in predictions.jsonl, its drawings by folder, and COCO results."""

    line: dict[str, Any]
    drawings: dict[str, bytes]
    objects: list[dict[str, Any]] | None = None


Predictor = Callable[[Sequence[RGB]], list[Prediction]]


class Downstream(Protocol):
    """A task of fine-tuning on a DATASET.

    `model` is not wrapped. Layer decay applies to `model.encoder`, or to `model` if it has none. A
    micro-batch is a multiple of `group` rows. `headline` is the name of the metric that the command
    prints. `shown` holds pictures and counts of the last evaluation for the report.
    """

    group: int
    headline: str
    shown: dict[str, Tensor]

    def __init__(self, config: FinetuneConfig, dataset: Dataset, backbone: Backbone) -> None: ...

    @property
    def model(self) -> nn.Module: ...

    @property
    def train(self) -> RowSource: ...

    @property
    def val(self) -> RowSource: ...

    def loss(self, wrapped: nn.Module, batch: Batch) -> Tensor:
        """Return the float32 loss of a batch on the device; `wrapped` is the model to call."""

    def evaluate(self, items: Iterable[Batch], accelerator: Accelerator) -> tuple[Metrics, Classes]:
        """Return the metrics of "val" over all ranks, on each rank; padded rows do not count."""

    @staticmethod
    def predictor(run: Path) -> Predictor:
        """Return a function that maps upright pictures to the predictions of a RUN."""
