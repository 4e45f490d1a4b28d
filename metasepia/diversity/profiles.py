"""Task-diversity sweeps that have a name, their axes, and how axes become trials and packs.

An axis is a field of `DiversityTrial` with several values, or `model`, the paper's three sizes. Where `points` or
`noise_variance` are not given they follow the dimension as in the paper: K = 2 D and sigma^2 = D / 32, which keeps the
signal-to-noise ratio (D = 8: 16 and 0.25). A logistic label says less than a number: there K = 4 D, and the scale is
that of the reasoning module.
"""

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from metasepia.diversity.trial import SHARED_IN_PACK, DiversityTrial
from metasepia.errors import InvalidSettings
from metasepia.sweeps.plan import SweepPlan, grid, pack

KIND = "task-diversity"
MODELS: Mapping[str, Mapping[str, int]] = {
    "small": {"layers": 4, "width": 64, "heads": 2},
    "base": {"layers": 8, "width": 128, "heads": 2},
    "large": {"layers": 12, "width": 256, "heads": 4},
}
"""The paper's: about 0.2, 1.6 and 9.5 million parameters."""
AXES: Mapping[str, str] = {
    "problem": "linear (the paper's) or logistic (the reasoning module's own problem, layout and loss)",
    "model": "small, base or large, the paper's sizes; instead of layers, width and heads",
    "layers": "blocks",
    "width": "of the residual stream, a multiple of heads",
    "heads": "of attention",
    "dims": "D; points and noise follow it unless given",
    "points": "K, pairs in a sequence",
    "context": "pairs that the model has positions for (as many as points)",
    "noise_variance": "sigma squared, above 0",
    "scale": "standard deviation of a task's coordinates; how sharp logistic labels are",
    "num_steps": "optimisation steps",
    "batch_size": "sequences a step",
    "learning_rate": "peak of the triangle",
    "warmup_share": "of the steps, until the peak",
    "weight_decay": "of the blocks' kernels",
    "seed": "numbers the seeds of weights, data, tasks and noise",
    "num_tasks": "M, from 1 to 1048576; inf for a fresh task in every sequence",
}
"""In the order of the grid: the last turns fastest."""
LOGISTIC_SCALE = 10.0
"""What the reasoning module is trained with (TART, arXiv:2306.07536): nearly separable classes."""
_TEXTS, _DECIMALS = ("problem", "model"), ("noise_variance", "scale", "learning_rate", "warmup_share", "weight_decay")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A named sweep."""

    about: str
    axes: Mapping[str, Sequence[Any]]
    """Values of each axis; one value fixes a setting."""
    fixed: Mapping[str, int] = field(default_factory=dict)
    """How much is measured: fields of DiversityTrial that are no axes."""
    pack: int
    """Models trained as one, at most."""
    workers: int = 2
    gpus_per_trial: float = 0.0
    excess: float
    """Bound on the error of the infinite pool on new tasks over ridge's (`claims`)."""


_LAPTOP_MODEL = {"layers": (3,), "width": (64,), "heads": (2,), "learning_rate": (2e-3,), "batch_size": (64,)}
PROFILES: Mapping[str, Profile] = {
    "laptop": Profile(
        about="one dimension, eight M, three seeds: 25 minutes on two cores; both regimes and the crossing",
        axes={
            **_LAPTOP_MODEL,
            "dims": (4,),
            "num_steps": (6000,),
            "seed": (0, 1, 2),
            "num_tasks": (4, 16, 32, 64, 128, 256, 1024, None),
        },
        fixed={"measured_sequences": 1024, "num_measures": 8},
        pack=12,
        excess=1.35,
    ),
    "evening": Profile(
        about="the laptop's models trained longer, and the axes dimension and weight decay: hours on two cores",
        axes={
            **_LAPTOP_MODEL,
            "dims": (4, 2, 6),  # the first is what bounds are on
            "num_steps": (20_000,),
            "weight_decay": (0.0, 0.1),
            "seed": (0, 1),
            "num_tasks": (4, 16, 32, 64, 128, 256, 512, 1024, 4096, None),
        },
        fixed={"measured_sequences": 1024, "num_measures": 10},
        pack=10,
        excess=1.15,
    ),
    "paper": Profile(
        about="the paper's setting: D 8, K 16, 500 000 steps of 256 sequences, M from 2 to 2**20 and infinite; on GPUs",
        axes={"model": ("base",), "dims": (8,), "num_tasks": (*(1 << i for i in range(1, 21)), None)},
        pack=11,
        gpus_per_trial=0.5,
        excess=1.05,
    ),
    "tiny": Profile(
        about="seconds; for tests, and to see that a machine can run a sweep",
        axes={
            "layers": (1,),
            "width": (16,),
            "heads": (2,),
            "dims": (2,),
            "num_steps": (60,),
            "batch_size": (16,),
            "learning_rate": (3e-3,),
            "seed": (0, 1),
            "num_tasks": (1, 4, 16, None),
        },
        fixed={"measured_sequences": 64, "num_measures": 2, "measured_blocks": 4},
        pack=4,
        excess=1.35,
    ),
}


