"""Answers that were paid for: kept through kills, shared between processes, and never trusted when damaged."""

import asyncio
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from metasepia.blackbox import cache as caches
from metasepia.blackbox.cache import AnswerCache, Kept
from metasepia.blackbox.errors import CacheFailed
from metasepia.blackbox.openai import OpenAIEndpoint
from metasepia.blackbox.prompts import Prompt
from metasepia.blackbox.settings import EndpointSettings
from metasepia.embedding.answers import Answers
from metasepia.errors import InvalidSettings, Locked
from tests.endpoint import Endpoint, Http

ROOT = Path(__file__).parents[2]
TEXTS = [f"text number {i}" for i in range(30)]
OPEN = Prompt(template="Review: {text}", max_tokens=8)
CHILD = """
import asyncio, sys
from metasepia.blackbox.cache import AnswerCache
from metasepia.blackbox.openai import OpenAIEndpoint
from metasepia.blackbox.prompts import Prompt
from metasepia.blackbox.settings import EndpointSettings
url, path = sys.argv[1:]
settings = EndpointSettings(base_url=url, model="tiny", concurrency=4, request_timeout_s=60.0)
box = OpenAIEndpoint(settings, Prompt(template="Review: {text}", max_tokens=8), AnswerCache(path))
answers = asyncio.run(box.answer([f"text number {i}" for i in range(30)]))
print(answers.digest)
"""


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def child(url: str, path: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, url, str(path)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answered(url: str, cache: AnswerCache, texts: list[str] = TEXTS, **settings: Any) -> Answers:
    box = OpenAIEndpoint(EndpointSettings(base_url=url, model="tiny", **settings), OPEN, cache)
    return asyncio.run(box.answer(texts))


def kept(item: str, value: object = "a", identity: str = "[null,null]", created: float = 0.0) -> Kept:
    return Kept(item=item, identity=identity, value=value, created_unix_s=created)


def test_what_is_put_comes_back_in_order_of_time_and_by_who_answered(tmp_path: Path):
    path = tmp_path / "answers.sqlite"
    with AnswerCache(path) as cache:
        cache.put("box", [kept("b", {"x": [1.5, None]}, created=2.0), kept("a", "ä\n", created=1.0)])
        cache.put("box", [kept("a", "other", identity='["m",null]', created=3.0)])
        cache.put("another box", [kept("a", "not mine")])
    with AnswerCache(path) as again:
        found = again.get("box", ["a", "b", "c", "a"])
    assert [(one.item, one.value) for one in found] == [("a", "ä\n"), ("b", {"x": [1.5, None]}), ("a", "other")]


def test_thousands_of_items_are_found_at_once():
    cache = AnswerCache(None)
    cache.put("box", [kept(f"{i}", i) for i in range(3000)])
    assert sum(one.value for one in cache.get("box", [f"{i}" for i in range(4000)])) == sum(range(3000))


def test_a_killed_run_goes_on_and_nothing_is_paid_twice(tmp_path: Path):
    """The endpoint answers 12 requests and then holds its breath: what is in flight is not paid for when the process
    is killed.
    """
    breath = threading.Event()

    def hold(count: int, body: dict[str, Any]) -> None:
        if count >= 12:
            breath.wait(30)

    path = tmp_path / "answers.sqlite"
    with Endpoint(behave=hold) as endpoint:
        process = child(endpoint.url, path)
        give_up = time.monotonic() + 60
        while len(endpoint.requests) < 16:  # four in flight, so all twelve before are kept
            assert time.monotonic() < give_up
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        endpoint.behave = lambda count, body: None
        paid = sum(endpoint.answered.values())
        assert paid == 12
        with AnswerCache(path) as cache:
            assert len(answered(endpoint.url, cache).replies) == 30
            assert cache.damaged == 0
        requests = len(endpoint.requests)
        assert requests == 16 + 18
        breath.set()
        time.sleep(0.1)
    # What was in flight at the kill is answered to nobody now; every other text was answered once.
    assert sum(endpoint.answered.values()) <= 30 + 4
    assert requests - 4 == 30


def test_a_run_killed_at_any_moment_leaves_whole_answers(tmp_path: Path):
    """No breath held: the kill falls where it falls. At most what was in flight is paid for again."""
    path = tmp_path / "answers.sqlite"
    with Endpoint(behave=lambda count, body: time.sleep(0.02)) as endpoint:
        for stop_at in (5, 13):
            process = child(endpoint.url, path)
            give_up = time.monotonic() + 60
            while len(endpoint.requests) < stop_at and process.poll() is None:
                assert time.monotonic() < give_up
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        with AnswerCache(path) as cache:
            whole = answered(endpoint.url, cache)
            assert cache.damaged == 0
        with AnswerCache(None) as fresh:
            assert answered(endpoint.url, fresh).digest == whole.digest
    assert len(endpoint.requests) <= 30 + 2 * 4 + 30


def test_processes_that_ask_the_same_pay_once(tmp_path: Path):
    with Endpoint(behave=lambda count, body: time.sleep(0.01)) as endpoint:
        both = [child(endpoint.url, tmp_path / "answers.sqlite") for _ in range(2)]
        outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert set(endpoint.answered.values()) == {1}


def test_many_that_open_a_new_file_at_once_all_have_it(tmp_path: Path):
    for attempt in range(10):
        path, ready = tmp_path / f"answers-{attempt}.sqlite", threading.Barrier(6)

        def opened(path: Path = path, ready: threading.Barrier = ready) -> None:
            ready.wait(10)
            AnswerCache(path).close()

        with ThreadPoolExecutor(6) as pool:
            for one in [pool.submit(opened) for _ in range(6)]:
                one.result(60)


def test_tasks_that_ask_the_same_pay_once(tmp_path: Path):
    async def both(box: OpenAIEndpoint) -> list[Answers]:
        return await asyncio.gather(*(box.answer(TEXTS[begin : begin + 20]) for begin in (0, 10, 5)))

    with (
        Endpoint(behave=lambda count, body: time.sleep(0.01)) as endpoint,
        AnswerCache(tmp_path / "answers.sqlite") as cache,
    ):
        box = OpenAIEndpoint(EndpointSettings(base_url=endpoint.url, model="tiny"), OPEN, cache)
        first, second, third = asyncio.run(both(box))
    assert first.replies[10:] == second.replies[:10]
    assert third.replies[:15] == first.replies[5:]
    assert len(endpoint.requests) == 30


def test_what_one_run_tries_the_endpoint_with_another_does_not_pay_for(tmp_path: Path):
    """The first request of the second run, which finds out how to ask, is the slowest of all."""
    probed = TEXTS[10]

    def behave(count: int, body: dict[str, Any]) -> None:
        time.sleep(1.0 if probed in str(body) else 0.0)

    async def both(box: OpenAIEndpoint) -> list[Answers]:
        return await asyncio.gather(*(box.answer(TEXTS[begin : begin + 20]) for begin in (0, 10)))

    with Endpoint(behave=behave) as endpoint, AnswerCache(tmp_path / "answers.sqlite") as cache:
        box = OpenAIEndpoint(EndpointSettings(base_url=endpoint.url, model="tiny"), OPEN, cache)
        first, second = asyncio.run(both(box))
    assert first.replies[10:] == second.replies[:10]
    assert len(endpoint.requests) == 30


def test_a_run_that_fails_leaves_its_texts_to_whoever_waits_for_them():
    async def run(failing: OpenAIEndpoint, other: OpenAIEndpoint) -> list[Any]:
        return list(await asyncio.gather(failing.answer(TEXTS[:4]), other.answer(TEXTS[:4]), return_exceptions=True))

    def refuse_first(count: int, body: dict[str, Any]) -> Any:
        return Http(401, "no", delay_s=0.1) if count == 0 else None

    with Endpoint(behave=refuse_first) as endpoint, AnswerCache(None) as cache:
        boxes = [
            OpenAIEndpoint(EndpointSettings(base_url=endpoint.url, model="tiny", concurrency=1), OPEN, cache)
            for _ in range(2)
        ]
        first, second = asyncio.run(asyncio.wait_for(run(*boxes), 30))
    assert isinstance(first, Exception) or isinstance(second, Exception)
    assert sum(isinstance(one, Answers) for one in (first, second)) == 1


def test_a_damaged_answer_is_asked_again_and_mended(tmp_path: Path):
    path = tmp_path / "answers.sqlite"
    with Endpoint() as endpoint:
        with AnswerCache(path) as cache:
            whole = answered(endpoint.url, cache, TEXTS[:5])
        with sqlite3.connect(path) as db:
            forge = "UPDATE answers SET value = '\"forged\"' WHERE item = (SELECT min(item) FROM answers)"
            changed = db.execute(forge).rowcount
        db.close()
        assert changed == 1
        with AnswerCache(path) as cache:
            assert answered(endpoint.url, cache, TEXTS[:5]).digest == whole.digest
            assert cache.damaged > 0
        with AnswerCache(path) as cache:
            answered(endpoint.url, cache, TEXTS[:5])
            assert cache.damaged == 0
    assert len(endpoint.requests) == 6


def test_an_answer_moved_to_another_question_is_not_believed(tmp_path: Path):
    path = tmp_path / "answers.sqlite"
    with AnswerCache(path) as cache:
        cache.put("box", [kept("question")])
    with sqlite3.connect(path) as db:
        db.execute("UPDATE answers SET item = 'another'")
    db.close()
    with AnswerCache(path) as cache:
        assert cache.get("box", ["another"]) == []
        assert cache.damaged == 1


def test_a_full_disk_ends_the_run_in_words_and_keeps_what_was_answered(tmp_path: Path):
    """SQLite's own limit on pages raises what a full disk raises."""
    path = tmp_path / "answers.sqlite"
    long = "word " * 2000
    with Endpoint(say=lambda before, seed: long) as endpoint:
        with AnswerCache(path) as cache:
            cache._db.execute("PRAGMA max_page_count = 20")
            with pytest.raises(CacheFailed, match=r"the disk is full. What was answered before is kept") as raised:
                answered(endpoint.url, cache, concurrency=1)
        assert str(path) in str(raised.value)
        paid = len(endpoint.requests)
        assert 1 < paid < 30
        with AnswerCache(path) as cache:
            answered(endpoint.url, cache)
    assert len(endpoint.requests) == 30 + 1  # the one that could not be kept


def test_a_cache_that_cannot_be_written_is_told_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "a file"
    folder.write_text("not a directory")
    with pytest.raises(CacheFailed, match="cannot be used: "):
        AnswerCache(folder / "answers.sqlite")
    path = tmp_path / "answers.sqlite"
    AnswerCache(path).close()
    # The superuser, whom tests may run as, can write anywhere: SQLite is told to open read-only instead.
    connect = sqlite3.connect
    monkeypatch.setattr(caches.sqlite3, "connect", lambda file, **kw: connect(f"file:{file}?mode=ro", uri=True, **kw))
    with pytest.raises(CacheFailed, match="it is read-only; choose a file that can be written"):
        AnswerCache(path)


@pytest.mark.parametrize(
    "content", [b"these are no answers at all, only text" * 100, b"SQLite format 3\0" + b"x" * 5000]
)
def test_a_file_that_is_something_else_is_refused_and_left_as_it_was(tmp_path: Path, content: bytes):
    path = tmp_path / "answers.sqlite"
    path.write_bytes(content)
    with pytest.raises(CacheFailed, match=r"answers\.sqlite (is|cannot)"):
        AnswerCache(path)
    assert path.read_bytes() == content


def test_another_programs_database_is_refused(tmp_path: Path):
    path = tmp_path / "registry.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE entries (id INTEGER)")
    db.close()
    with pytest.raises(CacheFailed, match="a database of something else"):
        AnswerCache(path)


