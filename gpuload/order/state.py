"""Where we are: the place in an epoch enters, a small JSON dict leaves; and back, if it is the same dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpuload.errors import StateError

VERSION = 1


@dataclass
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
    state: Mapping[str, Any], identity: Mapping[str, Any], world_size: int, elastic: bool, worker: bool = False
) -> Position:
    """The place that `state` describes, for this dataset and this world size.

    A run that goes on from it begins there, so that its first batch is the first worker's. A DataLoader `worker` that
    gets back its own state instead keeps the beginning that its share of the steps was counted from.

    Raises
    ------
    StateError
        Naming the field and both values: another dataset, version, filter, sample, seed, sampler or batch size, or
        another world size where the order depends on it.
    """
    missing = [name for name in ("version", "epoch", "step", "start", "taken", "world_size") if name not in state]
    if missing:
        raise StateError(f"Expected a state_dict() of gpuload.LanceDataset, got one without {missing}.", missing[0])
    if state["version"] != VERSION:
        raise _differs("version", state["version"], VERSION, "It was saved by another version of gpuload.")
    for name in identity:
        if state.get(name) != identity[name] and name != "uri":
            raise _identity_error(name, state, identity)
    if state["world_size"] != world_size and (worker or not elastic):
        hint = "The fragment sampler's order depends on it; the batch and shuffle samplers resume with any."
        if elastic:
            hint = "A DataLoader worker knows its own steps alone; states of num_workers=0 resume with any."
        raise _differs("world_size", state["world_size"], world_size, hint)
    epoch, step, start, taken = (int(state[name]) for name in ("epoch", "step", "start", "taken"))
    if worker:
        return Position(epoch, start, step - taken, taken)
    places = int(state["batch_size"]) * (int(state["world_size"]) if elastic else 1)  # of a step, in the plan's order
    return Position(epoch, start + taken * places, step, 0)


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
