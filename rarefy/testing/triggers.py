"""The contract of a Trigger: its state is plain and the whole of it; observing is pure; a stopped run resumes alike."""

from __future__ import annotations

import copy
from typing import Any

from rarefy.core.records import Event
from rarefy.core.roles import Trigger
from rarefy.testing import figures
from rarefy.testing.contract import contract, through_a_file


def _events(part: Trigger) -> list[Event]:
    """A figure that falls, rests and rises, under the kind and the name that the part listens to, with other events between."""
    kind, figure = getattr(part, "kind", "epoch"), getattr(part, "figure", "loss")
    values = [3.0, 2.0, 1.5, 1.5, 1.6, 1.4, 1.4, 1.4, 1.4, 1.5, *(2.0 + figures.weight(12).abs()).tolist()]
    events = [Event(kind, step, {figure: value}) for step, value in enumerate(values)]
    return [event for pair in zip(events, [Event("other", e.step, {"note": 1}) for e in events], strict=True) for event in pair]


@contract(Trigger)
def observing_is_pure(part: Trigger) -> None:
    state: dict[str, Any] = part.state()
    for event in _events(part):
        before, data = copy.deepcopy(state), copy.deepcopy(event.data)
        first, again = part.observe(state, None, event), part.observe(state, None, event)
        assert state == before, f"{part!r} changes the state that it is given instead of returning a new one"
        assert event.data == data, f"{part!r} changes the event that it sees"
        assert first == again, f"{part!r}: one state and one event give {first} and then {again}"
        state = first[0]


@contract(Trigger)
def a_stopped_trigger_goes_on_alike(part: Trigger) -> None:
    whole: dict[str, Any] = part.state()
    resumed: dict[str, Any] = part.state()
    for event in _events(part):
        whole, done = part.observe(whole, None, event)
        fresh = copy.deepcopy(part)
        resumed, again = fresh.observe(through_a_file(part, resumed), None, event)
        assert done == again, f"{part!r}: stopped and resumed before {event}, it says {again} instead of {done}"
