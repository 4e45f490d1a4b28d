"""Settings that people write in files hold what they declare, or are refused by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from metasepia.blackbox.settings import EndpointSettings
from metasepia.embedding.agreement import AgreementSettings
from metasepia.embedding.fisher import FisherSettings
from metasepia.embedding.prefix import PrefixSettings
from metasepia.errors import InvalidSettings
from metasepia.kinds import check_kinds


@dataclass(frozen=True, kw_only=True)
class Settings:
    number: int = 1
    share: float = 0.5
    flag: bool = False
    choice: Literal["a", "b"] | Literal["auto"] = "auto"
    seed: int | None = None
    texts: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_kinds(self)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("number", "1", "a whole number"),
        ("number", True, "a whole number"),
        ("number", 1.5, "a whole number"),
        ("share", "0.5", "a number"),
        ("share", True, "a number"),
        ("flag", 1, "true or false"),
        ("choice", "c", "one of a, b, or one of auto"),
        ("seed", "3", "a whole number, or left out"),
        ("texts", "abc", "a list, each text"),
        ("texts", (1,), "a list, each text"),
        ("extra", [], "a table"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_name(name: str, value: object, allowed: str):
    with pytest.raises(InvalidSettings) as raised:
        Settings(**{name: value})  # pyright: ignore[reportArgumentType]
    assert (raised.value.field, raised.value.allowed) == (name, allowed)


def test_what_is_declared_passes_and_a_whole_number_becomes_the_float_that_it_stands_for():
    made = Settings(share=1, choice="a", seed=3, texts=("x",), extra={"y": 1})
    assert (made.share, type(made.share)) == (1.0, float)
    assert Settings(number=2**40).number == 2**40


def declared() -> list[object]:
    return [
        AgreementSettings(),
        PrefixSettings(),
        FisherSettings(),
        EndpointSettings(base_url="http://h/v1", model="m"),
    ]


@pytest.mark.parametrize("place", range(4))
def test_every_setting_is_checked_where_it_is_declared(place: int):
    for name in vars(declared()[place]):
        made = declared()[place]
        object.__setattr__(made, name, b"0")  # past the constructor, whose arguments are checked while tests run
        with pytest.raises(InvalidSettings, match=f"setting {name} = "):
            made.__post_init__()  # pyright: ignore[reportAttributeAccessIssue]
