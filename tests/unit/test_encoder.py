"""Many callers of one encoder: what fusing requests may and may not change. The forwards are counted or held up."""

import asyncio
import io
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from actors.encoder import Encoder, VectorCache
from actors.messages import Media, Texts
from cluster.settings import EncoderSettings
from metasepia.encoders import plan_batches
from metasepia.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    Unavailable,
    UnknownName,
    WindowExceeded,
)
from metasepia.modalities.pixels import PixelEncoder

SETTINGS = EncoderSettings(id="slow", source="none", cache_mib=0.0, max_batch_tokens=64, max_queued_texts=100)


class CountingEncoder:
    """Words are tokens, a word's token is its length, a vector is (number of words, sum of tokens)."""

    digest, width, window, dtype, device, max_batch_tokens = "d" * 64, 2, 20, "float32", "cpu", 64

    def __init__(self) -> None:
        self.forwards: list[list[list[int]]] = []
        self.may_run = threading.Event()
        self.may_run.set()

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        tokens = [[len(word) for word in text.split()] for text in texts]
        for i, ids in enumerate(tokens):
            if len(ids) > self.window:
                raise WindowExceeded(f"texts[{i}]", len(ids), self.window)
        return tokens

    def plan(self, lengths: Sequence[int]) -> list[list[int]]:
        return plan_batches(lengths, self.max_batch_tokens, 4)

    def forward(self, token_ids: Sequence[Sequence[int]]) -> np.ndarray:
        assert self.may_run.wait(10)
        if [13] in token_ids:
            raise RuntimeError("out of memory")
        self.forwards.append([list(ids) for ids in token_ids])
        return np.array([[len(ids), sum(ids)] for ids in token_ids], np.float32)


@pytest.fixture
def counting() -> CountingEncoder:
    return CountingEncoder()


@pytest.fixture
def encoder(counting: CountingEncoder) -> Iterator[Encoder]:
    encoder = Encoder(SETTINGS, counting)  # pyright: ignore[reportArgumentType]
    yield encoder
    counting.may_run.set()
    encoder.stop()


def texts(*texts: str, seconds: float = 10.0) -> Texts:
    return Texts(encoder="d" * 64, texts=texts, deadline_unix_s=time.time() + seconds)


def expected(*texts: str) -> list[list[float]]:
    return [[len(text.split()), len(text.replace(" ", ""))] for text in texts]


async def held(counting: CountingEncoder, encoder: Encoder) -> asyncio.Task:
    """Begins a request whose forward waits for `may_run`; what comes now queues behind it."""
    counting.may_run.clear()
    first = asyncio.create_task(encoder.embed(texts("first")))
    while encoder._inbox or not encoder._num_queued:
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.05)
    return first


def test_requests_that_wait_together_share_forwards_and_get_their_own_vectors(counting, encoder):
    async def scenario():
        first = await held(counting, encoder)
        asked = [("a b", "ccc"), ("dd ee",), ("f", "gg hh", "iii")]
        waiting = [asyncio.create_task(encoder.embed(texts(*some))) for some in asked]
        await asyncio.sleep(0.05)
        counting.may_run.set()
        await first
        for some, vectors in zip(asked, await asyncio.gather(*waiting), strict=True):
            assert vectors.tolist() == expected(*some)

    asyncio.run(scenario())
    assert [len(batch) for batch in counting.forwards] == [1, 6]


def test_tokens_are_counted_whether_or_not_the_cache_answers(counting):
    encoder = Encoder(replace(SETTINGS, cache_mib=1.0), counting)  # pyright: ignore[reportArgumentType]
    for _ in range(2):
        _, num_tokens = asyncio.run(encoder.embed_counted(texts("a b c", "d")))
        assert num_tokens == 4
    encoder.stop()


def test_no_forward_exceeds_the_tokens_of_a_batch(counting, encoder):
    rng = np.random.default_rng(0)
    many = [" ".join(["w"] * n) for n in rng.integers(1, 20, size=90)]
    vectors = asyncio.run(encoder.embed(texts(*many)))
    assert vectors.tolist() == expected(*many)
    assert all(len(batch) * max(map(len, batch)) <= 64 for batch in counting.forwards)


def test_a_short_request_does_not_wait_for_a_long_one(counting, encoder):
    async def scenario():
        first = await held(counting, encoder)
        long = asyncio.create_task(encoder.embed(texts(*["w w w w w w w w"] * 90)))
        await asyncio.sleep(0.01)
        short = asyncio.create_task(encoder.embed(texts("x")))
        await asyncio.sleep(0.05)
        counting.may_run.set()
        await asyncio.gather(first, long, short)

    asyncio.run(scenario())
    when = next(i for i, batch in enumerate(counting.forwards) if [1] in batch)
    assert when <= 4 < len(counting.forwards) - 4


def test_every_request_has_its_turn_when_more_wait_than_a_round_holds(counting, encoder):
    async def scenario():
        first = await held(counting, encoder)
        many = [asyncio.create_task(encoder.embed(texts(*["w " * 20] * 3))) for _ in range(30)]
        await asyncio.sleep(0.05)
        counting.may_run.set()
        for vectors in await asyncio.gather(*many):
            assert vectors.tolist() == expected(*["w " * 20] * 3)
        await first

    asyncio.run(scenario())


