"""Instruction tasks: functions as random tables, asked for by instructions of regular-expression families.

A task is a function from shared inputs to shared outputs, and several families of instructions ask for it (Wu and
Varshney, arXiv:2402.12151; the sizes are ours, the paper's could not be read). A family is an ordered triple of
keywords; each stands once or twice, and up to two fillers stand in each gap:

    state(?: state)?(?: (?:about|above|...)){0,2} name(?: name)?(?: (?:about|above|...)){0,2} city(?: city)?

All tasks share the keywords: the fewer there are, the less one word tells and the more their order and company do.
Fillers are never keywords: a string belongs to one family at most. A sequence, whose answer is the task's output:

    [pad ...] instruction SEP input SEP

A hash of the string alone decides whether an instruction is held out; training never sees those. Batches are pure
functions of (tasks, data seed, stream, step), and sets of tasks are nested: the first 4 of 8 tasks are the set of 4.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from metasepia.errors import InvalidSettings
from metasepia.synthetic import sampling


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


KEYWORDS = _words(
    "state name city country sound colour count shape author river season metal animal flag food tongue mood tool "
    "weather sport verb coin planet letter breed fruit grain gem hill lake spice star stone street tale tree unit wind "
    "wood year"
)
FILLERS = _words(
    "about above again also and any as at be but by do else ever for from give how in it just kindly let me now of on "
    "or our please quite so tell that the then this to what with"
)
INPUTS = _words("amber basil cedar delta ember fjord grove heath islet jetty knoll larch maple north opal petal")
OUTPUTS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TRIPLE, GAP = 3, 2
"""Keywords of a family, and the most fillers in a gap."""
MAX_INSTRUCTION = 2 * TRIPLE + GAP * (TRIPLE - 1)
INSTRUCTION_END, INPUT, LAST = MAX_INSTRUCTION, MAX_INSTRUCTION + 1, MAX_INSTRUCTION + 2
"""Positions in every sequence: the separator closing the instruction, the input, the separator before the answer."""
NUM_POSITIONS = MAX_INSTRUCTION + 3
PAD, SEPARATOR = 0, 1
_FIRST_WORD = 2
HELD_OUT = 4
"""One string in so many is held out."""
Split = Literal["seen", "unseen"]
SPLITS: tuple[Split, ...] = ("seen", "unseen")

MAX_SEQUENCES = 1 << 20
"""Of one batch."""

_SLOTS = 16
_INVERSE = pow(sampling.GOLDEN, -1, 1 << 64)
_INVERSE -= (_INVERSE >> 63) << 64  # as int64


@dataclass(frozen=True)
class Family:
    """One distribution of instructions."""

    task: int
    keywords: tuple[str, ...]
    fillers: tuple[str, ...]

    @property
    def expression(self) -> str:
        """The regular expression whose language is this family's instructions, words apart by one space."""
        gap = f"(?: (?:{'|'.join(self.fillers)})){{0,{GAP}}}"
        return gap.join(f"{lead}{word}(?: {word})?" for lead, word in zip(("", " ", " "), self.keywords, strict=True))


