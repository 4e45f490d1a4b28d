"""`python -m actors.keys`, on the directory itself."""

from pathlib import Path

import pytest

from actors import keys
from metasepia.access.keyring import Keyring
from metasepia.access.store import KeyStore
from metasepia.registry.catalogue import Registry
from serve.access import principal
from serve.access.tenants import PerTenant


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METASEPIA_HOME", str(tmp_path))
    return tmp_path


def test_the_first_key_is_made_without_a_graph_and_goes_to_stdout_alone(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keys.main(["create", "--tenant", "ops", "--scopes", "admin", "--expires-in-days", "1"]) == 0
    said = capsys.readouterr()
    text = said.out.strip()
    assert text not in said.err and "\n" not in text
    with Registry(home / "registry") as registry:
        store, ring = KeyStore(registry.root, registry.epoch), Keyring()
        ring.take(store.exchange(ring.report(), None))
        key = ring.identify(text)
        assert (key.tenant, key.scopes) == ("ops", ("admin",)) and key.expires_unix_s is not None
        store.close()
    assert keys.main(["list"]) == 0
    listed = capsys.readouterr().out
    assert key.id in listed and text.split("_", 2)[2] not in listed
    assert keys.main(["revoke", key.id]) == 0 and keys.main(["list"]) == 0
    assert "revoked" in capsys.readouterr().out


def test_what_was_made_before_keys_can_be_given_a_key_and_what_is_shared_cannot(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert keys.main(["create", "--tenant", "local", "--scopes", "infer"]) == 0
    assert keys.main(["create", "--tenant", "shared", "--scopes", "infer"]) == 1
    assert "'shared' is reserved" in capsys.readouterr().err


def test_a_directory_that_a_graph_is_only_opening_is_said_to_be_so(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Registry(home / "registry"):
        assert keys.main(["list"]) == 1
    assert "it is starting or ending" in capsys.readouterr().err and not (home / "registry" / "keys.sqlite").exists()


def test_each_tenant_has_its_own_and_who_asked_least_recently_is_made_anew() -> None:
    made: list[str] = []

    def make(tenant: str) -> list[str]:
        made.append(tenant)
        return [tenant]

    kept = PerTenant(make, most=2)
    with principal.asking(principal.Principal("anna", frozenset())):
        annas = kept.mine()
    assert kept.mine() == ["local"] and kept.of("anna") is annas
    kept.of("bert")  # local leaves
    assert kept.of("anna") is annas and made == ["anna", "local", "bert"]
    kept.of("local")
    assert made == ["anna", "local", "bert", "local"]


def test_owners_are_those_who_have_something_now(home: Path) -> None:
    with Registry(home / "other") as registry:
        for owner in ("bert", "anna"):
            registry.put("search", owner.encode(), digest="a" * 64, name="one", owner=owner)
        registry.put("expert", b"", digest="b" * 64, name="one", owner="carl")
        assert registry.owners("search") == ("anna", "bert")
        registry.delete("search", "one", "anna")
        assert registry.owners("search") == ("bert",) and registry.get("a" * 64, "bert") == b"bert"
