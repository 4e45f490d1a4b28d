"""A sweep's report: what was run and what it says, in words computed from its table, with the figures."""

import math
from collections.abc import Sequence

from metasepia.diversity.figures import NAMES, Picture, error_words
from metasepia.diversity.findings import (
    MEMORISED,
    SPLIT_WORDS,
    Findings,
    ratio,
    seed_ratios,
    text_of,
)
from metasepia.diversity.measures import SPLITS
from metasepia.diversity.results import Group, spelled, tasks_spelled, words_of
from metasepia.pages import Page

_SETTINGS = (
    "problem",
    "layers",
    "width",
    "heads",
    "dims",
    "points",
    "noise_variance",
    "scale",
    "num_steps",
    "batch_size",
    "learning_rate",
    "warmup_share",
    "weight_decay",
    "seed",
    "num_tasks",
    "measured_sequences",
)


def page_of(
    findings: Findings, pictures: Sequence[Picture], *, command: str, digest: str, notes: Sequence[str] = ()
) -> Page:
    """The page. `command` is the one that made the sweep, `notes` what should stand at the top of it."""
    results = findings.results
    page = Page("Task diversity: how varied must pretraining be?").text(*summary_of(findings), *notes)
    if findings.claims:
        rows = [[c.what, _rounded(c.value), c.bound, _yes(c.holds), c.note] for c in findings.claims]
        page.section("Bounds").table(["what", "measured", "bound", "holds", "note"], rows)
    _crossings(page, findings)
    for g, group in enumerate(results.groups):
        _group(page, findings, g, group)
        _figures(page, [one for one in pictures if one.name.endswith(f"-{g}")])
    _figures(page, [one for one in pictures if "-" not in one.name])
    _what_was_run(page, findings, command, digest)
    return page


def summary_of(findings: Findings) -> list[str]:
    """The first paragraphs: the question, the answer."""
    results = findings.results
    group = results.groups[0]
    of_pool, of_prior = (NAMES[name] for name in group.estimators)
    paragraphs = [
        f"Each model learned in context from sequences of {group.first.points} pairs whose task came from a pool of M. "
        f"Two ideal learners stand beside it: {of_pool}, which knows the pool, and {of_prior}, which "
        "knows only how tasks are distributed. With few tasks a model does as the first; with many it leaves it for "
        "the second, which does better on tasks that it never saw (Raventos et al., arXiv:2306.15063)."
    ]
    for split in SPLITS:
        crossing = findings.crossings[0, split]
        if crossing is not None:
            where = f" ({group.label})" if group.label else ""
            paragraphs.append(
                f"The number of tasks from which models are nearer {of_prior} than {of_pool}, on "
                f"{SPLIT_WORDS[split]}{where}: {crossing.text}."
                + (" The two curves cross more than once." if crossing.changes > 1 else "")
            )
    beaten = findings.beaten(group)
    if beaten is not None:
        paragraphs.append(
            f"With {tasks_spelled(beaten)} tasks models are nearer {of_prior} and err less on new tasks than "
            f"{of_pool} of their own pool: what they learned is not the Bayesian answer for it."
        )
    if results.diverged:
        named = ", ".join(
            f"M = {tasks_spelled(results.trials[i].num_tasks)} seed {results.trials[i].seed} at step {step}"
            for i, step in sorted(results.diverged.items())
        )
        paragraphs.append(f"{len(results.diverged)} trials diverged and are left out of every mean: {named}.")
    if findings.claims:
        paragraphs.append(text_of(findings.claims))
    return paragraphs


def _crossings(page: Page, findings: Findings) -> None:
    results = findings.results
    rows = [
        [group.label or "all", SPLIT_WORDS[split], crossing.text, crossing.share_found]
        for g, group in enumerate(results.groups)
        for split in SPLITS
        if (crossing := findings.crossings[g, split]) is not None
    ]
    page.section("Where models cross over")
    if not rows:
        page.text("A crossing needs two numbers of tasks or more.")
        return
    seeds, blocks = len(results.groups[0].seeds), results.groups[0].first.measured_blocks
    page.text(
        "The M from which the model's squared distance to the estimator of its pool exceeds that to the estimator of "
        f"the prior, after the last step; straight in log2 M between neighbours. Intervals: 1000 bootstrap draws over "
        f"{seeds} seed{'s' if seeds > 1 else ''} and {blocks} blocks of evaluation sequences"
        + (", the same for all M." if seeds > 1 else ", the same for all M; one seed says nothing about other seeds.")
    )
    page.table(["models", "on", "crossing", "share of draws that cross"], rows)
    if findings.moves:
        page.text("Along each axis, all others the same:")
        page.items(
            [
                f"{words_of(m.axis)} from {spelled(m.axis, m.values[0])} to {spelled(m.axis, m.values[1])}"
                + (f" ({m.rest})" if m.rest else "")
                + f", {SPLIT_WORDS[m.split]}: {m.move.text}"
                + _followed(findings, m.axis)
                for m in findings.moves
            ]
        )
    if findings.by_budget:
        page.text(
            "By the paper's own criterion, the M from which more training brings a model nearer to ridge on new tasks:"
        )
        page.items(
            [
                f"{words_of(b.axis)} {spelled(b.axis, b.values[0])} against {spelled(b.axis, b.values[1])}"
                + (f" ({b.rest})" if b.rest else "")
                + f": {b.crossing.text}"
                for b in findings.by_budget
            ]
        )
    else:
        page.text(
            "The paper's own criterion compares two budgets, and this sweep has one: give --steps or --batch-size two "
            "values."
        )
    page.text(
        "The paper finds the crossing of its base model (D 8) between 2^14 and 2^15 tasks and of its small one between "
        "2^11 and 2^12. It depends on model, budget and problem, so it is a finding here and not a bound."
    )


