"""The page of an instruction sweep: what was run, what it says, and pictures, in one file that needs no network."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from metasepia.digests import short
from metasepia.instructions import figures
from metasepia.instructions.claims import CLAIMS, row_of
from metasepia.instructions.measures import Evaluation
from metasepia.instructions.profiles import AXES, trials_of
from metasepia.instructions.results import Summary, Table, kinds, medians
from metasepia.instructions.tasks import HELD_OUT, INSTRUCTION_END, LAST, draw
from metasepia.instructions.trial import InstructionTrial
from metasepia.pages import Page
from metasepia.sweeps.plan import SweepPlan

COLUMNS: Mapping[str, str] = {
    "accuracy": "accuracy",
    "ari_task": "ARI(task)",
    "ari_task_gain": "above step 0",
    "ari_task_layer0": "layer 0",
    "last_ari_output": "last token: ARI(output)",
    "last_ari_task": "ARI(task)",
    "spearman": "rank corr.",
    "flips_layer1": "flips, layer 1",
    "flips_held_layer1": "held",
    "flips_last_layer": "last layer",
    "flips_shuffled": "shuffled",
}
Picture = tuple[bytes, str, str]
"""PNG, caption, and a description for those who do not see it."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Trials that differ in their seed alone."""

    trial: InstructionTrial
    members: tuple[int, ...]
    summaries: tuple[Summary, ...]

    @property
    def medians(self) -> Mapping[str, float]:
        return medians(self.summaries)

    @property
    def whole(self) -> list[int]:
        """Members that did not diverge."""
        return [index for index, one in zip(self.members, self.summaries, strict=True) if one.diverged < 0]


def groups_of(table: Table) -> list[Group]:
    """In order of the first trial of each."""
    return [
        Group(trial, tuple(members), tuple(table.summary(one) for one in members))
        for trial, members in kinds(table).items()
    ]


def first_groups(groups: Sequence[Group]) -> dict[str, Group]:
    """By mask, the group that the claims are about: the sweep's first under that mask."""
    found: dict[str, Group] = {}
    for group in groups:
        found.setdefault(group.trial.mask, group)
    return found


def drawn_trials(table: Table, firsts: Sequence[int]) -> list[int]:
    """Trials whose states are shown: one a mask, of those in `firsts`, whose packs have kept theirs."""
    groups = first_groups([group for group in groups_of(table) if group.whole]).values()
    found = [next((index for index in group.whole if index in firsts), None) for group in groups]
    return [index for index in found if index is not None]


def name_of(trial: InstructionTrial) -> str:
    """Its axes but the seed, as people say them."""
    mask = {"causal": "no mask", "bottleneck": "bottleneck", "reread": "bottleneck, words read again"}[trial.mask]
    return (
        f"{trial.num_tasks} tasks, {trial.num_keywords} keywords, {trial.layers} blocks of width {trial.width}, {mask}"
    )


def pictures(table: Table, kept: Mapping[int, Mapping[int, Tensor]]) -> dict[str, Picture]:
    """By file name. `kept`: by trial, the states that its pack has kept."""
    groups = [group for group in groups_of(table) if group.whole]
    made: dict[str, Picture] = {}
    first = first_groups(groups)
    for mask, group in first.items():
        made[f"dynamics-{mask}.png"] = (
            figures.dynamics(table, group.whole, name_of(group.trial)),
            f"Clusters by layer and step beside accuracy ({name_of(group.trial)}; medians and ranges over "
            f"{len(group.whole)} seeds). K-means sees no labels; ARI compares its clusters with tasks or outputs.",
            "Curves over training steps: adjusted Rand index of each layer, and accuracy",
        )
    for mask, group in first.items():
        index = next((one for one in group.whole if one in kept), None)
        if index is not None:
            made[f"projections-{mask}.png"] = _projections(table, index, kept[index])
    if first:
        sides = {f"{mask}\n{name_of(group.trial)}": group.whole for mask, group in first.items()}
        made["patches.png"] = (
            figures.patches(table, sides, "The state that closes the instruction, moved to another task's centroid"),
            "Share of answers to unseen strings that become the other task's when the state after one layer is moved; "
            "only inputs for which the two tasks differ count.",
            "Share of flipped answers by patched layer, with and without the bottleneck mask",
        )
    for axis in ("num_tasks", "num_keywords", "layers", "width"):
        made |= _axis(table, groups, axis)
    return made