def test_a_request_that_cannot_be_answered_fails_alone(counting, encoder):
    async def scenario():
        first = await held(counting, encoder)
        asked = [texts("a"), texts("b", "w " * 21), texts("w" * 13), texts("c c")]
        waiting = [asyncio.create_task(encoder.embed(one)) for one in asked]
        await asyncio.sleep(0.05)
        counting.may_run.set()
        await asyncio.wait(waiting)
        too_long, breaks = waiting[1].exception(), waiting[2].exception()
        assert waiting[0].result().tolist() == expected("a") and waiting[3].result().tolist() == expected("c c")
        assert isinstance(too_long, WindowExceeded) and too_long.param == "texts[1]"
        assert isinstance(breaks, Unavailable) and "out of memory" in str(breaks)
        assert (await first).tolist() == expected("first")

    asyncio.run(scenario())


def test_a_deadline_ends_the_wait_and_spares_the_forward(counting, encoder):
    async def scenario():
        first = await held(counting, encoder)
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="encoder slow did not finish within"):
            await encoder.embed(texts("late late", seconds=0.2))
        assert 0.1 < time.monotonic() - began < 2
        with pytest.raises(DeadlineExceeded):
            await encoder.embed(texts("past", seconds=-1.0))
        counting.may_run.set()
        await first
        await encoder.embed(texts("next"))

    asyncio.run(scenario())
    assert counting.forwards == [[[5]], [[4]]]
    assert encoder.statistics()["queued_texts"] == 0


def test_a_caller_who_left_costs_no_forward(counting, encoder):
    async def scenario():
        first = await held(counting, encoder)
        gone = asyncio.create_task(encoder.embed(texts("gone gone")))
        await asyncio.sleep(0.05)
        gone.cancel()
        await asyncio.sleep(0.01)
        counting.may_run.set()
        await first
        await encoder.embed(texts("next"))

    asyncio.run(scenario())
    assert counting.forwards == [[[5]], [[4]]]


def test_beyond_the_queue_a_request_is_refused_with_the_time_that_the_queue_will_take(counting, encoder):
    async def scenario():
        first = await held(counting, encoder)
        encoder._texts_per_s = 5.0
        filling = asyncio.create_task(encoder.embed(texts(*["w"] * 99)))
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded, match="the queue of encoder slow is full; try again in 20 s"):
            await encoder.embed(texts("one more"))
        counting.may_run.set()
        await asyncio.gather(first, filling)
        await encoder.embed(texts("one more"))
        with pytest.raises(InvalidRequest, match="101 texts; at most 100 at once"):
            await encoder.embed(texts(*["w"] * 101))

    asyncio.run(scenario())


def test_another_encoders_digest_is_refused(encoder):
    with pytest.raises(UnknownName, match=f"no encoder named '0+'; known: {'d' * 64}"):
        asyncio.run(encoder.embed(replace(texts("a"), encoder="0" * 64)))


def test_check_runs_a_real_forward_and_says_when_none_comes_back(counting, encoder):
    asyncio.run(encoder.check())
    asyncio.run(encoder.check())
    assert len(counting.forwards) == 2
    counting.may_run.clear()
    with pytest.raises(Unavailable, match="encoder slow is not available"):
        asyncio.run(encoder.check(timeout_s=0.1))
    counting.may_run.set()
    asyncio.run(encoder.check())
    encoder.stop()
    with pytest.raises(Unavailable):
        asyncio.run(encoder.check())


def test_a_text_seen_before_needs_no_forward(counting):
    encoder = Encoder(replace(SETTINGS, cache_mib=1.0), counting)  # pyright: ignore[reportArgumentType]
    asyncio.run(encoder.embed(texts("a a", "b")))
    assert asyncio.run(encoder.embed(texts("b", "c c c", "a a"))).tolist() == expected("b", "c c c", "a a")
    assert counting.forwards[1:] == [[[1, 1, 1]]]
    assert encoder.statistics()["cache_hits"] == 2
    encoder.stop()


def test_the_cache_holds_its_bytes_and_the_least_recently_used_leave_first():
    one = np.ones(100, np.float32)
    cache = VectorCache(3 * (one.nbytes + VectorCache.ENTRY_BYTES))
    for text in "abc":
        cache.put(text, one)
    assert cache.get("a") is not None
    cache.put("d", one)
    assert [text for text in "abcd" if cache.get(text) is not None] == ["a", "c", "d"]
    assert cache.num_bytes <= cache.max_bytes


def test_the_module_is_imported_without_torch():
    program = "import sys, actors.encoder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2]).returncode == 0


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_pictures_wait_and_fail_as_texts_do():
    noise = np.random.default_rng(0).integers(0, 256, (3, 40, 40), dtype=np.uint8)
    good, other = png(noise[0]), png(noise[1])
    broken = png(noise[2])[:400]  # its header is whole
    encoder = Encoder(EncoderSettings(id="pixels", source="pixels", modality="image"))
    digest = encoder.info().digest

    def ask(*items: bytes, to: str = digest) -> Media:
        return Media(encoder=to, items=items, deadline_unix_s=time.time() + 10)

    async def scenario():
        asked = [asyncio.create_task(encoder.embed(ask(*some))) for some in ((good, other), (good, broken), (other,))]
        await asyncio.wait(asked)
        expected = PixelEncoder().embed([good, other])
        np.testing.assert_allclose(asked[0].result(), expected, atol=1e-6)
        np.testing.assert_allclose(asked[2].result(), expected[1:], atol=1e-6)
        error = asked[1].exception()
        assert isinstance(error, InvalidRequest) and error.param == "items[1]"
        with pytest.raises(InvalidRequest, match="texts: the encoder pixels reads image, not these"):
            await encoder.embed(Texts(encoder=digest, texts=("a",), deadline_unix_s=time.time() + 10))
        await encoder.embed(ask(good))
        await encoder.check()

    asyncio.run(scenario())
    assert encoder.statistics()["cache_hits"] >= 1
    encoder.stop()