def values_of(axis: str, text: str) -> tuple[Any, ...]:
    """An axis's values from their spelling, as "4,64,inf". Raises InvalidSettings for an unknown or empty axis."""
    if axis not in AXES:
        raise InvalidSettings("axis", axis, f"one of {', '.join(AXES)}")
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise InvalidSettings(f"axis {axis}", text, f"one or more values with commas between ({AXES[axis]})")
    return tuple(_value(axis, part) for part in parts)


def _value(axis: str, text: str) -> Any:
    if axis == "num_tasks" and text.lower() in ("inf", "infinite", "none"):
        return None
    if axis == "model" and text not in MODELS:
        raise InvalidSettings(axis, text, f"one of {', '.join(MODELS)}")
    if axis in _TEXTS:
        return text
    try:
        if axis in _DECIMALS:
            value = float(text)
            if not math.isfinite(value):
                raise ValueError
            return value
        # 2**14 and 2^14 are how people write numbers of tasks.
        base, power, exponent = text.replace("^", "**").partition("**")
        return int(base) ** int(exponent) if power and 0 <= int(exponent) <= 32 else int(text)
    except ValueError:
        kind = "a finite number" if axis in _DECIMALS else "a whole number"
        raise InvalidSettings(f"axis {axis}", text, f"{kind} ({AXES[axis]})") from None


def trial_of(point: Mapping[str, Any], fixed: Mapping[str, Any]) -> DiversityTrial:
    """One point of the grid as a trial, with what follows from it. Raises InvalidSettings for one out of range."""
    values = {**fixed, **point}
    model = values.pop("model", None)
    if model is not None:
        values |= MODELS[model]
    dims = values.get("dims", 8)
    if values.get("problem") == "logistic":
        follows = {"points": 4 * dims, "noise_variance": 0.0, "scale": LOGISTIC_SCALE}
    else:
        follows = {"points": 2 * dims, "noise_variance": dims / 32}
    values = {**follows, **values}
    return DiversityTrial.from_json(values)


def plan_of(
    profile: str,
    axes: Mapping[str, Sequence[Any]],
    *,
    fixed: Mapping[str, int] | None = None,
    pack_size: int | None = None,
    sample: int | None = None,
    sample_seed: int = 0,
) -> SweepPlan:
    """The sweep of a profile with some axes replaced or added.

    `sample` takes so many points of the grid at random, in an order fixed by `sample_seed`; None takes all in order.
    Raises InvalidSettings for an axis or value that does not exist, and for settings that contradict each other.
    """
    if profile not in PROFILES:
        raise InvalidSettings("profile", profile, f"one of {', '.join(PROFILES)}")
    chosen = PROFILES[profile]
    sizes = {"layers", "width", "heads"}
    if "model" in axes and sizes & axes.keys():
        raise InvalidSettings("model", list(axes["model"]), "given without layers, width and heads: it sets the three")
    kept = {name: values for name, values in chosen.axes.items() if not ("model" in axes and name in sizes)}
    if sizes & axes.keys() and "model" in kept:
        (model,) = kept.pop("model")
        kept |= {name: (value,) for name, value in MODELS[model].items()}
    merged = {**kept, **axes}
    unknown = merged.keys() - AXES.keys()
    if unknown:
        raise InvalidSettings("axis", min(unknown), f"one of {', '.join(AXES)}")
    points = grid({name: merged[name] for name in AXES if name in merged})
    if sample is not None:
        if not 1 <= sample <= len(points):
            raise InvalidSettings("sample", sample, f"from 1 to the {len(points)} points of the grid")
        points = random.Random(sample_seed).sample(points, sample)
    trials = [trial_of(point, {**chosen.fixed, **(fixed or {})}).to_json() for point in points]
    size = chosen.pack if pack_size is None else pack_size
    if size < 1:
        raise InvalidSettings("pack", size, "1 or more models")
    settings = {
        "profile": profile,
        "axes": {name: list(merged[name]) for name in AXES if name in merged},
        "pack": size,
        "sample": None if sample is None else {"points": sample, "seed": sample_seed},
    }
    return SweepPlan(
        kind=KIND, settings=settings, trials=tuple(trials), packs=pack(trials, same=SHARED_IN_PACK, size=size)
    )


def trials_of(plan: SweepPlan) -> tuple[DiversityTrial, ...]:
    """The plan's trials. Raises InvalidSettings for a plan of another kind of sweep."""
    if plan.kind != KIND:
        raise InvalidSettings("sweep", plan.kind, f"a {KIND} sweep")
    return tuple(DiversityTrial.from_json(trial) for trial in plan.trials)


def axes_of(trials: Sequence[DiversityTrial]) -> dict[str, list[Any]]:
    """Fields in which trials differ, with their values in order of appearance; `num_tasks` and `seed` too."""
    found: dict[str, list[Any]] = {}
    for one in dataclasses.fields(DiversityTrial):
        values = list(dict.fromkeys(getattr(trial, one.name) for trial in trials))
        if len(values) > 1:
            found[one.name] = values
    return found