def _projections(table: Table, index: int, kept: Mapping[int, Tensor]) -> Picture:
    trial = table.trials[index]
    batch = Evaluation([trial], "cpu").batches["unseen"]
    layer = table.summary(index).layer
    rows = [(1, INSTRUCTION_END, "task")]
    rows += [(layer, INSTRUCTION_END, "task")] if layer != 1 else []
    rows += [(trial.layers, LAST, "task"), (trial.layers, LAST, "output")]
    return (
        figures.projections(kept, batch.task[0], batch.output[0], rows, f"{name_of(trial)}, seed {trial.seed}"),
        "Hidden states of unseen strings on their two principal components. At the instruction's end they part by "
        "task, at the last token by output, whatever the task.",
        "Scatter plots of hidden states at several training steps",
    )


def _axis(table: Table, groups: Sequence[Group], axis: str) -> dict[str, Picture]:
    """A picture an axis along which groups differ from the first one in nothing else."""
    first = groups[0].trial if groups else None
    along = {
        getattr(group.trial, axis): group.whole
        for group in groups
        if first is not None and dataclasses.replace(group.trial, **{axis: getattr(first, axis)}) == first
    }
    if len(along) < 2 or first is None:
        return {}
    along = dict(sorted(along.items()))
    others = ", ".join(f"{name} {getattr(first, name)}" for name in AXES if name not in (axis, "seed"))
    return {
        f"axis-{axis}.png": (
            figures.axis_effect(table, along, axis, f"{axis} varied ({others})"),
            f"How clusters and accuracy depend on {axis}: dots are seeds, lines medians. A seed that never reached the "
            "level has no dot on the right.",
            f"Accuracy and ARI at the end, and the steps at which they were reached, against {axis}",
        )
    }


def page_of(
    plan: SweepPlan, table: Table, drawn: Mapping[str, Picture], command: str, notes: Sequence[str] = ()
) -> Page:
    """The report; `drawn` may be empty, and `notes` says why."""
    trials = trials_of(plan)
    groups = groups_of(table)
    first = first_groups(groups)
    page = Page("How hidden states come to tell instruction tasks apart")
    page.text(
        "Causal language models are trained from scratch to follow simplified instructions: each task is a random "
        "table from shared inputs to shared outputs, asked for by instructions drawn from regular-expression families, "
        "and the loss is on the answer alone. No model is ever told a task's name. The question is Wu and Varshney's "
        "(arXiv:2402.12151): do hidden states fall into clusters by task while the model learns? Sizes, masks and "
        "patches are this project's."
    )
    page.section("What it says").items(findings(first_groups(groups)))
    rows = [
        row_of(claim, first[claim.mask].medians) for claim in CLAIMS if claim.mask in first and first[claim.mask].whole
    ]
    page.table(
        ("figure", "median over seeds", "held to", "reached"),
        rows,
        "; ".join(f"{mask}: {name_of(group.trial)}, {len(group.members)} seeds" for mask, group in first.items()),
    )
    if diverged := [f"trial {index} at step {step}" for index, step in table.diverged.items()]:
        page.text(f"Diverged, and left out of all medians: {', '.join(diverged)}.")
    page.section("Pictures")
    for png, caption, alt in drawn.values():
        page.figure(png, caption, alt)
    page.text(*notes)
    page.section("Every setting, medians over seeds")
    page.table(
        ("tasks", "keywords", "blocks", "width", "mask", "seeds", *COLUMNS.values()),
        [
            [
                *(g.trial.num_tasks, g.trial.num_keywords, g.trial.layers, g.trial.width, g.trial.mask, len(g.whole)),
                *(g.medians[name] for name in COLUMNS),
            ]
            for g in groups
        ],
        "ARI of k-means clusters at the instruction's end in the layer where it is highest, unless it says otherwise.",
    )
    page.section("How to read it")
    page.items(
        [
            "Two positions. The separator that closes the instruction comes before the input, so no answer is fixed "
            "there; at the last token states part by output, and a study that looks there alone finds no tasks.",
            f"Unseen means unseen instruction strings: one in {HELD_OUT}, chosen by a hash of the string, is kept from "
            "training. All tasks and inputs are known.",
            "Step 0 counts: words alone make random weights cluster a little, so gains are above it. At layer 0 the "
            "separator's state is a constant, which is one cluster and an ARI of 0.",
            "Patches need the bottleneck: without it later tokens read the instruction again by attention. With it the "
            "separator that closes the instruction reads the words in the first block, and nothing sees them after. "
            "Under reread it may read them in every block, and mends part of what one patched layer changed.",
            "K-means has as many clusters as there are labels; shuffled labels are scored against the same clusters.",
        ]
    )
    page.section("What was run").code(command)
    page.text(f"Sweep {short(plan.digest)}, {len(trials)} trials in {len(plan.packs)} packs. Settings of the first:")
    page.code("\n".join(f"{name} = {value}" for name, value in trials[0].to_json().items()))
    page.text("Some families of its tasks and one instruction drawn from each:")
    page.table(("task", "regular expression", "drawn"), _examples(trials[0]))
    return page