@dataclass(frozen=True, kw_only=True)
class InstructionTasks:
    """A set of tasks and their families, a pure function of these fields."""

    num_tasks: int = 8
    """At least 2: with one there is nothing to tell apart."""
    seed: int = 0
    num_inputs: int = 5
    """1 to 16."""
    num_outputs: int = 10
    """2 to 20."""
    families_per_task: int = 3
    num_keywords: int = 40
    """3 to 40, shared by all tasks; n give n (n - 1) (n - 2) families. With 40 most tasks can be told by their words,
    with 12 by their order alone, for which a model takes a block more."""
    num_fillers: int = 16
    """1 to 40."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("num_inputs", 1, len(INPUTS)),
            ("num_outputs", 2, len(OUTPUTS)),
            ("num_keywords", TRIPLE, len(KEYWORDS)),
            ("num_fillers", 1, len(FILLERS)),
            ("families_per_task", 1, None),
            ("num_tasks", 2, None),
            ("seed", 0, (1 << 63) - 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low or (high and value > high):
                raise InvalidSettings(
                    name, value, f"a whole number of at least {low}" + (f", at most {high}" * (high is not None))
                )
        k = self.num_keywords
        if self.num_tasks * self.families_per_task > (given := k * (k - 1) * (k - 2)):
            raise InvalidSettings(
                "num_tasks", self.num_tasks,
                f"at most {given // self.families_per_task}: {k} keywords give {given} families, and a task takes "
                f"{self.families_per_task}",
            )  # fmt: skip
        if self.num_tasks > (given := self.num_outputs**self.num_inputs):
            raise InvalidSettings(
                "num_tasks", self.num_tasks, f"at most {given}: there are no more different functions"
            )

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Words by token id."""
        return (
            "[pad]", "[sep]", *KEYWORDS[: self.num_keywords], *FILLERS[: self.num_fillers],
            *INPUTS[: self.num_inputs], *OUTPUTS[: self.num_outputs],
        )  # fmt: skip

    @property
    def first_filler(self) -> int:
        return _FIRST_WORD + self.num_keywords

    @property
    def first_input(self) -> int:
        return self.first_filler + self.num_fillers

    @property
    def first_output(self) -> int:
        """Token id of output 0; the last tokens of the vocabulary are the outputs."""
        return self.first_input + self.num_inputs

    @property
    def families(self) -> tuple[Family, ...]:
        """In order of task."""
        fillers = FILLERS[: self.num_fillers]
        of_task = self.families_per_task
        return tuple(
            Family(i // of_task, tuple(KEYWORDS[int(k)] for k in triple), fillers)
            for i, triple in enumerate(_triples(self))
        )

    def answers(self) -> Int[Tensor, "tasks inputs"]:
        """f_task(input), from 0 to num_outputs - 1; no two tasks are the same function."""
        return _answers(self)

    def words(self, tokens: Int[Tensor, " positions"]) -> str:
        """The instruction of a sequence, as text."""
        vocabulary = self.vocabulary
        return " ".join(vocabulary[int(t)] for t in tokens[:INSTRUCTION_END] if t != PAD)


@functools.cache
def _triples(tasks: InstructionTasks) -> Int[Tensor, "families 3"]:
    """The first families in a seeded order of all ordered triples: distinct by construction, and nested."""
    k = tasks.num_keywords
    first, second, third = torch.cartesian_prod(*[torch.arange(k)] * TRIPLE).unbind(1)
    proper = (first != second) & (second != third) & (first != third)
    triples = torch.stack([first, second, third], 1)[proper]
    order = sampling.bits(sampling.key_of("instruction families", tasks.seed, 0), torch.arange(len(triples))).argsort()
    return triples[order[: tasks.num_tasks * tasks.families_per_task]]


@functools.cache
def _answers(tasks: InstructionTasks) -> Int[Tensor, "tasks inputs"]:
    """Tables drawn one after the other; one that an earlier task has is drawn again."""
    key = sampling.key_of("instruction answers", tasks.seed, 0)
    found: dict[tuple[int, ...], None] = {}
    index = 0
    while len(found) < tasks.num_tasks:
        drawn = sampling.choice(tasks.num_outputs, key, index * len(INPUTS) + torch.arange(tasks.num_inputs))
        found.setdefault(tuple(drawn.tolist()))
        index += 1
    return torch.tensor(list(found))


@dataclass(frozen=True, kw_only=True)
class InstructionBatch:
    """Sequences of several sets of tasks, and what no model is told: task, family, input, output."""

    tokens: Int[Tensor, "models batch positions"]
    task: Int[Tensor, "models batch"]
    family: Int[Tensor, "models batch"]
    """Position in `InstructionTasks.families`."""
    input: Int[Tensor, "models batch"]
    output: Int[Tensor, "models batch"]
    """0 to num_outputs - 1; its token is `first_output` higher."""

    def to(self, device: torch.device | str) -> "InstructionBatch":
        return InstructionBatch(**{name: value.to(device) for name, value in vars(self).items()})


def held_out(instructions: Int[Tensor, "*batch instruction"]) -> Bool[Tensor, "*batch"]:
    """Whether a string, as left-padded token ids, is kept from training: a function of the string alone."""
    place = sampling.bits(sampling.key_of("held-out strings", 0, 0), torch.arange(instructions.shape[-1])) | 1
    code = (instructions * place.to(instructions.device)).sum(-1)
    return _below(sampling.bits(sampling.key_of("held-out strings", 0, 1), code), HELD_OUT) == 0


def draw(
    sets: Sequence[InstructionTasks],
    data_seeds: Sequence[int],
    step: int,
    *,
    num_sequences: int,
    split: Split = "seen",
    stream: str = "training",
) -> InstructionBatch:
    """A batch for each set of tasks, on the CPU; each is what it would be alone, bit for bit.

    Sequences draw task, family and input uniformly; a string of the other split is drawn again. Streams share no
    numbers. Raises InvalidSettings for sets whose vocabularies differ, since their batches could not be stacked.
    """
    first = sets[0]
    for tasks in sets:
        if tasks.vocabulary != first.vocabulary or tasks.families_per_task != first.families_per_task:
            raise InvalidSettings("sets", tasks, f"alike in words and families a task, as the first one: {first}")
    if not 0 < num_sequences <= MAX_SEQUENCES:
        raise InvalidSettings("num_sequences", num_sequences, f"from 1 to {MAX_SEQUENCES}")
    keys = torch.tensor([sampling.key_of(f"instructions {stream}", seed, step) for seed in data_seeds])
    model = torch.arange(len(sets)).repeat_interleave(num_sequences)
    sequence = torch.arange(num_sequences).repeat(len(sets))
    tables = _Tables.of(tuple(sets))
    made = torch.empty(len(model), NUM_POSITIONS + 4, dtype=torch.int64)
    waiting, attempt = torch.arange(len(model)), 0
    while len(waiting):
        index = (attempt * MAX_SEQUENCES + sequence[waiting]) * _SLOTS
        # key + index * golden = (index + key / golden) * golden: so one call serves many keys.
        drawn = sampling.bits(0, (index + keys[model[waiting]] * _INVERSE)[:, None] + torch.arange(_SLOTS))
        rows = tables.sequences(model[waiting], drawn)
        ours = held_out(rows[:, :MAX_INSTRUCTION]) == (split == "unseen")
        made[waiting[ours]] = rows[ours]
        waiting, attempt = waiting[~ours], attempt + 1
    shaped = made.unflatten(0, (len(sets), num_sequences))
    task, family, given, output = shaped[..., NUM_POSITIONS:].unbind(-1)
    return InstructionBatch(
        tokens=shaped[..., :NUM_POSITIONS].contiguous(), task=task, family=family, input=given, output=output
    )


@dataclass(frozen=True)
class _Tables:
    """Several sets of tasks, stacked and padded to the largest."""

    num_tasks: Tensor
    triples: Tensor
    """[models, families, 3] token ids."""
    answers: Tensor
    """[models, tasks, inputs]"""
    one: InstructionTasks

    @classmethod
    @functools.lru_cache(maxsize=64)
    def of(cls, sets: tuple[InstructionTasks, ...]) -> "_Tables":
        pad = torch.nn.utils.rnn.pad_sequence
        return cls(
            torch.tensor([tasks.num_tasks for tasks in sets]),
            pad([_FIRST_WORD + _triples(tasks) for tasks in sets], batch_first=True),
            pad([_answers(tasks) for tasks in sets], batch_first=True),
            sets[0],
        )

    def sequences(self, model: Tensor, drawn: Tensor) -> Tensor:
        """[rows, positions + 4] from 16 numbers a row: tokens, then task, family, input, output."""
        one = self.one
        task = _below(drawn[:, 0], self.num_tasks[model])
        family = task * one.families_per_task + _below(drawn[:, 1], one.families_per_task)
        given = _below(drawn[:, 2], one.num_inputs)
        output = self.answers[model, task, given]
        words, fillers = self.triples[model, family], one.first_filler + _below(drawn[:, 3:7], one.num_fillers)
        twice, gaps = _below(drawn[:, 7:10], 2) == 1, _below(drawn[:, 10:12], GAP + 1)
        always = torch.ones_like(task, dtype=torch.bool)
        parts: list[Tensor] = []
        present: list[Tensor] = []
        for i in range(TRIPLE):
            parts += [words[:, i], words[:, i]]
            present += [always, twice[:, i]]
            if i < TRIPLE - 1:
                parts += [fillers[:, GAP * i + j] for j in range(GAP)]
                present += [gaps[:, i] > j for j in range(GAP)]
        there = torch.stack(present, 1)
        # Words that are there move to the right, in order; the others fall on a column that is then cut off.
        place = torch.where(there, MAX_INSTRUCTION - there.flip(1).cumsum(1).flip(1), MAX_INSTRUCTION)
        tokens = torch.full((len(task), MAX_INSTRUCTION + 1), PAD).scatter(1, place, torch.stack(parts, 1))
        separator = torch.full_like(task, SEPARATOR)
        tail = [separator, one.first_input + given, separator, task, family, given, output]
        return torch.cat([tokens[:, :MAX_INSTRUCTION], torch.stack(tail, 1)], 1)


def _below(bits: Tensor, num_choices: int | Tensor) -> Tensor:
    """Integers from 0 to num_choices - 1 out of 64 uniform bits, as `sampling.choice` has them."""
    return (((bits >> 33) & ((1 << 31) - 1)) * num_choices) >> 31


def expressions(tasks: InstructionTasks) -> list[tuple[int, str]]:
    """(task, regular expression) of every family, for reports and tests."""
    return [(family.task, family.expression) for family in tasks.families]
