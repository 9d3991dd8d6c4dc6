"""Make one shard of all its missing views: decode, render, forward, encode and write, overlapped.

B batch, N patch tokens, C channels, H W pixels. Threads decode and render ahead, this thread runs
the teacher, and one thread writes. A source is decoded once for all views. Batches never cross a
shard and are padded, so the bytes do not depend on where a run was interrupted.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_tools.cache import Unit
from cache_tools.dataset import Dataset
from cache_tools.errors import CorruptionError, UsageError
from cache_tools.images import (
    RGB,
    PictureRefused,
    decode_rgb,
    decode_view_into,
    encode_view,
    resize_rgb,
)
from cache_tools.quantize import CALIBRATION_ROWS, channel_stats, decode, encode
from cache_tools.schema import CacheIdentity, Fidelity, Fingerprint
from cache_tools.writer import UnitShardWriter, unit_writer

from .teachers import Teacher
from .views import Geometry, draw_crop, render
from .worker_pool import Report


@dataclass(frozen=True)
class View:
    """A rendered view: its stored bytes, its crop, and the teacher's input uint8 [H, W, 3].

    The teacher's input is computed from the stored bytes.
    """

    data: bytes
    geometry: Geometry
    teacher_input: RGB


@dataclass
class Timers:
    """Seconds that the main thread spends in each activity.

    The activities are "wait for pictures", "teacher" (forward and encoding), "wait for the disk".
    """

    seconds: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def measure(self, what: str) -> Iterator[None]:
        """Add the time inside the `with` statement to `what`, except time that is nested in it."""
        start, before = time.perf_counter(), sum(self.seconds.values())
        yield
        nested = sum(self.seconds.values()) - before
        self.seconds[what] += time.perf_counter() - start - nested  # type: ignore[assignment]

    def __str__(self) -> str:
        total = sum(self.seconds.values()) or 1
        shares = self.seconds.most_common()
        return ", ".join(f"{what} {share / total:.0%}" for what, share in shares)


def render_views(
    dataset: Dataset, identity: CacheIdentity, split: str, row: int, views: Sequence[int]
) -> list[View]:
    """Return all `views` of a row, from one decode of its source.

    Raises: CorruptionError when a picture does not decode, although it did in `mcm-cache shard`.
    """
    data, _ = dataset.picture(split, row)
    try:
        rgb = decode_rgb(data)
    except PictureRefused as error:
        expected = f"{split} row {row}: expected a picture that decodes, as `mcm-cache shard` found"
        raise CorruptionError(f"{dataset.path}: {expected}; now refused: {error}") from error
    return [render_view(rgb, identity, split, row, view) for view in views]


def render_view(rgb: RGB, identity: CacheIdentity, split: str, row: int, view: int) -> View:
    """Return one view of a decoded picture."""
    height, width = identity.view_height, identity.view_width
    geometry = draw_crop(identity.crop, identity.seed, split, row, view, *rgb.shape[:2])
    data = encode_view(render(rgb, geometry, height, width), identity.view_encoding)
    stored = np.empty((height, width, 3), np.uint8)
    decode_view_into(data, stored)
    return View(data, geometry, resize_rgb(stored, identity.teacher.height, identity.teacher.width))


class UnitEncoder:
    """Encode the features of one shard of one unit on the device, and write them.

    The first rows of the shard calibrate the channel statistics.
    """

    def __init__(
        self, writer: UnitShardWriter, write_pool: ThreadPoolExecutor, timers: Timers
    ) -> None:
        self.writer, self.write_pool, self.timers = writer, write_pool, timers
        self.identity = writer.unit.identity
        self.rows = writer.unit.shard_rows(writer.shard)
        self.waiting: list[tuple[Tensor, Tensor | None]] = []
        self.seen = 0
        self.calibration: tuple[Tensor, Tensor] | None = None
        self.written: deque[Future[None]] = deque()
        self.unfit: list[Tensor] = []  # per row: whether a feature or its code is not finite
        self.peaks: list[Tensor] = []  # per row: the largest absolute feature
        self.sums: dict[str, Any] = Counter()

    def add(self, patch_BNC: Tensor, cls_BC: Tensor | None) -> None:
        """Add the next rows, float32 on the device.

        The number of rows is a multiple of 16, except for the last rows of a shard.
        """
        self.waiting.append((patch_BNC, cls_BC))
        self.seen += len(patch_BNC)
        if self.calibration is None and self.seen < min(CALIBRATION_ROWS, self.rows):
            return
        if self.calibration is None:
            calibration_BNC = torch.cat([patch for patch, _ in self.waiting])[:CALIBRATION_ROWS]
            peak_B = calibration_BNC.abs().flatten(1).amax(1)
            # One NaN here would make the statistics of every row NaN.
            self._check_finite(~torch.isfinite(peak_B), peak_B)
            if calibration_BNC.is_cuda:  # the sums of numpy wait for the copy and take 0.1 s
                mean_C, std_C = channel_stats(calibration_BNC, torch)
            else:
                mean_C, std_C = map(torch.from_numpy, channel_stats(calibration_BNC.numpy()))
            self.calibration = mean_C, std_C
            if self.identity.dtype != "float16":
                self._write({"channel_mean": mean_C[None], "channel_std": std_C[None]})
        for patch, cls in self.waiting:
            self._encode(patch, cls, *self.calibration)
        self.waiting = []

    def _encode(self, x_BNC: Tensor, cls_BC: Tensor | None, mean_C: Tensor, std_C: Tensor) -> None:
        arrays: dict[str, Tensor] = encode(self.identity.dtype, x_BNC, mean_C, std_C, torch)
        decoded = decode(arrays["patch"], arrays.get("scale"), mean_C, std_C, torch)
        unfit_B, peak_B = ~torch.isfinite(decoded).flatten(1).all(1), x_BNC.abs().flatten(1).amax(1)
        if cls_BC is not None:
            arrays["cls"] = cls_BC.half()
            unfit_B |= ~torch.isfinite(arrays["cls"]).all(1)
            peak_B = torch.maximum(peak_B, cls_BC.abs().amax(1))
        self.unfit.append(unfit_B)
        self.peaks.append(peak_B)
        z, q = (x_BNC - mean_C) / std_C, (decoded - mean_C) / std_C
        self.sums["error"] += ((z - q) ** 2).sum(dtype=torch.float64)
        self.sums["energy"] += (z**2).sum(dtype=torch.float64)
        self.sums["cosine"] += torch.nn.functional.cosine_similarity(z, q, dim=-1).sum(
            dtype=torch.float64
        )
        self.sums["sum"] += x_BNC.sum((0, 1), dtype=torch.float64)
        self.sums["square"] += (x_BNC.double() ** 2).sum((0, 1))
        self._write(arrays)

    def add_views(self, views: Iterable[View], labels: Iterable[int]) -> None:
        """Write the stored views of the next rows."""
        stored = [(v.data, label, v.geometry) for v, label in zip(views, labels, strict=True)]

        def work() -> None:
            for view in stored:
                self.writer.add_view(*view)

        self._submit(work)

    def _write(self, arrays: dict[str, Tensor]) -> None:
        def work() -> None:
            for name, tensor in arrays.items():
                self.writer.add(name, tensor.cpu().numpy())

        self._submit(work)

    def _submit(self, work: Callable[[], None]) -> None:
        self._wait(4)  # bounds the memory of the batches that wait for the disk
        self.written.append(self.write_pool.submit(work))

    def _wait(self, left: int) -> None:
        with self.timers.measure("wait for the disk"):
            while len(self.written) > left:
                self.written.popleft().result()

    def _check_finite(self, unfit_B: Tensor, peak_B: Tensor) -> None:
        rows = unfit_B.nonzero().flatten().tolist()
        if rows:
            value = float(peak_B[rows[0]])
            row = self.writer.shard * self.identity.rows_per_shard + rows[0]
            too_large = self.identity.dtype == "float16" and np.isfinite(value)
            remedy = "--dtype int8" if too_large else "--set precision=fp32"
            dtype, layer = self.identity.dtype, self.identity.teacher.layer
            raise UsageError(
                f"{self.writer.unit} shard {self.writer.shard}: expected finite features that fit "
                f"{dtype}; found {value:.4g} in the {layer} layer, row {row} ({len(rows)} of "
                f"{self.rows} rows); use {remedy}"
            )

    def commit(self, fingerprint: Fingerprint, precision_mse: float, max_error: float) -> None:
        """Write the remaining features and commit the shard.

        Raises: UsageError, without a commit, when a feature is not finite, or when the relative MSE
        of the stored features is above `max_error`.
        """
        self._wait(0)
        self._check_finite(torch.cat(self.unfit), torch.cat(self.peaks))
        tokens = self.rows * self.identity.tokens
        mean = (self.sums["sum"] / tokens).cpu().numpy()
        var = np.maximum((self.sums["square"] / tokens).cpu().numpy() - mean**2, 0)
        loss = float(self.sums["error"] / self.sums["energy"].clamp(min=1e-30))
        if not loss <= max_error:
            raise UsageError(
                f"{self.writer.unit} shard {self.writer.shard}: expected a relative MSE of at most "
                f"{max_error:g}; found {loss:.3g} with {self.identity.dtype}; use a wider --dtype "
                "or raise max_error"
            )
        fidelity = Fidelity(
            relative_mse=float(f"{loss:.4g}"),
            cosine=float(f"{float(self.sums['cosine']) / tokens:.7g}"),
            precision_mse=float(f"{precision_mse:.4g}"),
        )
        self.writer.commit(mean, var, fidelity, fingerprint)


@dataclass
class Extractor:
    """Make shards from the sources, with one teacher and a fixed batch, on shared threads."""

    dataset: Dataset
    identity: CacheIdentity
    teacher: Teacher
    fingerprint: Fingerprint
    precision_mse: float
    max_error: float
    render_pool: ThreadPoolExecutor
    write_pool: ThreadPoolExecutor
    timers: Timers = field(default_factory=Timers)

    def shard(self, units: Sequence[Unit], shard: int, report: Report) -> None:
        """Make and commit one shard of each of `units`, which are views of one split."""
        first = shard * self.identity.rows_per_shard
        rows = range(first, first + units[0].shard_rows(shard))
        index = self.dataset.index(units[0].split, shard)
        with ExitStack() as stack:
            writers = [stack.enter_context(unit_writer(unit, shard)) for unit in units]
            encoders = [UnitEncoder(writer, self.write_pool, self.timers) for writer in writers]
            rendered = self._render_ahead(units, rows)
            labels = iter(index["label"].tolist())
            while batch := self._next_batch(rendered):
                batch_labels = list(islice(labels, len(batch)))
                for encoder, views in zip(encoders, zip(*batch, strict=True), strict=True):
                    encoder.add_views(views, batch_labels)
                    self._forward(encoder, [view.teacher_input for view in views])
                report(len(batch) * len(units), str(self.timers))
            for encoder in encoders:
                encoder.commit(self.fingerprint, self.precision_mse, self.max_error)

    def _render_ahead(self, units: Sequence[Unit], rows: range) -> Iterator[list[View]]:
        """Yield the views of each row in order; threads render up to two batches ahead."""
        split, views = units[0].split, [unit.view for unit in units]

        def submit(row: int) -> Future[list[View]]:
            pool, request = self.render_pool, (self.dataset, self.identity, split, row, views)
            return pool.submit(render_views, *request)

        todo = iter(rows)
        futures = deque(map(submit, islice(todo, 2 * self.fingerprint.batch)))
        while futures:
            yield futures.popleft().result()
            futures.extend(map(submit, islice(todo, 1)))

    def _next_batch(self, rendered: Iterator[list[View]]) -> list[list[View]]:
        with self.timers.measure("wait for pictures"):
            return list(islice(rendered, self.fingerprint.batch))

    def _forward(self, encoder: UnitEncoder, inputs: list[RGB]) -> None:
        shape, device = (self.fingerprint.batch, *inputs[0].shape), self.teacher.device
        padded = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
        for row, picture in zip(padded.numpy(), inputs, strict=False):
            row[:] = picture
        padded[len(inputs) :] = 0
        with self.timers.measure("teacher"):  # on a GPU, the encoding waits for the forward
            patch_BNC, cls_BC = self.teacher.features(padded)
            rows = slice(len(inputs))
            encoder.add(patch_BNC[rows], None if cls_BC is None else cls_BC[rows])