def findings(first: Mapping[str, Group]) -> list[str]:
    """What the sweep says, a sentence or two each. `first`: of `first_groups`."""
    found = []
    causal, masked, milder = first.get("causal"), first.get("bottleneck"), first.get("reread")
    if causal is not None and causal.whole:
        m = causal.medians
        found.append(
            f"Unseen instructions are answered with accuracy {m['accuracy']:.3f}. At the instruction's end k-means "
            f"finds the tasks with ARI {m['ari_task']:.2f}, {m['ari_task_gain']:.2f} above the untrained network; "
            f"layer 0 has {m['ari_task_layer0']:.2f} and shuffled labels {m['ari_shuffled']:.2f}."
        )
        found.append(
            f"At the last token the same model's states cluster by output (ARI {m['last_ari_output']:.2f}) and not by "
            f"task ({m['last_ari_task']:.2f} in the last layer)."
        )
        found.append(
            f"While accuracy rises, so does the ARI: rank correlation {m['spearman']:.2f} over the first half of the "
            "steps."
        )
    if masked is not None and masked.whole:
        m = masked.medians
        without = f" (without the mask {causal.medians['flips_layer1']:.1%})" if causal and causal.whole else ""
        found.append(
            "The cluster is the task: where after block 1 no token sees the words again, moving the separator's state "
            f"there to another task's centroid turns {m['flips_layer1']:.1%} of the answers into that task's{without}. "
            f"Centroids under shuffled labels turn {m['flips_shuffled']:.1%} at most, and the last layer, which no "
            f"later token reads, {m['flips_last_layer']:.1%}."
        )
    if milder is not None and milder.whole:
        m, each = milder.medians, [one.flips_layer1 for one in milder.summaries if one.diverged < 0]
        found.append(
            f"Where the separator sees the words in every block, the same turns {m['flips_layer1']:.1%} (seeds "
            f"{min(each):.1%} to {max(each):.1%}): it reads them again and mends itself. With centroids held in all "
            f"later layers too it is {m['flips_held_layer1']:.1%}."
        )
    return found or ["Every trial diverged; there is nothing to say."]


def _examples(trial: InstructionTrial, most: int = 6) -> list[tuple[int, str, str]]:
    tasks = trial.tasks
    batch = draw([tasks], [trial.seed], 0, num_sequences=512)
    rows = []
    for place, family in enumerate(tasks.families[:most]):
        of_family = torch.nonzero(batch.family[0] == place)
        text = tasks.words(batch.tokens[0, int(of_family[0])]) if len(of_family) else ""
        expression = family.expression
        gap = "|".join(family.fillers)
        if len(gap) > 24:
            expression = expression.replace(gap, f"{family.fillers[0]}|{family.fillers[1]}|…{len(family.fillers)}…")
        rows.append((family.task, expression, text))
    return rows
