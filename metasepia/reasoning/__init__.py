"""Classification from labelled examples in the request, with no fitting: TART (arXiv:2306.07536).

`module` is the small causal decoder and its compiled path, `training` its recipes, steps and checkpoints, `shipped`
the trained modules on disk; `protocols` says how texts become vectors, `reduction` brings vectors to the module's
dimensions, `context` compiles labelled examples and keeps compiled ones within a bound of bytes.
`audit` leaves examples out and says what an answer rests on, `calibration` whether probabilities mean what they say,
`classifier` is the scikit-learn estimator, which is also `metasepia.reasoning.ReasoningClassifier`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metasepia.reasoning.classifier import ReasoningClassifier

__all__ = ["ReasoningClassifier"]


def __getattr__(name: str) -> Any:
    """Loaded when asked for: the gateway imports modules of this package and must not load torch."""
    if name == "ReasoningClassifier":
        from metasepia.reasoning.classifier import ReasoningClassifier

        return ReasoningClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
