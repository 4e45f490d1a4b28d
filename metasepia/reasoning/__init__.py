"""Classification from labelled examples in the request, with no fitting: TART (arXiv:2306.07536).

`set_module` is the default module, examples as tokens without order, and `module` the paper's small causal decoder;
`set_training` and `training` are their recipes, steps and checkpoints, `shipped` the trained ones on disk. `examples`
holds labelled vectors, `context` is the one face over `sets` and `rows`, which compile them for two kinds of module,
and keeps compiled ones within a bound of bytes; `named` gives a context its name and its bytes. `protocols` and
`prompted` say how texts become vectors, `reduction` brings vectors to the causal module's dimensions.
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
