"""An expert's papers: its README.md, made from its card, and the picture of its training."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def card_json(card: dict[str, Any]) -> str:
    """card.json: a line a field, each list of numbers on one line."""
    return re.sub(r"\[[-+.eE\d\s,]+\]", lambda m: " ".join(m[0].split()), json.dumps(card, indent=1)) + "\n"


def command_of(job: str, given: Sequence[str]) -> str:
    """The command that was given, with DIR and HOME for paths of this machine."""
    words = list(given)
    for index, word in enumerate(words[:-1]):
        if word in ("--out", "--home"):
            words[index + 1] = word[2:].upper() if word == "--home" else "DIR"
    return " ".join([f"python -m jobs.{job}", *map(shlex.quote, words)])


def draw(
    entries: Sequence[dict[str, float]], validated: Sequence[tuple[int, float]], picture: Path, title: str
) -> None:
    """The curves of a run: loss and accuracy, or reward, KL and accuracy where rewards taught."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_reward = bool(entries) and "reward" in entries[0]
    names = ("reward", "kl", "right") if by_reward else ("loss", "accuracy")
    axis_of = {
        "loss": {"ylabel": "loss on answer tokens (nats)", "yscale": "log"},
        "accuracy": {"ylabel": "share of batch right", "ylim": (0, 1.02)},
        "reward": {"ylabel": "mean reward", "ylim": (-1.04, 1.04)},
        "kl": {"ylabel": "KL to the base (nats a token)"},
        "right": {"ylabel": "share right", "ylim": (0, 1.02)},
    }
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3), layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        axis.plot(*zip(*points, strict=True), label="training batch")
        axis.set(xlabel="step", **axis_of[name])
    axes[0].set(title=title)
    if validated:
        axes[-1].plot([step for step, _ in validated], [one for _, one in validated], "o-", label="validation split")
        axes[-1].legend()
    figure.savefig(picture, dpi=80, metadata={"Software": None})
    pyplot.close(figure)


def model_card(card: dict[str, Any]) -> str:
    """README.md of an expert, from its card."""
    held = card["held_out"]
    names = {"choice": "likeliest of the labels", "exact": "greedy chat answer is the label, nothing else"}
    if not card["labels"]:
        names = {"exact": "greedy chat answer is right"}
    rows = [
        f"| {names[m]} | {held[m]['base']:.3f} | {held[m]['expert']:.3f} "
        f"| {held[m]['gain']:+.3f} | {held[m]['gain_95'][0]:+.3f} to {held[m]['gain_95'][1]:+.3f} |"
        for m in names
    ]
    messages = [{"role": "user", "content": card["example_prompt"]}]
    body = json.dumps({"model": card["asked_as"], "temperature": 0, "messages": messages}).replace("'", "\\u0027")
    about = card["description"] + (f" Labels: {', '.join(card['labels'])}." if card["labels"] else "")
    return f"""# Expert `{card["name"]}`

{about}

{_what_it_is(card)} on
{card["trained_layers"]} linear layers of `{card["backbone_source"]}`; every weight of the model stays as it is.

## Held out

{_held_out(card)}

| accuracy | base | expert | gain | 95 % interval |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

{_for_auto(card)}

## Ask it

Against `make serve`:

```
curl -s http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'
```

It answers `{card["example_answer"]}` (a held-out question that it gets right). It knows this one task:
for anything else ask the base model.

## How it was made

`{card["command"]}`

{_how(card)}
"""


def _for_auto(card: dict[str, Any]) -> str:
    if "dispatcher" in card:
        return """It is the stage `classifier` of `auto`: its answer to a message, put into its card's prompt, names the
expert that answers the message, or none. `auto` never chooses it."""
    checked = card["dispatch_checked"]
    own, general = checked["held_out_prompts_chosen"], checked["general_prompts_chosen"]
    return f"""For `auto`: of unseen prompts of this task {own:.0%} are sent to it, of general prompts
{general:.0%} (stage `centroid`, this expert alone)."""


def _what_it_is(card: dict[str, Any]) -> str:
    if card.get("form") == "lora":
        return f"{card['parameters']:,} numbers of low-rank products (LoRA, arXiv:2106.09685, rank {card['rank']})"
    return f"{card['parameters']:,} multipliers of singular values (SVF, Transformer-squared, arXiv:2501.06252)"


def _held_out(card: dict[str, Any]) -> str:
    held = card["held_out"]
    if held["templates"] > 1:
        return (
            f"{held['texts']} texts from {held['stems']} sentence stems, in {held['templates']} prompt templates; "
            "none of their\nstems, nouns and templates was trained on. The interval is a paired bootstrap over stems, "
            "10,000 resamples."
        )
    return (
        f"{held['texts']} questions of the test split in {held['stems']} groups; none was trained on or chosen by.\n"
        "The interval is a paired bootstrap over groups, 10,000 resamples."
    )


def _how(card: dict[str, Any]) -> str:
    start = "from B = 0" if card.get("form") == "lora" else "from z = 1"
    minutes = f"{card['training_cpu_minutes']:.0f} minutes of one core"
    if card["method"] == "sft":
        how = (
            f"Next-token loss on the answer tokens only, {card['steps']} steps of {card['batch']} prompts, Adam at\n"
            f"{card['learning_rate']:g} {start}, seed {card['seed']}; {minutes}.\n`curve.png` shows the loss."
        )
    else:
        first = f", the first {card['choice_steps']} among the labels only" if card["choice_steps"] else ""
        how = (
            f"REINFORCE on the model's own answers{first}: {card['steps']} steps of {card['batch']} prompts with "
            f"{card['samples']} answers\neach at temperature {card['temperature']:g}, baseline {card['baseline']}, KL "
            f"weight {card['kl']:g} ({card['kl_form']}), Adam at {card['learning_rate']:g},\nseed {card['seed']}; "
            f"{minutes}. `curve.png` shows reward, KL and accuracy."
        )
    if "stopped" in card:
        how += f" It ended early: {card['stopped']}."
    if card["held_out"]["templates"] <= 1:
        return how
    return (
        f"{how} The sentences were written for this project\n"
        f"(`jobs/tasks/{card['task']}.py`); no data set of others was used."
    )
