"""Decoding with NVIDIA DALI: one pipeline, on the GPU (nvJPEG) or on the CPU.

Read, decode, resize to the size of each view, cut into patches: all inside DALI. On a GPU only the files' bytes are
copied to the device, and the patches are made there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_eve.data.images.decode import (
    MAX_PIXELS_LIMIT,
    ORIENTATIONS,
    ImageError,
    ImageHeader,
    Orientation,
    read_header,
)
from megatron_eve.data.images.interface import DecodeSettings, ImageTask, Views
from megatron_eve.data.images.patches import square_margin
from megatron_eve.data.images.pillow import prepare_with_pillow
from megatron_eve.data.images.png import without_texts
from megatron_eve.data.images.resizing import crop_window
from megatron_eve.data.images.tiles import cut_views, uncut_views
from megatron_eve.models.family import View

# Most pictures of one run of the pipeline; a pack with more takes several runs.
_BATCH = 64
# Most pixels of one run, since all its pictures are in memory decoded (0.4 GB; 64 of the largest would take 17).
_BATCH_PIXELS = 1 << 27
# Most pixels of one picture with its margins; Pillow, which does without most of them, takes those with more.
_MOST_PIXELS = MAX_PIXELS_LIMIT
_Size = tuple[int, int]  # width and height in pixels
_UPRIGHT = Orientation(transpose=False, flip_x=False, flip_y=False)


class _Kind(NamedTuple):
    """The kind of a pipeline: pictures that need the same operations share one."""

    views: tuple[tuple[str, View], ...]
    """The requested views by name, with width and height 0, since these differ from picture to picture."""
    turned: bool
    """The pictures are turned upright."""
    transpose: bool
    """Rows and columns are exchanged to turn them upright."""


class DaliDecoder:
    """A DALI pipeline that is built when first needed, and again after it broke.

    Args:
        settings: of the dataset and rank.
        threads: of the pipeline.
        gpu: index of the device it decodes on; None for the CPU.
    """

    def __init__(self, settings: DecodeSettings, *, threads: int, gpu: int | None) -> None:
        import nvidia.dali  # noqa: F401  an ImportError now rather than at the first picture

        self._settings = settings
        self._threads = threads
        self._gpu = gpu
        self._stream = None if gpu is None else torch.cuda.Stream(gpu)
        self._pipelines: dict[_Kind, Any] = {}

    def prepare(self, tasks: Sequence[ImageTask]) -> list[Views | ImageError]:
        """See `ImageDecoder`. If a picture breaks the pipeline, all pictures of its run are decoded with Pillow."""
        results = self._prepare([ImageTask(task.data, uncut_views(task.views)) for task in tasks])
        return [
            result if isinstance(result, ImageError) else cut_views(result, task.views)
            for task, result in zip(tasks, results, strict=True)
        ]

    def _prepare(self, tasks: Sequence[ImageTask]) -> list[Views | ImageError]:
        """The same for views that are not cut into tiles."""
        results: list[Views | ImageError | None] = [None] * len(tasks)
        turns: list[Orientation] = [_UPRIGHT] * len(tasks)
        sizes = [(0, 0)] * len(tasks)
        pixels = [0] * len(tasks)
        groups: dict[_Kind, list[int]] = {}
        for number, task in enumerate(tasks):
            try:
                header = read_header(task.data, self._settings.max_pixels)
            except ImageError as error:
                results[number] = error
                continue
            pixels[number] = _pixels(header, task.views.values())
            if not header.plain or pixels[number] > _MOST_PIXELS:
                results[number] = prepare_with_pillow(task, self._settings)
                continue
            if self._settings.apply_exif:
                turns[number] = ORIENTATIONS.get(header.orientation, _UPRIGHT)
            sizes[number] = header.upright_size(self._settings.apply_exif)
            turn = turns[number]
            kind = _Kind(_without_sizes(task.views), turn != _UPRIGHT, turn.transpose)
            groups.setdefault(kind, []).append(number)
        for kind, numbers in groups.items():
            for some in _batches(numbers, pixels):
                prepared = self._run(
                    kind, [tasks[n] for n in some], [turns[n] for n in some], [sizes[n] for n in some]
                )
                for number, result in zip(some, prepared, strict=True):
                    results[number] = result
        return [result for result in results if result is not None]

    def close(self) -> None:
        """Drop the pipelines."""
        self._pipelines.clear()

    def _run(
        self, kind: _Kind, tasks: Sequence[ImageTask], turns: Sequence[Orientation], sizes: Sequence[_Size]
    ) -> list[Views | ImageError]:
        try:
            pipeline = self._pipelines.get(kind) or self._build(kind)
            self._pipelines[kind] = pipeline
            outputs = self._outputs(pipeline, kind, tasks, turns, sizes)
        except RuntimeError:
            # A DALI pipeline is invalid after an error: Pillow decodes these pictures, the next ones get a new
            # pipeline.
            self._pipelines.pop(kind, None)
            return [prepare_with_pillow(task, self._settings) for task in tasks]
        names = [name for name, _ in kind.views]
        return [dict(zip(names, tensors, strict=True)) for tensors in zip(*outputs, strict=True)]

    def _outputs(
        self,
        pipeline: Any,
        kind: _Kind,
        tasks: Sequence[ImageTask],
        turns: Sequence[Orientation],
        sizes: Sequence[_Size],
    ) -> list[list[Any]]:
        """Feed the files and their sizes, run once: for each view, the tensors of all tasks."""
        files = [without_texts(task.data) for task in tasks]  # libpng would unpack these texts, however long
        pipeline.feed_input("files", [np.frombuffer(data, dtype=np.uint8) for data in files])
        if kind.turned:
            pipeline.feed_input("flip_x", [np.array(turn.flip_x, np.int32) for turn in turns])
            pipeline.feed_input("flip_y", [np.array(turn.flip_y, np.int32) for turn in turns])
        for name, view in kind.views:
            views = [task.views[name] for task in tasks]
            self._feed_view(pipeline, name, view, views)
            self._feed_fit(pipeline, name, views, sizes)
        return [self._copies(batch, len(tasks)) for batch in pipeline.run()]

    def _feed_view(self, pipeline: Any, name: str, kind: View, views: Sequence[View]) -> None:
        """Feed the sizes of one view of each picture."""
        pipeline.feed_input(
            f"{name}_size", [np.array([view.height, view.width], np.float32) for view in views]
        )
        if kind.square:
            side, unit = kind.square, kind.margin_unit
            margins = [
                [square_margin(side, length, unit) for length in (view.height, view.width)] for view in views
            ]
            pipeline.feed_input(f"{name}_start", [-np.array(margin, np.int32) for margin in margins])
        if kind.patch_size:
            patch, merge = kind.patch_size, kind.merge
            sides = [
                (kind.square, kind.square) if kind.square else (view.height, view.width) for view in views
            ]
            pipeline.feed_input(
                f"{name}_grid",
                [
                    np.array(
                        [h // patch // merge, merge, patch, w // patch // merge, merge, patch, 3], np.int32
                    )
                    for h, w in sides
                ],
            )

    def _feed_fit(self, pipeline: Any, name: str, views: Sequence[View], sizes: Sequence[_Size]) -> None:
        """Feed the square that each picture is padded to, or the part of it that is resized: (y, x) in pixels."""
        starts: list[NDArray[Any]] = []
        ends: list[NDArray[Any]] = []
        for view, (width, height) in zip(views, sizes, strict=True):
            if view.fit == "pad":
                square = max(width, height)
                starts.append(
                    np.array([-square_margin(square, side, 1) for side in (height, width)], np.int32)
                )
                ends.append(np.array([square, square], np.int32))
            elif view.fit == "crop":
                new_width, new_height, left, top = crop_window(width, height, view.width)
                scale = np.array([height / new_height, width / new_width], np.float32)
                starts.append(scale * np.array([top, left], np.float32))
                ends.append(scale * np.array([top + view.height, left + view.width], np.float32))
        if starts:
            pipeline.feed_input(f"{name}_fit_start", starts)
            pipeline.feed_input(f"{name}_fit_end", ends)

    def _copies(self, batch: Any, count: int) -> list[torch.Tensor]:
        """The outputs of a run, copied, since the next run overwrites them."""
        if self._stream is None:
            return [torch.from_numpy(np.array(batch[i])) for i in range(count)]
        # Not on the default stream, where copies would wait behind the kernels of a step.
        with torch.cuda.stream(self._stream):
            copies = [torch.from_dlpack(batch[i]).clone() for i in range(count)]
        self._stream.synchronize()
        for copy in copies:
            copy.record_stream(torch.cuda.default_stream(self._stream.device))
        return copies

    def _build(self, kind: _Kind) -> Any:
        """The pipeline for pictures of a kind."""
        from nvidia import dali

        fn: Any = dali.fn
        types: Any = dali.types

        def finished(image: Any, name: str, view: View) -> Any:
            """Resize, then do what `patches.finished` does, in DALI's operators."""
            wish = fn.external_source(name=f"{name}_size", dtype=types.FLOAT, ndim=1)
            part = {}
            if view.fit != "stretch":
                kind_of_number = types.INT32 if view.fit == "pad" else types.FLOAT
                start, end = (
                    fn.external_source(name=f"{name}_fit_{which}", dtype=kind_of_number, ndim=1)
                    for which in ("start", "end")
                )
                if view.fit == "crop":
                    part = {"roi_start": start, "roi_end": end}
                else:
                    image = fn.slice(
                        image, start=start, shape=end, axes=[0, 1],
                        out_of_bounds_policy="pad", fill_values=list(view.pad_colour),
                    )  # fmt: skip
            pixels = fn.resize(
                image, size=wish, interp_type=types.INTERP_CUBIC, antialias=True, dtype=types.UINT8, **part
            )
            if view.square:
                start = fn.external_source(name=f"{name}_start", dtype=types.INT32, ndim=1)
                pixels = fn.slice(
                    pixels, start=start, shape=[view.square, view.square], axes=[0, 1],
                    out_of_bounds_policy="pad", fill_values=list(view.pad_colour),
                )  # fmt: skip
            if view.patch_size:
                shape = fn.external_source(name=f"{name}_grid", dtype=types.INT32, ndim=1)
                grid = fn.transpose(fn.reshape(pixels, shape=shape), perm=[0, 3, 1, 4, 6, 2, 5])
                pixels = fn.reshape(grid, shape=[-1, 3 * view.patch_size**2])
            return pixels

        # No prefetching: the loader's own thread decides what is decoded next.
        pipeline = dali.Pipeline(
            batch_size=_BATCH, num_threads=self._threads, device_id=self._gpu, prefetch_queue_depth=1,
            exec_pipelined=False, exec_async=False,
        )  # fmt: skip
        with pipeline:
            files = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
            image = fn.decoders.image(
                files,
                device="cpu" if self._gpu is None else "mixed",
                output_type=types.RGB,
                # Pillow reads the orientation: DALI finds it in fewer places, and version 2.4 crashes on damaged EXIF
                # data.
                adjust_orientation=False,
                # Only CUDA kernels: the GPU's decoding engine sometimes gives values that differ by 1.
                **({} if self._gpu is None else {"hw_decoder_load": 0.0, "jpeg_fancy_upsampling": True}),
            )
            if kind.transpose:
                image = fn.transpose(image, perm=[1, 0, 2], output_layout="HWC")
            if kind.turned:
                flip_x, flip_y = (
                    fn.external_source(name=name, dtype=types.INT32, ndim=0) for name in ("flip_x", "flip_y")
                )
                image = fn.flip(image, horizontal=flip_x, vertical=flip_y)
            pipeline.set_outputs(*(finished(image, name, view) for name, view in kind.views))
        pipeline.build()
        return pipeline


def _pixels(header: ImageHeader, views: Iterable[View]) -> int:
    """Pixels of a picture in memory: of the square that it is padded to, if it is."""
    padded = any(view.fit == "pad" for view in views)
    return max(header.width, header.height) ** 2 if padded else header.width * header.height


def _without_sizes(views: Mapping[str, View]) -> tuple[tuple[str, View], ...]:
    return tuple((name, view._replace(width=0, height=0)) for name, view in views.items())


def _batches(numbers: Sequence[int], pixels: Sequence[int]) -> Iterator[list[int]]:
    """Pictures that go through a pipeline together: as many as it takes, and as their pixels allow."""
    batch: list[int] = []
    total = 0
    for number in numbers:
        if batch and (len(batch) == _BATCH or total + pixels[number] > _BATCH_PIXELS):
            yield batch
            batch, total = [], 0
        batch.append(number)
        total += pixels[number]
    if batch:
        yield batch
