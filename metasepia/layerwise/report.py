"""The page that says what a layer-by-layer reading ran and what it says."""

from collections import Counter
from collections.abc import Sequence

from metasepia.layerwise.measures import Finding, Measures, Scored, Value, contingency
from metasepia.layerwise.states import Plan
from metasepia.models.prepared import PreparedBackbone
from metasepia.pages import Page

MOST_IN_A_TABLE = 12
POOLED = {
    "last": "the state at the last token",
    "mean": "the mean state over all tokens",
    "rest": "the mean state over all tokens but the first",
}


def page(
    *,
    command: str,
    prepared: PreparedBackbone,
    plan: Plan,
    measures: Measures,
    held_out_by: str,
    layers: Sequence[Scored],
    controls: Sequence[Scored],
    findings: Sequence[Finding],
    pictures: Sequence[tuple[bytes, str, str]],
) -> Page:
    """`pictures`: PNG, caption, alternative text."""
    texts, settings = measures.texts, measures.settings
    made = Page(f"Which layers of {prepared.source} tell {len(texts.names)} tasks apart")
    made.text(
        "K-means is run on the hidden states of each layer, without labels, and its clusters are compared with the "
        "tasks by the adjusted Rand index (ARI: 0 by chance, 1 for the tasks themselves), as in Wu and Varshney, "
        f"arXiv:2402.12151. All scores below are of held-out texts ({held_out_by}s not fitted to), unless they say fit."
    )
    made.section("What it says").items(says(measures, layers, controls, findings))
    made.section("Figures")
    for png, caption, alt in pictures:
        made.figure(png, caption, alt)
    made.section("What was run").code(command)
    made.items(_run(prepared, plan, measures, held_out_by))
    counts, held = Counter(texts.tasks), Counter(measures.held_tasks.tolist())
    made.table(
        ["task", "texts", "held out"], [[name, counts[name], held[name]] for name in texts.names], "Texts by task"
    )
    for finding in findings:
        made.section(f"Layers, {finding.pooling}: {POOLED[finding.pooling]}")
        made.table(*_by_layer(measures, layers, controls, finding.pooling))
        names, found = contingency(measures, finding.best)
        if max(found.shape) <= MOST_IN_A_TABLE:
            made.table(
                ["task", *(f"cluster {i}" for i in range(found.shape[1]))],
                [[name, *map(int, row)] for name, row in zip(names, found, strict=True)],
                f"Held-out texts of each task in each cluster of layer {finding.best.layer}",
            )
    made.section("How to read it").items(
        [
            "embedding: the mean of the input embeddings of a text's tokens. words: tf-idf of words and of pairs of "
            "neighbours. They know which words a text has and nothing of how they are read: a layer that scores no "
            "higher says nothing that the words do not.",
            "above: the difference to the best of these two and of shuffled tasks, in the same resamples; a layer is "
            "said to tell tasks apart where its whole interval lies above 0.",
            "ARI across (where texts have templates): over pairs of texts by different templates alone, where "
            "clusters of templates do not count as clusters of tasks.",
            f"Intervals hold 95 % of {settings.resamples} bootstrap resamples of held-out {measures.unit}s, for the "
            "clusters that were found. They do not hold the chance of k-means' starts, nor allow for many layers being "
            "looked at."
            + (
                ""
                if measures.unit == held_out_by
                else " The held-out templates are too few to be resampled: the intervals are too narrow for new ones."
            ),
            "The best layer is the one with the highest ARI on the fitting texts.",
            "What the clusters are of depends on where the state is read: at the end of a prompt that holds an input, "
            "late layers may cluster by the answer rather than by the task.",
        ]
    )
    return made


