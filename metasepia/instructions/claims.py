"""What the sweep is held to: bounds on medians over seeds, at the setting where they were chosen.

The bounds are this project's; no figure of the paper (arXiv:2402.12151) could be verified. Patches have a bound under
the strict mask (`bottleneck`) alone. Under the milder one (`reread`) a patched separator reads the words again and
mends itself: fewer answers flip, how many depends on the seed, and its figures stand beside, only measured.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from metasepia.instructions.model import MaskKind


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One figure of `results.Summary` under one mask, and where it should be; without bounds it is only measured."""

    figure: str
    mask: MaskKind
    what: str
    least: float = -math.inf
    most: float = math.inf

    @property
    def is_bound(self) -> bool:
        return math.isfinite(self.least) or math.isfinite(self.most)

    @property
    def reach(self) -> str:
        """As ">= 0.97", or empty."""
        if math.isfinite(self.least):
            return f">= {self.least:g}"
        return f"<= {self.most:g}" if math.isfinite(self.most) else ""

    def holds(self, value: float) -> bool | None:
        """None for what is only measured; NaN never holds."""
        return self.least <= value <= self.most if self.is_bound else None


CLAIMS: tuple[Claim, ...] = (
    Claim(figure="accuracy", mask="causal", what="accuracy on unseen strings", least=0.97),
    Claim(figure="ari_task", mask="causal", what="ARI(task) at the instruction's end, highest layer", least=0.8),
    Claim(figure="ari_task_gain", mask="causal", what="the same above step 0", least=0.5),
    Claim(figure="ari_task_layer0", mask="causal", what="ARI(task) at the instruction's end, layer 0", most=0.05),
    Claim(figure="ari_shuffled", mask="causal", what="its clusters against shuffled labels, any layer", most=0.05),
    Claim(figure="last_ari_output", mask="causal", what="ARI(output) at the last token, highest layer", least=0.9),
    Claim(figure="last_ari_task", mask="causal", what="ARI(task) at the last token, last layer", most=0.4),
    Claim(figure="spearman", mask="causal", what="rank correlation of ARI and accuracy, first half", least=0.7),
    Claim(figure="flips_layer1", mask="causal", what="answers flipped by a centroid at layer 1, no mask"),
    Claim(figure="accuracy", mask="bottleneck", what="accuracy on unseen strings, strict mask", least=0.97),
    Claim(
        figure="flips_layer1",
        mask="bottleneck",
        what="answers flipped at layer 1, strict mask (after block 1 no token sees the words again)",
        least=0.95,
    ),
    Claim(
        figure="flips_layer1",
        mask="reread",
        what="the same, milder mask (the separator alone sees the words, in every block)",
    ),
    Claim(
        figure="flips_held_layer1",
        mask="reread",
        what="milder mask, centroids held through all later layers",
    ),
    Claim(figure="flips_added_layer1", mask="bottleneck", what="flipped by adding the difference, strict mask"),
    Claim(figure="kept_own", mask="bottleneck", what="kept under the own task's centroid, layer 1, strict mask"),
    Claim(
        figure="flips_last_layer",
        mask="bottleneck",
        what="flipped at the last layer, which no later token reads, strict mask",
        most=0.1,
    ),
    Claim(
        figure="flips_shuffled",
        mask="bottleneck",
        what="flipped by shuffled labels' centroids, any layer, strict mask",
        most=0.2,
    ),
)


def row_of(claim: Claim, medians: Mapping[str, float]) -> tuple[str, float, str, Literal["", "yes", "no"]]:
    """What, value, reach and whether it is reached."""
    value = medians[claim.figure]
    held = claim.holds(value)
    return claim.what, value, claim.reach, "" if held is None else "yes" if held else "no"
