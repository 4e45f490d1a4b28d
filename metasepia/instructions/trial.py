"""One model of an instruction sweep: all that its weights and its rows of the table are a function of."""

import dataclasses
import math
from dataclasses import dataclass

from metasepia.errors import InvalidSettings
from metasepia.instructions.model import MASKS, MaskKind
from metasepia.instructions.tasks import MAX_SEQUENCES, NUM_POSITIONS, InstructionTasks
from metasepia.stacked.decoder import DecoderShape
from metasepia.sweeps.trial import TrialSettings

OWN = ("seed", "num_tasks", "learning_rate", "weight_decay")
"""What models of one pack may differ in."""


@dataclass(frozen=True, kw_only=True)
class InstructionTrial(TrialSettings):
    """A model trained from scratch on instruction tasks; the loss is on the answer alone."""

    num_tasks: int = 8
    """2 or more, as many as the keywords give families for and the inputs and outputs give functions for."""
    seed: int = 0
    """Of functions, families, batches and initial weights."""
    mask: MaskKind = "causal"
    """`bottleneck`: an answer can know the instruction by one state alone, `reread`: by one token (`model`)."""
    layers: int = 5
    width: int = 64
    heads: int = 4
    num_inputs: int = 5
    num_outputs: int = 10
    families_per_task: int = 3
    num_keywords: int = 40
    num_fillers: int = 16
    num_steps: int = 600
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    """Linear from zero; then the rate is constant."""
    weight_decay: float = 0.01
    """Of the kernels inside the blocks (AdamW)."""
    clip_norm: float = 1.0
    """0 does not clip."""
    measured_sequences: int = 400
    """Of unseen strings, and as many of seen ones."""
    num_measures: int = 12
    """About so many after step 0, half of them in the first quarter of the steps."""

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "num_steps", "batch_size", "measured_sequences", "num_measures"):
            self._whole(name, least=1)
        for name in ("batch_size", "measured_sequences"):
            if getattr(self, name) > MAX_SEQUENCES:
                raise InvalidSettings(name, getattr(self, name), f"at most {MAX_SEQUENCES}")
        for name in ("seed", "warmup_steps"):
            self._whole(name, least=0)
        if self.mask not in MASKS:
            raise InvalidSettings("mask", self.mask, " or ".join(MASKS))
        if self.width % self.heads:
            raise InvalidSettings("width", self.width, f"a multiple of the {self.heads} heads")
        if not 0 < self.learning_rate < math.inf:
            raise InvalidSettings("learning_rate", self.learning_rate, "above 0 and finite")
        for name in ("weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidSettings(name, getattr(self, name), "0 or more, and finite")
        _ = self.tasks  # refuses what no set of tasks can be
        if self.measured_sequences < 2 * self.num_tasks:
            raise InvalidSettings("measured_sequences", self.measured_sequences, "two a task, or more")

    @property
    def tasks(self) -> InstructionTasks:
        return InstructionTasks(
            num_tasks=self.num_tasks,
            seed=self.seed,
            num_inputs=self.num_inputs,
            num_outputs=self.num_outputs,
            families_per_task=self.families_per_task,
            num_keywords=self.num_keywords,
            num_fillers=self.num_fillers,
        )

    @property
    def shape(self) -> DecoderShape:
        return DecoderShape(layers=self.layers, width=self.width, heads=self.heads, tokens=NUM_POSITIONS)

    @property
    def stops(self) -> tuple[int, ...]:
        """Steps at which it is measured and kept: 0, half of them in the first quarter of the steps, the end."""
        late = (self.num_measures + 1) // 2
        early = max(1, self.num_measures - late)
        quarter = self.num_steps / 4
        first = {round(quarter * i / early) for i in range(early + 1)}
        return tuple(sorted(first | {round(quarter + 3 * quarter * i / late) for i in range(late + 1)}))

    @property
    def kept_stops(self) -> tuple[int, ...]:
        """Steps whose states are kept to be drawn: the start, two on the way, the end."""
        stops = self.stops
        return tuple(sorted({stops[0], stops[len(stops) // 4], stops[len(stops) // 2], stops[-1]}))

    @property
    def patched_stops(self) -> tuple[int, ...]:
        """Steps at which states are patched: those of `kept_stops` at which something was learnt."""
        return self.kept_stops[1:]


SHARED_IN_PACK = tuple(field.name for field in dataclasses.fields(InstructionTrial) if field.name not in OWN)