def test_a_network_filesystem_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def check(root: Path) -> None:
        raise InvalidSettings("home", str(root), "on a local disk; /mnt is a network filesystem (nfs4)")

    monkeypatch.setattr(caches, "check_local_disk", check)
    with pytest.raises(InvalidSettings, match=r"setting cache = .* network filesystem \(nfs4\)"):
        AnswerCache(tmp_path / "answers.sqlite")


def test_a_black_box_that_another_process_asks_is_waited_for_and_then_told(tmp_path: Path):
    async def hold(cache: AnswerCache, patience_s: float) -> None:
        async with cache.asking("box", patience_s):
            pass

    async def both() -> None:
        first, second = AnswerCache(tmp_path / "answers.sqlite"), AnswerCache(tmp_path / "answers.sqlite")
        async with first.asking("box", 1.0), first.asking("box", 1.0), second.asking("another", 0.0):
            with pytest.raises(Locked, match=rf"is held by process {os.getpid()}, which asks the same black box"):
                await hold(second, 0.2)
        await hold(second, 0.0)

    asyncio.run(both())


def test_a_copied_cache_is_a_cache(tmp_path: Path):
    with Endpoint() as endpoint:
        with AnswerCache(tmp_path / "answers.sqlite") as cache:
            answered(endpoint.url, cache, TEXTS[:3])
        shutil.copy(tmp_path / "answers.sqlite", tmp_path / "copy.sqlite")
        with AnswerCache(tmp_path / "copy.sqlite") as cache:
            answered(endpoint.url, cache, TEXTS[:3])
    assert len(endpoint.requests) == 3


def test_what_is_forgotten_is_asked_again():
    with Endpoint() as endpoint, AnswerCache(None) as cache:
        answered(endpoint.url, cache, TEXTS[:3])
        box = OpenAIEndpoint(EndpointSettings(base_url=endpoint.url, model="tiny"), OPEN, cache).box
        assert cache.forget(box) == 3
        answered(endpoint.url, cache, TEXTS[:3])
    assert len(endpoint.requests) == 6
