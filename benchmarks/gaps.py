"""TART's two gaps of a frozen model (arXiv:2306.07536): what a changed representation would add to a probe on it, and
what a probe on its embeddings adds to prompting it with the same examples."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from transformers import AutoModel, AutoTokenizer

from metasepia import encoders

BODY_RATE, HEAD_RATE, BATCH = 5e-5, 1e-3, 16


def fine_tuned_accuracy(
    source: str,
    examples: Sequence[tuple[str, str]],
    vectors: np.ndarray,
    test: Sequence[tuple[str, str]],
    *,
    epochs: int,
    seed: int,
    window: int,
    advance: Callable[[int], None] = lambda _: None,
) -> float:
    """Accuracy of the encoder fine-tuned on the examples: its unit-norm mean states and a linear head, all trained.

    The head begins as the probe on `vectors`, the examples' frozen embeddings (Kumar et al., arXiv:2202.10054), so what
    is measured is what moving the representation adds. AdamW, rates falling linearly to 0 after a tenth of the steps;
    nothing is chosen by the data. Texts beyond `window` tokens are cut. `advance` is told how many examples were seen.
    """
    folder = encoders.find(source)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    body = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32, use_safetensors=True).train()
    probe = LogisticRegression(C=1, max_iter=1000).fit(vectors, [label for _, label in examples])
    classes = list(probe.classes_)
    head = nn.Linear(vectors.shape[1], len(classes))
    weight, bias = torch.tensor(probe.coef_), torch.tensor(probe.intercept_)
    if len(classes) == 2:  # scikit-learn keeps one row for two classes
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    head.load_state_dict({"weight": weight.float(), "bias": bias.float()})

    def logits(texts: Sequence[str]) -> torch.Tensor:
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=window, return_tensors="pt")
        states = body(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        mean = (states * mask).sum(1) / mask.sum(1)
        return head(nn.functional.normalize(mean, dim=-1))

    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)  # dropout
    optimizer = torch.optim.AdamW(
        [{"params": body.parameters(), "lr": BODY_RATE}, {"params": head.parameters(), "lr": HEAD_RATE}]
    )
    num_steps = epochs * -(-len(examples) // BATCH)
    rise = max(1, num_steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (num_steps - step) / max(1, num_steps - rise))
    )
    with torch.enable_grad():
        for _ in range(epochs):
            order = rng.permutation(len(examples))
            for begin in range(0, len(order), BATCH):
                some = [examples[i] for i in order[begin : begin + BATCH]]
                truth = torch.tensor([classes.index(label) for _, label in some])
                nn.functional.cross_entropy(logits([text for text, _ in some]), truth).backward()
                nn.utils.clip_grad_norm_(body.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                advance(len(some))
    body.eval()
    right = 0
    with torch.inference_mode():
        by_length = sorted(test, key=lambda example: len(example[0]))
        for begin in range(0, len(by_length), 2 * BATCH):
            some = by_length[begin : begin + 2 * BATCH]
            best = logits([text for text, _ in some]).argmax(1).tolist()
            right += sum(classes[i] == label for i, (_, label) in zip(best, some, strict=True))
    return right / len(test)
