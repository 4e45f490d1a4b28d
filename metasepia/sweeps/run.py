"""The loop of one pack: go on from what is stored, train to the next stop, keep state and figures there."""

import importlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from metasepia.errors import InvalidSettings
from metasepia.sweeps.plan import PackWork
from metasepia.sweeps.store import SweepStore

WorkFactory = Callable[[Sequence[Mapping[str, Any]], str], PackWork]
"""(trials, device) -> the work; a class that is a PackWork is one."""

TICK_S = 2.0
"""Between stops, `on_step` is called about this often."""


def find_work(name: str) -> WorkFactory:
    """The factory named "module:Class". Raises InvalidSettings where there is none."""
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise InvalidSettings("work", name, 'spelled "module:Class"')
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InvalidSettings("work", name, f'"module:Class" of what can be imported ({error})') from error


def run_pack(
    work_factory: WorkFactory,
    store: SweepStore,
    pack_index: int,
    on_stop: Callable[[int, pa.Table | None], None] | None = None,
    *,
    device: str = "cpu",
    on_step: Callable[[int, int], None] | None = None,
) -> int:
    """Runs one pack to its end and returns the step that it began from, 0 where nothing was stored.

    It may be killed anywhere and run again, here or elsewhere: the stored bytes are the same. `on_stop(step, rows)` is
    called when a stop's rows and state are kept, rows being what `measure` gave, None where they were kept before;
    `on_step(step, last)` at the start and about every TICK_S seconds. What the work raises comes out; InvalidSettings
    for stops that do not ascend from 0 or above.
    """
    work = work_factory(store.plan.trials_of(pack_index), device)
    stops = tuple(int(stop) for stop in work.stops)
    if not stops or stops[0] < 0 or any(a >= b for a, b in itertools.pairwise(stops)):
        raise InvalidSettings("stops", stops, "steps from 0 on, ascending")
    found = store.latest(pack_index, stops)
    began = 0
    if found is not None:
        began, state = found
        work.restore(state)
        if work.step != began:
            raise InvalidSettings("restore()", work.step, f"at step {began} of the state that it was given")
    if on_step is not None:
        on_step(began, stops[-1])
    for stop in stops:
        if stop < began:
            continue
        _advance(work, stop, stops[-1], on_step)
        again = found is not None and stop == began
        if not again:
            store.put_state(pack_index, stop, work.state())  # first: rows without a state would be measured twice
        rows = None if again and store.has_rows(pack_index, stop) else work.measure()
        if rows is not None:
            store.put_rows(pack_index, stop, rows)
        if on_stop is not None:
            on_stop(stop, rows)
    store.finish(pack_index, stops)
    return began


def _advance(work: PackWork, stop: int, last: int, on_step: Callable[[int, int], None] | None) -> None:
    """To `stop`, in pieces of about TICK_S seconds where someone listens."""
    num_steps = 1 if on_step is not None else stop
    while work.step < stop:
        before, began = work.step, time.monotonic()
        work.advance(min(stop, before + max(1, num_steps)))
        if work.step <= before:
            raise InvalidSettings("advance()", work.step, f"beyond step {before} after it was called")
        if on_step is not None:
            took_s = time.monotonic() - began
            num_steps = min(4 * num_steps, int(num_steps * TICK_S / max(took_s, 1e-9)) or 1)
            if took_s > TICK_S / 4:
                on_step(work.step, last)
