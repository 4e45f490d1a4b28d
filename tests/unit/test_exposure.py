"""What other machines could reach is found before anything is started."""

import pytest

from cluster import settings as settings_of
from cluster.exposure import check_exposure, exposure
from cluster.settings import Settings
from metasepia.errors import InvalidSettings


def settings(**fields: str) -> Settings:
    return settings_of.read("laptop", {"METASEPIA_" + name.replace(".", "__"): value for name, value in fields.items()})


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.9.1"])
def test_a_door_on_loopback_needs_no_keys(host: str) -> None:
    assert exposure(settings(HTTP__HOST=host)) == ()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "door.example.org"])
def test_a_door_that_others_reach_needs_keys_and_rays_token_both(host: str) -> None:
    def found(**also: str) -> list[str]:
        return [one.setting for one in exposure(settings(HTTP__HOST=host, GRPC__ENABLED="false", **also))]

    assert found() == ["http.host", "ray.auth_mode"]
    assert found(KEYS__REQUIRED="true") == ["ray.auth_mode"]
    assert found(RAY__AUTH_MODE="token") == ["http.host"]
    assert found(KEYS__REQUIRED="true", RAY__AUTH_MODE="token") == []


def test_the_grpc_door_alone_is_a_door_too() -> None:
    assert [one.setting for one in exposure(settings(GRPC__HOST="0.0.0.0"))] == ["grpc.host", "ray.auth_mode"]


def test_the_refusal_names_the_setting_the_danger_and_the_way_out() -> None:
    with pytest.raises(InvalidSettings) as caught:
        check_exposure(settings(HTTP__HOST="0.0.0.0"))
    said = str(caught.value)
    assert all(word in said for word in ("http.host = '0.0.0.0'", "whoever does may do everything", "keys.required"))
    check_exposure(settings())
