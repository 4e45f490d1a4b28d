import numpy as np
import pytest

from metasepia.errors import CorruptArtefact, InvalidRequest, UnknownName
from metasepia.experts.mixing import (
    ExpertMixer,
    adapter_of,
    adapter_of_rows,
    added_up,
    base_of,
    mixture_blob,
    mixture_digest,
    read_mixture,
)
from metasepia.experts.vectors import ExpertVectors
from metasepia.rows import Weight


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


def test_weights_by_layer_mix_each_layer_by_its_own() -> None:
    mixer = ExpertMixer({"maths": MATHS, "law": LAW}, layers=("down", "up"))
    mixed = mixer.mix({"maths": (0.25, 1.0), "law": (0.75, 0.0)})
    np.testing.assert_allclose(mixed.z["up"], [1, 2])
    np.testing.assert_allclose(mixed.z["down"], [0.25 * 4 + 0.75])


def test_weights_by_layer_that_agree_are_the_global_mixture() -> None:
    by_layer = adapter_of({"a": [0.25, 0.25], "b": [0.75, 0.75]})
    assert by_layer == adapter_of({"a": 0.25, "b": 0.75})


def test_an_expert_without_weight_in_any_layer_is_left_out() -> None:
    assert adapter_of({"a": [0.0, 0.0], "b": [1.0, 1.0]}) == (("b", 1.0),)


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ({"maths": [0.5, 1.0], "law": [0.5, 0.1]}, "in layer 1"),
        ({"maths": [0.5, 1.0], "law": [0.5]}, "of one length"),
        ({"maths": [0.5, 0.2, 1.0], "law": [0.5, 0.8, 0.0]}, "one for each of the 2 factored layers, got 3"),
        ({"maths": [float("nan"), 1.0], "law": [0.5, 0.0]}, "weights must lie"),
    ],
)
def test_weights_by_layer_off_the_simplex_are_refused(weights: dict[str, list[float]], problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem):
        ExpertMixer({"maths": MATHS, "law": LAW}, layers=("down", "up")).mix(weights)


def test_the_base_takes_part_as_ones_and_alone_is_the_base() -> None:
    base = base_of(MATHS).digest
    np.testing.assert_allclose(MIXER.mix({"maths": 0.5, base: 0.5}).z["up"], [1, 1.5])
    assert adapter_of_rows(((base, 1.0),), {base}) == ()
    assert adapter_of_rows((("a", 1.0),), {base}) == (("a", 1.0),)


def test_an_expert_truncated_to_leading_values_counts_as_ones_beyond() -> None:
    mixer = ExpertMixer({"maths": MATHS, "short": an_expert({"up": [3]})})
    np.testing.assert_allclose(mixer.mix({"maths": 0.5, "short": 0.5}).z["up"], [2, 1.5])


def test_the_digest_of_a_global_mixture_stays_what_it_was() -> None:
    digest = "4c4183163fe3188a"
    assert mixture_digest((("b", 0.75), ("a", 0.25))).startswith(digest)


@pytest.mark.parametrize("weights", [(0.25, 0.75), ((0.5, 1.0), (0.5, 0.0))])
def test_a_mixture_is_read_back_from_its_blob(weights: tuple[Weight, Weight]) -> None:
    adapter = (("a" * 64, weights[0]), ("b" * 64, weights[1]))
    assert read_mixture(mixture_blob(adapter)) == adapter


HALF = mixture_blob((("a" * 64, 0.5),))


@pytest.mark.parametrize("blob", [b"{}", b"[]", b"\xff", b'{"experts": [["a", 1.0]]}', HALF])
def test_a_blob_that_is_no_mixture_is_refused(blob: bytes) -> None:
    with pytest.raises(CorruptArtefact, match="not a mixture"):
        read_mixture(blob)


def test_weights_of_an_expert_named_twice_add_up_in_each_layer() -> None:
    assert added_up([("a", 0.5), ("b", (0.25, 0.0)), ("a", (0.25, 0.5))]) == (("a", (0.75, 1.0)), ("b", (0.25, 0.0)))
