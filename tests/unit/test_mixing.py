import numpy as np
import pytest

from metasepia.errors import InvalidRequest, UnknownName
from metasepia.experts import ExpertVectors
from metasepia.mixing import ExpertMixer, adapter_of, mixture_digest


def an_expert(z: dict[str, list[float]], **changes: object) -> ExpertVectors:
    vectors = {name: np.array(values, np.float32) for name, values in z.items()}
    return ExpertVectors(**({"backbone": "b" * 64, "factors": "f" * 64, "z": vectors} | changes))  # pyright: ignore[reportArgumentType]


MATHS = an_expert({"up": [1, 2], "down": [4]})
LAW = an_expert({"up": [3, 0]})
MIXER = ExpertMixer({"maths": MATHS, "law": LAW})


def test_a_mixture_is_the_weighted_sum_and_an_absent_layer_counts_as_ones() -> None:
    mixed = MIXER.mix({"maths": 0.25, "law": 0.75})
    np.testing.assert_allclose(mixed.z["up"], [2.5, 0.5])
    np.testing.assert_allclose(mixed.z["down"], [0.25 * 4 + 0.75 * 1])


def test_a_mixture_of_one_expert_is_that_expert() -> None:
    assert MIXER.mix({"maths": 1.0, "law": 0.0}).digest == MATHS.digest


@pytest.mark.parametrize("weights", [{"maths": 0.5}, {"maths": 1.2, "law": -0.2}, {"maths": float("nan")}, {}])
def test_weights_off_the_simplex_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match="weights must"):
        MIXER.mix(weights)


def test_unknown_expert_names_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="no expert named 'art'; known: law, maths"):
        MIXER.mix({"art": 1.0})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"renormalise": True}, "choose one kind"), ({"factors": "0" * 64}, "different backbones or factors")],
)
def test_experts_of_two_kinds_are_not_mixed(changes: dict[str, object], problem: str) -> None:
    mixer = ExpertMixer({"maths": MATHS, "other": an_expert({"up": [3, 0]}, **changes)})
    with pytest.raises(InvalidRequest, match=problem):
        mixer.mix({"maths": 0.5, "other": 0.5})


def test_the_digest_of_a_mixture_does_not_depend_on_the_order_of_its_experts_but_on_their_weights() -> None:
    one = mixture_digest(adapter_of({"a": 0.25, "b": 0.75}))
    assert one == mixture_digest((("b", 0.75), ("a", 0.25)))
    assert one != mixture_digest(adapter_of({"a": 0.75, "b": 0.25}))
