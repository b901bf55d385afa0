"""gpuload inside NVIDIA DALI: the rows of a Lance dataset enter a DALI pipeline, `Batch` objects leave it.

LanceSource ─encoded images, ids, numbers─▶ the user's pipeline ─TensorLists─▶ DALILanceIterator ─▶ Batch
   plan, read, tokenize, judge: threads         DALI's threads, or the GPU         what DALI cannot carry joins here

One of the two files that import DALI. Order, ranks, filter, state and policies are those of `LanceDataset`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.dlpack import from_dlpack

from gpuload.batch import Batch
from gpuload.errors import ConfigError, DecodeError, DeviceError
from gpuload.feed import Feed, Undecoded, addresses
from gpuload.fields.text import Text
from gpuload.images.decode.arena import event
from gpuload.images.decode.lanes import about_images
from gpuload.images.headers import sniff

try:
    from nvidia.dali import Pipeline, fn, types
    from nvidia.dali.pipeline import do_not_convert
    from nvidia.dali.plugin.base_iterator import LastBatchPolicy
    from nvidia.dali.plugin.pytorch import feed_ndarray, to_torch_type
except ImportError as error:
    raise DeviceError(
        f"Expected NVIDIA DALI for gpuload.dali, got: {error}. "
        'pip install "gpuload[dali13]", or without a GPU: pip install nvidia-dali-cuda130'
    ) from error

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "PNM", "JPEG2000", "WEBP")  # what DALI decodes
_TYPES = {
    torch.bool: types.BOOL, torch.uint8: types.UINT8, torch.int8: types.INT8, torch.int16: types.INT16,
    torch.int32: types.INT32, torch.int64: types.INT64, torch.uint16: types.UINT16, torch.uint32: types.UINT32,
    torch.float16: types.FLOAT16, torch.float32: types.FLOAT, torch.float64: types.FLOAT64,
}  # fmt: skip
_OURS = ("device", "decoder", "to_tensor_fn", "drop_last")
_HINT = "on_error covers what headers give away. DALI fails whole batches: remove or rewrite the row."


class LanceSource(Feed):
    """What ``fn.external_source(source=..., num_outputs=source.num_outputs, batch=True)`` calls for each batch.

    Parameters
    ----------
    uri : str, Path or lance.LanceDataset
    columns : list of str or dict of str to str, optional
        All by default. Those without a DALI type (strings without `Text`, bfloat16, ...) are not fed;
        `DALILanceIterator` puts them into its batches all the same.
    batch_size : int
        At most the pipeline's.
    sampler : lance.sampler.Sampler, optional
    last_batch_policy : LastBatchPolicy or str
        ``"PARTIAL"``: the last batch of the epoch is short. ``"DROP"``: it is left out on every rank.
        ``"FILL"``: every short batch repeats its last row, with ``valid=False``.
    prefetch_queue_depth : int
        The pipeline's. With ``no_copy=True`` that many batches stay alive here, for DALI does not keep them.
    **options
        Keywords of `LanceDataset`: transforms (`Text` only; images are the pipeline's), filter, shuffle, seed, rank,
        world_size, on_error, batch_readahead, ... `on_error` covers nulls, empty values, files that are no images DALI
        knows, larger than `max_pixels` or without an end; ``"mask"`` feeds a small black image instead, and
        ``"replace"`` where no row of the batch is good.

    An epoch ends with StopIteration, and the next call begins the next one, unless `set_epoch` was called. DALI runs
    ahead of its consumer, so call `set_epoch` before the pipeline's or iterator's `reset`.

    Raises
    ------
    ConfigError, StateError, RowError
    """

    def __init__(
        self,
        uri: Any,
        columns: Sequence[str] | dict[str, str] | None = None,
        batch_size: int = 128,
        sampler: Any = None,
        *,
        transforms: Mapping[str, Text] | None = None,
        last_batch_policy: Any = LastBatchPolicy.PARTIAL,
        prefetch_queue_depth: int = 2,
        **options: Any,
    ) -> None:
        refused = [name for name in _OURS if name in options]
        if refused:
            raise ConfigError(f"Expected {refused[0]} left to DALI, got {refused[0]}={options[refused[0]]!r}.")
        dataset = Undecoded(
            uri, batch_size, FORMATS, columns=columns, sampler=sampler, transforms=transforms, **options
        )
        known = {name: form for name, form in dataset.forms().items() if form[0] in _TYPES}
        self._outputs = {name: (_TYPES[dtype], ndim) for name, (dtype, ndim) in known.items()}
        super().__init__(dataset, list(self._outputs), prefetch_queue_depth)
        self.last_batch_policy = last_batch_policy

    @property
    def dtype(self) -> list[Any]:
        """DALI's type of each output."""
        return [dtype for dtype, _ in self._outputs.values()]

    @property
    def ndim(self) -> list[int]:
        """Dimensions of a sample of each output."""
        return [ndim for _, ndim in self._outputs.values()]

    @property
    def last_batch_policy(self) -> Any:
        return self._policy

    @last_batch_policy.setter
    def last_batch_policy(self, policy: Any) -> None:
        if self._running is not None:
            raise ConfigError(f"Expected last_batch_policy before the epoch, got {policy} within it.")
        self._policy, self._fill = _policy(policy), _policy(policy) is LastBatchPolicy.FILL
        self._dataset.keep_last(self._policy is not LastBatchPolicy.DROP)

    def __repr__(self) -> str:
        return f"LanceSource({self._dataset!r}, outputs={self.outputs}, last_batch_policy={self._policy.name})"


_SOURCES: WeakKeyDictionary[Any, LanceSource] = WeakKeyDictionary()  # pipeline → what lance_reader made for it


@do_not_convert  # type: ignore[untyped-decorator]
def lance_reader(
    uri: Any,
    columns: Sequence[str] | dict[str, str] | None = None,
    batch_size: int | None = None,
    sampler: Any = None,
    **options: Any,
) -> Any:
    """Inside ``@pipeline_def``: a `LanceSource` as DataNodes, one for each output, as ``fn.readers`` gives them.

    `uri` may be a `LanceSource`; otherwise one is made with these arguments. `batch_size` is the pipeline's by
    default. One output comes alone, several as a tuple; all are on the CPU and alias the memory that Lance read.
    """
    pipeline = Pipeline.current()
    if pipeline is None:
        raise ConfigError("Expected lance_reader inside a function under @pipeline_def, got no current pipeline.")
    source: Any = uri
    if not isinstance(uri, LanceSource):
        size = pipeline.max_batch_size if batch_size is None else batch_size
        source = LanceSource(uri, columns, size, sampler, prefetch_queue_depth=_depth(pipeline), **options)
    if source.batch_size > pipeline.max_batch_size:
        raise ConfigError(
            f"Expected batch_size of at most the pipeline's {pipeline.max_batch_size}, got {source.batch_size}."
        )
    nodes = fn.external_source(
        source=source, num_outputs=source.num_outputs, batch=True, dtype=source.dtype, ndim=source.ndim, no_copy=True
    )
    _SOURCES[pipeline] = source
    return nodes[0] if len(nodes) == 1 else tuple(nodes)


class DALILanceIterator:
    """The outputs of a pipeline as `Batch` objects, with `rows`, `valid`, `epoch`, `step` and what DALI cannot carry.

    Parameters
    ----------
    pipeline : nvidia.dali.Pipeline
        With `lance_reader` or `LanceSource` in it.
    output_map : list of str, optional
        Names of the pipeline's outputs; by default those of the source, if there are as many.
    source : LanceSource, optional
        Only where the pipeline was made without `lance_reader`.
    last_batch_policy : LastBatchPolicy or str, optional
        Instead of the source's.

    Each ``for`` over it is an epoch, from its start or from a loaded place. A batch is a tensor per output, a list of
    tensors where shapes differ. Errors of a row come at the place of its batch; one inside DALI names the row that the
    CPU decoder refuses, or the one whose image DALI refuses alone, and the pipeline must then be built anew.
    """

    def __init__(
        self,
        pipeline: Any,
        output_map: Sequence[str] | None = None,
        *,
        source: LanceSource | None = None,
        last_batch_policy: Any = None,
    ) -> None:
        found = source or _SOURCES.get(pipeline)
        if found is None:
            raise ConfigError("Expected a pipeline with lance_reader, or source=LanceSource(...), got neither.")
        pipeline.build()
        count = len(pipeline.output_dtype())
        names = list(found.outputs if output_map is None else output_map)
        if len(names) != count or len(set(names)) < count:
            raise ConfigError(f"Expected output_map with {count} different names, got {names}.")
        self._pipeline, self._source, self._names = pipeline, found, names
        found.serve(_depth(pipeline))
        if last_batch_policy is not None:
            found.last_batch_policy = last_batch_policy
        self._started = self._consumed = False
        self._last: Batch | None = None  # its memory may still be read by the GPU's copies
        self._broken: Exception | None = None
        self._lent: deque[tuple[Any, torch.Tensor]] = deque()  # DALI's memory, and the event after its last reader

    def __iter__(self) -> DALILanceIterator:
        if self._consumed:
            self.reset()
        return self

    def __next__(self) -> Batch:
        if self._broken is not None:
            raise self._broken
        while self._lent and self._lent[0][0].query():
            self._lent.popleft()
        if not self._started:
            self._pipeline.schedule_run()
        self._started = self._consumed = True
        try:
            outputs = self._pipeline.share_outputs()
        except StopIteration:
            if self._source.error is not None:
                raise self._source.error from None
            raise
        except RuntimeError as error:
            self._source.close()
            batch = self._source.take()
            self._broken = self._source.broken(batch, _HINT) or (about_images(error) and self._refused(batch)) or error
            raise self._broken from error
        held = self._source.take()
        theirs = addresses(held, self._source.outputs)
        columns = {name: self._tensor(out, theirs) for name, out in zip(self._names, outputs, strict=True)}
        del outputs
        self._pipeline.release_outputs()
        self._last = held
        self._pipeline.schedule_run()
        beside = {name: value for name, value in held.items() if name not in self._source.outputs}
        return Batch(
            {**columns, **beside}, held.rows, held.valid, held.epoch, held.step, held.nulls, source=held.source
        )

    def __len__(self) -> int:
        """Batches of this rank's epoch."""
        return len(self._source)

    @property
    def lent(self) -> list[torch.Tensor]:
        """DALI's memory that the GPU may still read: copies of it are on their way."""
        return [tensor for _, tensor in self._lent]

    @property
    def source(self) -> LanceSource:
        return self._source

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next ``for`` yields."""
        self._source.set_epoch(epoch)

    def reset(self) -> None:
        """Begin the next epoch at the end of one, the same again within it. What the pipeline holds is thrown away."""
        if self._started:
            self._source.rewind()
            self._source.stop()
            self._pipeline.schedule_run()
            while not self._pipeline.empty():
                self._pipeline.share_outputs()
                self._pipeline.release_outputs()
                self._last = self._source.take()
            self._pipeline.reset()
        self._source.reset()
        self._started = self._consumed = False

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch that the loop took. DALI's own random numbers are not in it."""
        return self._source.state_dict(self._source.pending)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue after the saved batch, with the next ``for``."""
        self.reset()
        self._source.load_state_dict(saved)

    def close(self) -> None:
        """End the threads of the source, once the GPU has read what DALI lent."""
        while self._lent:
            self._lent.popleft()[0].synchronize()
        if self._broken is None:
            self.reset()
        self._source.close()

    def __enter__(self) -> DALILanceIterator:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _refused(self, batch: Batch) -> DecodeError | None:
        """The first image of `batch` that DALI alone refuses, as the error that names it."""
        alone = _Alone(self._pipeline.device_id)
        for i, name, view in self._source.images(batch):
            reason = alone.refuses(view)
            if reason is not None:
                kind = sniff(view.tobytes()[:16]) or "image"
                cause = (
                    f"Expected an image that DALI decodes, got a {kind} file that others read and it refuses: {reason}"
                )
                return DecodeError(cause, int(batch.rows[i]), name, _HINT)
        return None

    def _tensor(self, out: Any, theirs: set[int]) -> Any:
        """One output as a tensor, or a list of them where shapes differ."""
        if out.is_dense_tensor():
            return self._owned(out.as_tensor(), theirs)
        return [self._owned(out[i], theirs) for i in range(len(out))]

    def _owned(self, tensor: Any, theirs: set[int]) -> torch.Tensor:
        """On the CPU without a copy where the executor lets go of its buffers and the memory is not the source's."""
        if not self._pipeline.exec_dynamic:
            on_gpu = hasattr(tensor, "__cuda_array_interface__")
            device = torch.device("cuda", self._pipeline.device_id) if on_gpu else torch.device("cpu")
            copy = torch.empty(tensor.shape(), dtype=to_torch_type[tensor.dtype], device=device)
            copied: torch.Tensor = feed_ndarray(
                tensor, copy, cuda_stream=torch.cuda.current_stream(device) if on_gpu else None
            )
            return copied
        found: torch.Tensor = from_dlpack(tensor)
        if found.device.type == "cpu":
            return found.clone() if found.data_ptr() in theirs else found
        # DALI takes memory back with its last tensor and does not ask torch's streams: the loop gets torch's own
        ours = found.clone()
        self._lent.append((torch.cuda.current_stream(found.device).record_event(event(found.device)), found))
        return ours


class _Alone:
    """A pipeline that decodes one image at a time, built anew after each that it refused."""

    def __init__(self, device_id: int | None) -> None:
        self._device_id, self._made = device_id, None

    def refuses(self, view: Any) -> str | None:
        """Why DALI does not decode the image, None where it does."""
        try:
            made = self._made = self._made or self._build()
            made.feed_input("encoded", [view])
            made.run()
        except RuntimeError as error:
            self._made = None
            told = str(error).partition("encountered:")[2].split("\n")  # after the place in the pipeline's definition
            return next((line.strip(" :") for line in told if line.strip()), str(error))
        return None

    def _build(self) -> Any:
        pipeline = Pipeline(batch_size=1, num_threads=1, device_id=self._device_id, prefetch_queue_depth=1)
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, batch=True)
            cpu = self._device_id is None
            pipeline.set_outputs(fn.decoders.image(encoded, device="cpu" if cpu else "mixed", output_type=types.RGB))
        pipeline.build()
        return pipeline


def _policy(word: Any) -> Any:
    names = [policy.name for policy in LastBatchPolicy]
    name = getattr(word, "name", word)
    if name not in names:
        raise ConfigError(f"Expected last_batch_policy as one of {names}, got {word!r}.")
    return LastBatchPolicy[name]


def _depth(pipeline: Any) -> int:
    """Batches that the pipeline may hold."""
    depth = pipeline.prefetch_queue_depth
    return sum(depth.values()) if isinstance(depth, dict) else int(depth)