def says(
    measures: Measures, layers: Sequence[Scored], controls: Sequence[Scored], findings: Sequence[Finding]
) -> list[str]:
    """The findings in sentences, for the page and the terminal."""
    sentences: list[str] = []
    for finding in findings:
        best, above = finding.best, measures.above(finding.best, controls, "ari")
        own = [one for one in layers if one.pooling == finding.pooling]
        sentences.append(
            f"{finding.pooling}: best by the fitting texts is layer {best.layer}, ARI "
            f"{_interval(best['ari', 'held_out'])} and nearest-mean accuracy "
            f"{_interval(best['accuracy', 'held_out'])} on held-out texts; shuffled tasks give "
            f"{best['ari_shuffled', 'held_out'].value:.3f} and {best['accuracy_shuffled', 'held_out'].value:.3f}."
        )
        better = max(controls, key=lambda one: one["ari", "held_out"].value)
        sentences.append(
            f"{finding.pooling}: that ARI is {_interval(above)} above the controls (the better, {better.features}, has "
            f"{_interval(better['ari', 'held_out'])}); layers that tell tasks apart by ARI: "
            f"{ranges(finding.apart, [one.layer for one in own])}; by nearest-mean accuracy: "
            f"{ranges(finding.routed, [one.layer for one in own])}."
        )
    for one in controls:
        if one["accuracy", "held_out"].value > 0.99:
            sentences.append(
                f"The control `{one.features}` is right on {one['accuracy', 'held_out'].value:.1%} of held-out texts: "
                "their words give the tasks away, so no layer can be much above it in accuracy."
            )
    return sentences


def ranges(layers: Sequence[int], all_layers: Sequence[int]) -> str:
    """Layers in words: neighbours among those that were read are joined."""
    parts: list[list[int]] = []
    places = {layer: i for i, layer in enumerate(sorted(all_layers))}
    for layer in sorted(layers):
        if parts and places[layer] == places[parts[-1][-1]] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(f"{one[0]}" if len(one) == 1 else f"{one[0]} to {one[-1]}" for one in parts) or "none"


def _by_layer(
    measures: Measures, layers: Sequence[Scored], controls: Sequence[Scored], pooling: str
) -> tuple[list[str], list[list[object]], str]:
    templates = ("ari_across", "held_out") in controls[0].values
    header = [
        "layer",
        "ARI",
        "above",
        *(["ARI across"] if templates else []),
        "ARI, fit",
        "NMI",
        "silhouette",
        "accuracy",
        "above",
        "margin",
    ]
    rows: list[list[object]] = []
    for one in [*controls, *(one for one in layers if one.pooling == pooling)]:
        is_layer = one.features == "layer"
        rows.append(
            [
                one.layer if is_layer else one.features,
                _interval(one["ari", "held_out"]),
                _interval(measures.above(one, controls, "ari")) if is_layer else None,
                *([_interval(one["ari_across", "held_out"])] if templates else []),
                one["ari", "fit"].value,
                one["nmi", "held_out"].value,
                _interval(one["silhouette", "held_out"]),
                _interval(one["accuracy", "held_out"]),
                _interval(measures.above(one, controls, "accuracy")) if is_layer else None,
                one["margin", "held_out"].value,
            ]
        )
    return header, rows, "Value and 95 % interval"


def _run(prepared: PreparedBackbone, plan: Plan, measures: Measures, held_out_by: str) -> list[str]:
    texts, settings = measures.texts, measures.settings
    num_tokens = sum(map(len, plan.sequences))
    return [
        f"Backbone {prepared.source} (digest {prepared.digest}), {prepared.num_layers} blocks, {prepared.model_type}, "
        f"{plan.header['dtype']} on {plan.header['device']}.",
        f"{len(texts.texts)} texts (digest {texts.digest}), {num_tokens:,} tokens as {plan.settings.prompt} prompts; "
        f"{plan.num_cut} of them cut to {plan.header['max_tokens']} tokens. {int(measures.held.sum())} held out, by "
        f"{held_out_by}.",
        f"K-means with {measures.k} clusters on {settings.scaling} states, seed {settings.seed}; fitted to the texts "
        "that are not held out.",
        *(
            [
                f"Within each of {len(set(texts.inputs))} inputs: the mean state of the fitting texts that hold one is "
                "taken off all texts that hold it."
            ]
            if texts.inputs
            else []
        ),
        *(f"Of the texts: {note}." for note in texts.notes),
    ]


def _interval(value: Value) -> str:
    if value.low is None or value.high is None:
        return f"{value.value:.3f}"
    return f"{value.value:.3f} ({value.low:.3f} to {value.high:.3f})"
