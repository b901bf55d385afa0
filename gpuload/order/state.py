"""Where we are: the place in an epoch enters, a small JSON dict leaves; and back, if it is the same dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from gpuload.errors import ConfigError, StateError, is_one_of

VERSION = 1
_COUNTS = ("epoch", "step", "start", "taken", "world_size")


@dataclass(frozen=True)
class Position:
    """A place in an epoch.

    Attributes
    ----------
    epoch : int
    start : int
        Places of the epoch's order that were used up when this run of it began.
    before : int
        Steps that used them up.
    taken : int
        Steps since then, handed to the consumer.
    """

    epoch: int = 0
    start: int = 0
    before: int = 0
    taken: int = 0

    @property
    def step(self) -> int:
        """Steps of this epoch that the consumer has taken."""
        return self.before + self.taken

    def after(self, step: int) -> Position:
        """The place when `step` was handed over."""
        return replace(self, taken=step + 1 - self.before)


def save(position: Position, identity: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    """A dict of scalars, ready for JSON.

    `identity` is what must be the same when it is loaded: the dataset and everything its order depends on.
    """
    return {
        "version": VERSION,
        "epoch": position.epoch,
        "step": position.step,
        "start": position.start,
        "taken": position.taken,
        "world_size": world_size,
        **identity,
    }


def restore(
    state: object, identity: Mapping[str, Any], world_size: int, elastic: bool, worker: bool = False
) -> tuple[Position, int]:
    """The place that `state` describes as it was saved, and the world size whose steps it counts.

    A DataLoader `worker` knows its own steps alone, so its world size must be the saved one.

    Raises
    ------
    ConfigError
        No mapping.
    StateError
        No state, or one of another dataset, version, filter, sample, seed, sampler or batch size, or of another world
        size where the order depends on it: names the field and both values.
    """
    if not isinstance(state, Mapping):
        raise ConfigError(f"Expected a state_dict() of gpuload.LanceDataset, got {state!r}.")
    missing = [name for name in ("version", *_COUNTS) if name not in state]
    if missing:
        raise StateError(f"Expected a state_dict() of gpuload.LanceDataset, got one without {missing}.", missing[0])
    if not is_one_of(state["version"], [VERSION]):
        raise _differs("version", state["version"], VERSION, "It was saved by another version of gpuload.")
    for name in identity:
        if name != "uri" and not is_one_of(state.get(name), [identity[name]]):
            raise _identity_error(name, state, identity)
    for name in _COUNTS:
        if not isinstance(state[name], Integral) or (state[name] < 0 and name != "epoch"):
            raise StateError(f"Expected {name} in the saved state as a count, got {state[name]!r}.", name, state[name])
    epoch, step, start, taken, world = (int(state[name]) for name in _COUNTS)
    if taken > step:
        raise StateError(f"Expected taken of at most step={step} in the saved state, got {taken}.", "taken", taken)
    if world != world_size and (worker or not elastic):
        hint = "The fragment sampler's order depends on it; the batch and shuffle samplers resume with any."
        if elastic:
            hint = "A DataLoader worker knows its own steps alone; states of num_workers=0 resume with any."
        raise _differs("world_size", world, world_size, hint)
    return Position(epoch, start, step - taken, taken), world


def _identity_error(name: str, state: Mapping[str, Any], identity: Mapping[str, Any]) -> StateError:
    if name == "fingerprint":
        saved, here = f"{state.get('uri')} ({state.get(name)})", f"{identity['uri']} ({identity[name]})"
        return _differs("dataset", saved, here, "Open the dataset it was saved with.")
    hint = {
        "dataset_version": f"Open it with dataset_options={{'version': {state.get(name)!r}}}.",
        "batch_size": "Resume with the same batch_size; the number of ranks may change.",
    }.get(name, f"Resume with the same {name}.")
    return _differs(name, state.get(name), identity[name], hint)


def _differs(field: str, saved: object, here: object, hint: str) -> StateError:
    return StateError(
        f"Expected {field}={saved!r} as in the saved state, got {field}={here!r}. {hint}", field, saved, here
    )
