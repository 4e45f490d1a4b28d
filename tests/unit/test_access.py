"""Keys by themselves: what is kept of one, when it opens, what it may use, and what survives."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from metasepia.access import keyring as keyring_of
from metasepia.access.clock import SteadyClock
from metasepia.access.keyring import Keyring
from metasepia.access.keys import Key, NewKey, Report, Spent, hash_of, mint, parse
from metasepia.access.store import KeyStore
from metasepia.errors import CorruptArtefact, InvalidRequest, Locked, QuotaExceeded, Unauthenticated, UnknownName
from tests.keys import Clock

DAY_S = 86_400


def a_store(root: Path, clock: Clock | None = None, *, epoch: int = 1, max_keys: int = 1000) -> KeyStore:
    clock = clock or Clock()
    root.mkdir(exist_ok=True)
    return KeyStore(root, epoch, max_keys=max_keys, wall=clock.wall, monotonic=clock.monotonic)


def a_key(store: KeyStore, tenant: str = "acme", **fields: object) -> tuple[str, Key]:
    id_, text, sha256 = mint()
    new = NewKey(id=id_, sha256=sha256, tenant=tenant, scopes=("infer",), **fields)  # pyright: ignore[reportArgumentType]
    return text, store.create(new.check())


def a_ring(store: KeyStore, clock: Clock, **limits: int) -> Keyring:
    ring = Keyring(**limits, monotonic=clock.monotonic)
    exchange(ring, store)
    return ring


def exchange(ring: Keyring, store: KeyStore) -> None:
    ring.take(store.exchange(ring.report(), ring.revision))


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_no_byte_of_the_secret_is_on_disk_or_in_what_is_printed_of_a_key(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    text, key = a_key(store)
    found = parse(text)
    assert found is not None and len(found[1]) == 43
    held = store.exchange(Report(gateway="g", number=1, spent=()), None).keys[0]
    store.close()
    on_disk = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert key.id.encode() in on_disk and hash_of(found[1]) in on_disk
    for part in (found[1], found[1][:12], found[1][-12:]):
        assert part.encode() not in on_disk and part not in repr(held) + repr(key)
    assert repr(hash_of(found[1])) not in repr(held)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tenant": "shared"}, "tenant"),
        ({"tenant": "local"}, "tenant"),
        ({"tenant": "Ac me"}, "tenant"),
        ({"tenant": "../up"}, "tenant"),
        ({"scopes": ()}, "scopes"),
        ({"scopes": ("infer", "infer")}, "scopes"),
        ({"label": "a\nb"}, "label"),
        ({"label": "x" * 129}, "label"),
        ({"lifetime_s": 0.0}, "expires_in_s"),
        ({"lifetime_s": float("nan")}, "expires_in_s"),
        ({"requests_per_minute": -1}, "requests_per_minute"),
        ({"tokens_per_day": 10**16}, "tokens_per_day"),
    ],
)
def test_a_key_that_cannot_be_is_refused_by_its_field(fields: dict[str, object], param: str) -> None:
    new = NewKey(**({"id": "0" * 16, "sha256": b"", "tenant": "acme", "scopes": ("infer",)} | fields))  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidRequest) as caught:
        new.check()
    assert caught.value.param == param


def test_only_somebody_at_the_machine_may_make_a_key_to_what_was_there_before_keys(tmp_path: Path) -> None:
    new = NewKey(id="0" * 16, sha256=b"", tenant="local", scopes=("infer",))
    assert new.check(operator=True) is new
    with pytest.raises(InvalidRequest):
        NewKey(id="0" * 16, sha256=b"", tenant="shared", scopes=("infer",)).check(operator=True)


def test_keys_and_revocations_are_there_after_the_process_was_killed_right_behind_the_acknowledgement(
    tmp_path: Path,
) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from metasepia.access.keys import NewKey, Report, Spent\n"
        "from metasepia.access.store import KeyStore\n"
        "from metasepia.registry.catalogue import Registry\n"
        "registry = Registry(Path(sys.argv[1]))\n"
        "store = KeyStore(registry.root, registry.epoch)\n"
        "for id_ in ('0' * 16, '1' * 16):\n"
        "    store.create(NewKey(id=id_, sha256=b'h' * 32, tenant='acme', scopes=('infer',)).check())\n"
        "store.revoke('1' * 16)\n"
        "minute = int(store.now()) // 60\n"
        "spent = Spent(key='0' * 16, minute=minute, requests=3, prompt_tokens=5, completion_tokens=7)\n"
        "store.exchange(Report(gateway='g', number=1, spent=(spent,)), None)\n"
        "print('acknowledged', flush=True)\n"
        "sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "acknowledged\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    store = KeyStore(tmp_path, 2)
    live, revoked = store.page()
    assert (live.id, live.revoked_unix_s) == ("0" * 16, None) and revoked.revoked_unix_s is not None
    (line,) = store.usage(0, 10**6, tenant="acme", limit=10)
    assert (line.requests, line.prompt_tokens, line.completion_tokens) == (3, 5, 7)
    (total,) = store.exchange(Report(gateway="h", number=1, spent=()), None).totals
    assert (total.requests, total.tokens) == (3, 12)


def test_a_writer_that_was_followed_by_another_is_refused(tmp_path: Path) -> None:
    before, after = a_store(tmp_path, epoch=1), a_store(tmp_path, epoch=2)
    a_key(after)
    with pytest.raises(Locked):
        a_key(before)


def test_a_damaged_file_is_no_open_door(tmp_path: Path) -> None:
    a_store(tmp_path).close()
    (tmp_path / "keys.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(CorruptArtefact):
        a_store(tmp_path)


def test_the_same_key_sent_again_is_one_key_and_another_secret_under_its_id_is_refused(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    new = NewKey(id="0" * 16, sha256=b"a", tenant="acme", scopes=("infer",))
    assert store.create(new) == store.create(new)
    with pytest.raises(InvalidRequest):
        store.create(NewKey(id="0" * 16, sha256=b"b", tenant="acme", scopes=("infer",)))
    assert len(store.page()) == 1


def test_dead_keys_make_room_and_living_ones_do_not(tmp_path: Path) -> None:
    store = a_store(tmp_path, max_keys=2)
    (_, first), _ = a_key(store), a_key(store)
    with pytest.raises(InvalidRequest, match=r"registry\.max_keys"):
        a_key(store)
    store.revoke(first.id)
    a_key(store)
    assert len(store.page()) == 2
    with pytest.raises(UnknownName):
        store.get(first.id)


# -- who is let in -----------------------------------------------------------------------------------------------------


def test_an_unknown_id_and_a_wrong_secret_are_refused_in_the_same_words_by_the_same_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    store = a_store(tmp_path, clock)
    text, key = a_key(store)
    ring = a_ring(store, clock)
    assert ring.identify(text).id == key.id
    compared: list[tuple[int, int]] = []
    compare = keyring_of.hmac.compare_digest
    monkeypatch.setattr(
        keyring_of.hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or compare(a, b)
    )
    _, other, _ = mint()
    wrong = [
        other,
        f"{text[:21]}{other[21:]}",
        text[:-1],
        text + "x",
        "msk__",
        "",
        "sk-123",
        text.upper(),
        "msk_" * 999,
    ]
    said: set[str] = set()
    for one in wrong:
        with pytest.raises(Unauthenticated) as caught:
            ring.identify(one)
        said.add(str(caught.value))
        assert "this key is not known here" in str(caught.value) and text[21:] not in str(caught.value)
    assert len(said) == 1 and compared == [(32, 32)] * len(wrong)


def test_the_hash_of_nothing_is_nobodys_key() -> None:
    ring = Keyring()
    for text in ("", "msk_" + "0" * 16 + "_" + "A" * 43):
        with pytest.raises(Unauthenticated):
            ring.identify(text)


def test_a_key_opens_nothing_from_its_expiry_on_and_says_so_to_its_owner_alone(tmp_path: Path) -> None:
    clock = Clock()
    store = a_store(tmp_path, clock)
    text, _ = a_key(store, lifetime_s=60.0)
    ring = a_ring(store, clock)
    clock.pass_(59.9)
    assert ring.identify(text)
    clock.pass_(0.2)  # without another word from the registry
    with pytest.raises(Unauthenticated, match="has expired"):
        ring.identify(text)
    with pytest.raises(Unauthenticated, match="not known"):
        ring.identify(text[:-4] + "AAAA")


def test_a_revoked_key_opens_nothing_after_the_next_exchange(tmp_path: Path) -> None:
    clock = Clock()
    store = a_store(tmp_path, clock)
    text, key = a_key(store)
    ring = a_ring(store, clock)
    store.revoke(key.id)
    assert store.revoke(key.id).revoked_unix_s == clock.unix_s
    exchange(ring, store)
    with pytest.raises(Unauthenticated, match="revoked"):
        ring.identify(text)


def test_a_clock_that_jumps_back_brings_no_expired_key_to_life_not_even_in_another_process(tmp_path: Path) -> None:
    clock = Clock()
    store = a_store(tmp_path, clock)
    text, key = a_key(store, lifetime_s=60.0)
    clock.pass_(61)
    store.now()
    clock.unix_s -= 3600
    ring = a_ring(store, clock)
    with pytest.raises(Unauthenticated, match="has expired"):
        ring.identify(text)
    store.close()
    again = a_store(tmp_path, Clock(clock.unix_s), epoch=2)
    assert again.get(key.id).status(again.now()) == "expired"


def test_a_clock_that_was_set_back_goes_on_so_that_windows_end(tmp_path: Path) -> None:
    clock = Clock()
    steady = SteadyClock(0.0, clock.wall, clock.monotonic)
    began = steady.now()
    clock.unix_s -= 10_000
    clock.pass_(90)
    assert steady.now() == pytest.approx(began + 90)
    clock.unix_s += 20_000  # forward again: the machine's clock leads
    assert steady.now() == clock.unix_s


def test_a_gateway_whose_own_time_is_wrong_judges_by_the_registrys(tmp_path: Path) -> None:
    clock, wrong = Clock(), Clock(0.0)
    store = a_store(tmp_path, clock)
    text, _ = a_key(store, lifetime_s=60.0)
    ring = a_ring(store, wrong)
    assert ring.identify(text)
    wrong.pass_(61)
    with pytest.raises(Unauthenticated, match="has expired"):
        ring.identify(text)


# -- quotas ------------------------------------------------------------------------------------------------------------


def test_requests_of_a_minute_are_exact_on_one_gateway_and_begin_anew_with_the_next(tmp_path: Path) -> None:
    clock = Clock(1_700_000_040.0 - 1_700_000_040.0 % 60 + 10)
    store = a_store(tmp_path, clock)
    text, _ = a_key(store, requests_per_minute=3)
    ring = a_ring(store, clock)
    key = ring.identify(text)
    for _ in range(3):
        ring.admit(key)
        exchange(ring, store)
    with pytest.raises(QuotaExceeded, match="3 requests of this minute") as caught:
        ring.admit(key)
    assert caught.value.retry_after_s == pytest.approx(50)
    clock.pass_(50)
    ring.admit(key)


def test_a_request_that_was_not_done_gives_its_place_back_also_after_it_was_told(tmp_path: Path) -> None:
    clock = Clock()
    store = a_store(tmp_path, clock)
    _, key = a_key(store, requests_per_minute=1)
    ring = a_ring(store, clock)
    give_back = ring.admit(key)
    exchange(ring, store)
    give_back()
    ring.admit(key)
    exchange(ring, store)
    assert [one.requests for one in store.usage(0, 10**6, tenant=None, limit=5)] == [1]


def test_tokens_of_a_day_are_counted_over_gateways_and_restarts(tmp_path: Path) -> None:
    clock = Clock()
    store = a_store(tmp_path, clock)
    _, key = a_key(store, tokens_per_day=100)
    one, two = a_ring(store, clock), a_ring(store, clock)
    one.charge(key, 50, 10)
    two.charge(key, 0, 30)
    assert (one.limits(key).remaining_tokens, two.limits(key).remaining_tokens) == (40, 70)
    for ring in (one, two, one):
        exchange(ring, store)
    assert (one.limits(key).remaining_tokens, two.limits(key).remaining_tokens) == (10, 10)
    two.charge(key, 20, 0)
    exchange(two, store)
    store.close()
    store = a_store(tmp_path, clock, epoch=2)  # the registry begins anew, and a gateway that knew nothing
    for ring in (a_ring(store, clock), one):
        exchange(ring, store)
        with pytest.raises(QuotaExceeded, match="100 tokens of this day"):
            ring.admit(key)
    clock.pass_(DAY_S)
    assert one.limits(key).remaining_tokens == 100


def test_a_report_whose_acknowledgement_was_lost_counts_once(tmp_path: Path) -> None:
    clock = Clock()
    store = a_store(tmp_path, clock)
    _, key = a_key(store, tokens_per_day=1000)
    ring = a_ring(store, clock)
    ring.charge(key, 5, 0)
    store.exchange(ring.report(), ring.revision)  # the answer never came
    ring.charge(key, 7, 0)
    for _ in range(3):
        exchange(ring, store)
    assert [one.prompt_tokens for one in store.usage(0, 10**6, tenant=None, limit=5)] == [12]
    assert ring.limits(key).remaining_tokens == 1000 - 12


def test_what_is_used_while_a_report_is_on_its_way_stays_counted(tmp_path: Path) -> None:
    clock = Clock()
    store = a_store(tmp_path, clock)
    _, key = a_key(store, tokens_per_day=1000)
    ring = a_ring(store, clock)
    ring.charge(key, 5, 0)
    changes = store.exchange(ring.report(), ring.revision)
    ring.charge(key, 100, 0)
    ring.take(changes)
    assert ring.limits(key).remaining_tokens == 1000 - 105


def test_a_key_without_limits_has_the_settings_and_zero_means_none(tmp_path: Path) -> None:
    clock = Clock()
    store = a_store(tmp_path, clock)
    (_, plain), (_, free) = a_key(store), a_key(store, requests_per_minute=0)
    ring = a_ring(store, clock, requests_per_minute=7)
    assert ring.limits(plain).requests == 7 and ring.limits(free).requests is None
    assert ring.limits(plain).tokens is None


def test_the_ledger_tells_days_and_keys_of_a_tenant_newest_first(tmp_path: Path) -> None:
    clock = Clock()
    store = a_store(tmp_path, clock)
    (_, mine), (_, theirs) = a_key(store, "acme"), a_key(store, "other")
    ring = a_ring(store, clock)
    for _ in range(2):
        ring.charge(mine, 3, 1)
        ring.charge(theirs, 1000, 0)
        exchange(ring, store)
        clock.pass_(DAY_S)
    today = int(clock.unix_s) // DAY_S
    own = store.usage(0, today, tenant="acme", limit=10)
    assert [(one.day, one.prompt_tokens) for one in own] == [(today - 1, 3), (today - 2, 3)]
    assert len(store.usage(0, today, tenant=None, limit=10)) == 4
    assert len(store.usage(today - 2, today - 2, tenant=None, limit=10)) == 2


def test_spent_of_a_key_that_nobody_has_is_nowhere(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    spent = Spent(key="f" * 16, minute=1, requests=1, prompt_tokens=1, completion_tokens=1)
    assert store.exchange(Report(gateway="g", number=1, spent=(spent,)), None).totals == ()
    assert store.usage(0, 10**6, tenant=None, limit=10) == ()


def test_a_gateway_is_told_only_what_changed(tmp_path: Path) -> None:
    clock = Clock()
    store = a_store(tmp_path, clock)
    for _ in range(50):
        a_key(store)
    ring = a_ring(store, clock)
    assert len(ring) == 50
    _, new = a_key(store)
    changes = store.exchange(ring.report(), ring.revision)
    assert [one.key.id for one in changes.keys] == [new.id] and not changes.whole and changes.totals == ()


def test_a_key_that_there_is_not_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    store = a_store(tmp_path)
    _, key = a_key(store)
    with pytest.raises(UnknownName, match=f"no key named 'zzz'; known: {key.id}"):
        store.get("zzz")
