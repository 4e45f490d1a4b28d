"""An expert's papers: its README.md, made from its card, and the picture of its training."""

import json
import re
from pathlib import Path
from typing import Any


def card_json(card: dict[str, Any]) -> str:
    """card.json: a line a field, each list of numbers on one line."""
    return re.sub(r"\[[-+.eE\d\s,]+\]", lambda m: " ".join(m[0].split()), json.dumps(card, indent=1)) + "\n"


def draw(log: Path, picture: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = [json.loads(line) for line in log.read_text().splitlines()]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    steps = [entry["step"] for entry in entries]
    left.plot(steps, [entry["loss"] for entry in entries])
    left.set(xlabel="step", ylabel="loss on answer tokens (nats)", yscale="log", title=title)
    right.plot(steps, [entry["accuracy"] for entry in entries])
    right.set(xlabel="step", ylabel="share of batch right", ylim=(0, 1.02))
    figure.savefig(picture, dpi=80, metadata={"Software": None})
    pyplot.close(figure)


def model_card(card: dict[str, Any]) -> str:
    """README.md of an expert, from its card."""
    held = card["held_out"]
    names = {"choice": "likeliest of the labels", "exact": "greedy chat answer is the label, nothing else"}
    rows = [
        f"| {names[m]} | {held[m]['base']:.3f} | {held[m]['expert']:.3f} "
        f"| {held[m]['gain']:+.3f} | {held[m]['gain_95'][0]:+.3f} to {held[m]['gain_95'][1]:+.3f} |"
        for m in ("choice", "exact")
    ]
    messages = [{"role": "user", "content": card["example_prompt"]}]
    body = json.dumps({"model": card["asked_as"], "temperature": 0, "messages": messages}).replace("'", "\\u0027")
    dispatch = card["dispatch_checked"]
    return f"""# Expert `{card["name"]}`

{card["description"]} Labels: {", ".join(card["labels"])}.

{card["parameters"]:,} multipliers of singular values (SVF, Transformer-squared, arXiv:2501.06252) on
{card["trained_layers"]} linear layers of `{card["backbone_source"]}`; every weight of the model stays as it is.

## Held out

{held["texts"]} texts from {held["stems"]} sentence stems, in {held["templates"]} prompt templates; none of their
stems, nouns and templates was trained on. The interval is a paired bootstrap over stems, 10,000 resamples.

| accuracy | base | expert | gain | 95 % interval |
| --- | --- | --- | --- | --- |
{chr(10).join(rows)}

For `auto`: of unseen prompts of this task {dispatch["held_out_prompts_chosen"]:.0%} are sent to it, of general prompts
{dispatch["general_prompts_chosen"]:.0%} (stage `centroid`, this expert alone).

## Ask it

Against `make serve`:

```
curl -s http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'
```

It answers `{card["example_answer"]}` (a held-out question that it gets right). It knows this one task:
for anything else ask the base model.

## How it was made

`{card["command"]}`

Next-token loss on the answer tokens only, {card["steps"]} steps of {card["batch"]} prompts, Adam at
{card["learning_rate"]:g} from z = 1, seed {card["seed"]}; {card["training_cpu_minutes"]:.0f} minutes of one core.
`curve.png` shows the loss. The sentences were written for this project
(`jobs/tasks/{card["task"]}.py`); no data set of others was used.
"""