def _followed(findings: Findings, axis: str) -> str:
    followers = findings.results.followers(axis)
    return f"; {' and '.join(words_of(name) for name in followers)} go with it" if followers else ""


def _group(page: Page, findings: Findings, g: int, group: Group) -> None:
    """Figures of one setting by M."""
    of_pool, of_prior = group.estimators
    title = f"Models: {group.label}" if group.label else "Figures by number of tasks"
    page.section(title)
    unit = error_words(group)
    for split in SPLITS:
        page.table(
            [
                "tasks M",
                "seeds",
                "model",
                NAMES[of_pool],
                NAMES[of_prior],
                f"distance to {NAMES[of_pool]}",
                f"distance to {NAMES[of_prior]}",
            ],
            [
                [
                    tasks_spelled(m),
                    len(group.by_tasks[m]),
                    *(
                        _rounded(group.mean(metric, split, m))
                        for metric in (
                            "error",
                            f"{of_pool}_error",
                            f"{of_prior}_error",
                            f"delta_{of_pool}",
                            f"delta_{of_prior}",
                        )
                    ),
                ]
                for m in group.by_tasks
            ],
            caption=f"On {SPLIT_WORDS[split]}: {unit}, means over seeds and positions, after the last step",
        )
    if group.problem == "logistic":
        _log_losses(page, group)
    sentences = _ratios(group)
    if sentences:
        page.items(sentences)


def _log_losses(page: Page, group: Group) -> None:
    names = ("log_loss", *(f"{name}_log_loss" for name in group.estimators))
    header = [
        f"{who}, {SPLIT_WORDS[split]}" for split in SPLITS for who in ("model", *(NAMES[n] for n in group.estimators))
    ]
    page.table(
        ["tasks M", *header],
        [
            [tasks_spelled(m), *(_rounded(group.mean(name, split, m)) for split in SPLITS for name in names)]
            for m in group.by_tasks
        ],
        caption="Log loss in nats, expected over labels of the true probability; means over seeds and positions",
    )
    errors = [group.mean("gaussian_standard_error", "new", m) for m in group.by_tasks]
    if errors:
        page.text(f"The Gaussian posterior is sampled: the standard error of its probabilities is {max(errors):.2g}.")


def _ratios(group: Group) -> list[str]:
    of_pool, of_prior = group.estimators
    told: list[str] = []
    if MEMORISED in group.by_tasks:
        where = ("pretraining", MEMORISED)
        kept = ratio(group, f"delta_{of_prior}", f"delta_{of_pool}", *where)
        each = seed_ratios(group, f"delta_{of_prior}", f"delta_{of_pool}", *where)
        told.append(
            f"With {MEMORISED} tasks, on pretraining tasks, the distance to {NAMES[of_prior]} is {kept:.3g} times that "
            f"to {NAMES[of_pool]}{_by_seed(each)}."
        )
        where = ("new", MEMORISED)
        lost = ratio(group, "error", f"{of_prior}_error", *where)
        each = seed_ratios(group, "error", f"{of_prior}_error", *where)
        told.append(f"On new tasks its error is {lost:.3g} times that of {NAMES[of_prior]}{_by_seed(each)}.")
    if None in group.by_tasks:
        excess = ratio(group, "error", f"{of_prior}_error", "new", None)
        each = seed_ratios(group, "error", f"{of_prior}_error", "new", None)
        told.append(
            "With a fresh task in every sequence its error on new tasks is "
            f"{excess:.3g} times that of {NAMES[of_prior]}{_by_seed(each)}."
        )
    return told


def _by_seed(values: Sequence[float]) -> str:
    return f" (by seed: {', '.join(f'{value:.3g}' for value in values)})" if len(values) > 1 else ""


def _figures(page: Page, pictures: Sequence[Picture]) -> None:
    for one in pictures:
        page.figure(one.png, f"{one.title}. {one.caption}", one.alt)


def _what_was_run(page: Page, findings: Findings, command: str, digest: str) -> None:
    results = findings.results
    page.section("What was run").code(command)
    rows = []
    for name in _SETTINGS:
        values = list(dict.fromkeys(getattr(trial, name) for trial in results.trials))
        values.sort(key=lambda value: (value is None, value if value is not None else 0))
        rows.append([words_of(name), ", ".join(spelled(name, value) for value in values)])
    page.table(["setting", "values"], rows)
    page.text(
        f"{len(results.trials)} models, {results.num_rows:,} rows in table.parquet, one a trial, step and metric; "
        f"sweep {digest}.",
        "Errors are against the noiseless target; the paper's losses are larger by noise variance / D. Evaluation "
        "sequences, their inputs and noise are the same for every M of a seed, new tasks too; pools are nested. The "
        "figures are a function of the settings alone: worker counts, kills and resumes do not change the table.",
    )


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.4g}")


def _yes(holds: bool | None) -> str:
    return "not run" if holds is None else "yes" if holds else "no"
