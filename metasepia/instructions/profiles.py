"""Instruction sweeps that have a name, and how axes become trials and packs.

A profile has a base, crossed in full, and axes that are varied one at a time around it. Axes that the caller gives are
crossed in full instead: then they and the rest of the base are the whole sweep.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from metasepia.digests import canonical_json
from metasepia.errors import InvalidSettings
from metasepia.instructions.model import MASKS
from metasepia.instructions.trial import SHARED_IN_PACK, InstructionTrial
from metasepia.sweeps.plan import SweepPlan, grid, pack

KIND = "instructions"
AXES: Mapping[str, str] = {
    "mask": "causal, bottleneck or reread",
    "layers": "blocks",
    "width": "of the residual stream, a multiple of heads",
    "num_keywords": "shared by all tasks; with fewer it is their order that tells tasks apart",
    "num_tasks": "tasks to tell apart",
    "seed": "of functions, families, batches and weights",
}
"""In the order of the grid: the last turns fastest."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A named sweep."""

    about: str
    base: Mapping[str, Sequence[Any]]
    """Values of every axis, crossed in full."""
    varied: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Other values of an axis, each beside the first value of the others and all seeds."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of InstructionTrial that are no axes."""
    pack: int
    """Models trained as one, at most."""
    workers: int = 2


PROFILES: Mapping[str, Profile] = {
    "laptop": Profile(
        about="five blocks of width 64, 8 tasks, three seeds, with and without the bottleneck; around it 4 and 16 "
        "tasks, 12 keywords, 2 blocks, width 32, the mask reread: minutes on two cores",
        base={
            "mask": ("causal", "bottleneck"),
            "layers": (5,),
            "width": (64,),
            "num_keywords": (40,),
            "num_tasks": (8,),
            "seed": (0, 1, 2),
        },
        varied={"mask": ("reread",), "num_tasks": (4, 16), "num_keywords": (12,), "layers": (2,), "width": (32,)},
        pack=3,
    ),
    "full": Profile(
        about="all combinations of depth, width and 2 to 64 tasks, five seeds, with and without the bottleneck; 12 "
        "keywords; 550 models of 3000 steps, for GPUs or a cluster",
        base={
            "mask": ("causal", "bottleneck"),
            "layers": (5, 2, 8),
            "width": (64, 32, 128),
            "num_keywords": (40,),
            "num_tasks": (8, 2, 4, 16, 32, 64),
            "seed": (0, 1, 2, 3, 4),
        },
        varied={"mask": ("reread",), "num_keywords": (12,)},
        fixed={"num_steps": 3000, "num_measures": 20, "measured_sequences": 1000},
        pack=15,
    ),
    "tiny": Profile(
        about="seconds; for tests, and to see that a machine can run a sweep",
        base={
            "mask": ("causal", "bottleneck"),
            "layers": (2,),
            "width": (16,),
            "num_keywords": (4,),
            "num_tasks": (3,),
            "seed": (0, 1),
        },
        fixed={
            "heads": 2,
            "num_inputs": 2,
            "num_outputs": 3,
            "num_fillers": 2,
            "families_per_task": 1,
            "num_steps": 40,
            "batch_size": 16,
            "learning_rate": 3e-3,
            "measured_sequences": 48,
            "num_measures": 3,
        },
        pack=2,
    ),
}


def plan_of(
    profile: str,
    axes: Mapping[str, Sequence[Any]] | None = None,
    *,
    fixed: Mapping[str, Any] | None = None,
    pack_size: int | None = None,
) -> SweepPlan:
    """The sweep of a profile, or of its base with some axes replaced and crossed in full.

    Raises InvalidSettings for a profile, axis or value that does not exist, and for settings that contradict each
    other.
    """
    if profile not in PROFILES:
        raise InvalidSettings("profile", profile, f"one of {', '.join(PROFILES)}")
    chosen, axes = PROFILES[profile], dict(axes or {})
    for name in axes:
        if name not in AXES:
            raise InvalidSettings("axis", name, f"one of {', '.join(AXES)}")
    size = chosen.pack if pack_size is None else pack_size
    if isinstance(size, bool) or not size >= 1:
        raise InvalidSettings("pack", size, "1 or more models")
    base = {name: axes.get(name, chosen.base[name]) for name in AXES}
    points = grid(base)
    if not axes:
        for name, values in chosen.varied.items():
            around = {other: values if other == "seed" else values[:1] for other, values in base.items()}
            points += grid({**around, name: values})
    trials = [InstructionTrial.from_json({**chosen.fixed, **(fixed or {}), **point}).to_json() for point in points]
    distinct = list({canonical_json(trial): trial for trial in trials}.values())
    settings = {
        "profile": profile,
        "axes": {name: list(values) for name, values in axes.items()},
        "fixed": dict(fixed or {}),
        "pack": size,
    }
    return SweepPlan(
        kind=KIND,
        settings=settings,
        trials=tuple(distinct),
        packs=pack(distinct, same=SHARED_IN_PACK, size=size),
    )


def values_of(axis: str, text: str) -> tuple[Any, ...]:
    """An axis's values from their spelling, as "4,8,16". Raises InvalidSettings for an unknown or empty axis."""
    if axis not in AXES:
        raise InvalidSettings("axis", axis, f"one of {', '.join(AXES)}")
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise InvalidSettings(f"axis {axis}", text, f"one or more values with commas between ({AXES[axis]})")
    if axis == "mask":
        if other := [part for part in parts if part not in MASKS]:
            raise InvalidSettings("mask", other[0], AXES["mask"])
        return tuple(parts)
    try:
        return tuple(int(part) for part in parts)
    except ValueError:
        raise InvalidSettings(f"axis {axis}", text, f"whole numbers with commas between ({AXES[axis]})") from None


def trials_of(plan: SweepPlan) -> tuple[InstructionTrial, ...]:
    """The plan's trials. Raises InvalidSettings for a plan of another kind of sweep."""
    if plan.kind != KIND:
        raise InvalidSettings("sweep", plan.kind, f"a sweep of the kind {KIND}")
    return tuple(InstructionTrial.from_json(trial) for trial in plan.trials)
