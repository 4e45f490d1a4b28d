"""An encoder for many callers: requests that wait together share its forwards. A plain class; Serve wraps it.

Texts, pictures and sounds go the same way: an item is tokenised (of media, its header read), waits for its turn by the
tokens that it costs, and is embedded.

No torch until one is made, so that the gateway may import this module.
"""

import contextlib
import hashlib
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence, Sized
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from actors import heap, logs, meters, tracing
from actors.messages import EncoderInfo, Media, Texts
from actors.waiting import answer_within, remaining_s
from cluster.settings import EncoderSettings
from metasepia.errors import (
    DeadlineExceeded,
    InvalidRequest,
    MetasepiaError,
    Overloaded,
    Unavailable,
    UnknownName,
)

if TYPE_CHECKING:
    from metasepia.encoders import TextEncoder
    from metasepia.modalities.media import MediaEncoder

Item = str | bytes
"""A text, or the bytes of a file."""

ROUND_BATCHES = 2
"""Full forwards that one round plans ahead; a request that arrives meanwhile waits for them."""


@dataclass
class _Request:
    """Items that wait; all but `answer` belong to the worker."""

    items: tuple[Item, ...]
    deadline_unix_s: float
    use_cache: bool = True
    traceparent: str | None = None
    arrived_unix_s: float = field(default_factory=time.time)
    begun: bool = False
    """A forward had some of its items."""
    answer: "Future[np.ndarray]" = field(default_factory=Future)
    prepared: Sequence[Sized] = ()
    """Each item as long as it costs in tokens."""
    vectors: np.ndarray | None = None
    pending: list[int] = field(default_factory=list)
    """Items without a vector, the longest last."""
    num_left: int = 0

    def fail(self, error: Exception) -> None:
        with contextlib.suppress(InvalidStateError):  # the caller is gone
            self.answer.set_exception(error)

    def finish(self) -> None:
        assert self.vectors is not None
        with contextlib.suppress(InvalidStateError):
            self.answer.set_result(self.vectors)


class Encoder:
    """Owns one `TextEncoder` or `MediaEncoder` and the thread that runs it.

    Each round takes a share of every waiting request, in turn, and divides it into forwards of least padding: a long
    request delays a short one by a round, not by itself. A request that fails, fails alone.
    """

    def __init__(self, settings: EncoderSettings, encoder: "TextEncoder | MediaEncoder[Any] | None" = None) -> None:
        """`encoder` None loads that of the settings; raises as `TextEncoder.load` and `modalities.loading` do."""
        logs.begin()
        self._settings = settings
        loaded = encoder or _load(settings)
        self._encoder: _Encodes = loaded
        self._probe: Item = getattr(loaded, "probe", "ready?")
        self._cache = VectorCache(int(settings.cache_mib * 2**20))
        self._arrived = threading.Condition()
        self._inbox: list[_Request] = []
        self._num_queued = 0
        self._num_counted = self._num_counted_tokens = 0
        self._texts_per_s: float | None = None
        self._num_texts = self._num_forwards = 0
        self._stopping = False
        self._worker = threading.Thread(target=self._work, name=f"encoder {settings.id}", daemon=True)
        self._worker.start()
        heap.give_back_for_ever()
        meters.SAMPLING.follow(self._tell)

    def _tell(self) -> None:
        meters.ENCODER_QUEUED.set(self._num_queued, encoder=self._settings.id)
        meters.ENCODER_CACHE.set(self._cache.num_bytes, encoder=self._settings.id)

    def info(self) -> EncoderInfo:
        one = self._encoder
        return EncoderInfo(
            id=self._settings.id,
            digest=one.digest,
            width=one.width,
            window=one.window,
            dtype=one.dtype,
            device=one.device,
            modality=self._settings.modality,
        )

    def statistics(self) -> dict[str, float]:
        """Texts (or files) and forwards so far, hits of the cache, texts waiting or running, texts a second of late."""
        return {
            "texts": self._num_texts,
            "forwards": self._num_forwards,
            "cache_hits": self._cache.num_hits,
            "cache_bytes": self._cache.num_bytes,
            "queued_texts": self._num_queued,
            "texts_per_s": self._texts_per_s or 0.0,
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, where the number of replicas is not fixed (`serve.load.autoscaling`)."""
        tokens_a_text = self._num_counted_tokens / self._num_counted if self._num_counted else 32.0
        return {"queued": self._num_queued * tokens_a_text}

    async def embed(self, message: Texts | Media) -> np.ndarray:
        """Unit-norm vectors, float32 [items, width], in the order given.

        Raises UnknownName for another encoder's digest, InvalidRequest (WindowExceeded for a text) naming `texts[i]` or
        `items[i]`, Overloaded when `max_queued_texts` wait, DeadlineExceeded.
        """
        return (await self.embed_counted(message))[0]

    async def embed_counted(self, message: Texts | Media) -> tuple[np.ndarray, int]:
        """`embed`, and the tokens read, special tokens included."""
        if message.encoder != self._encoder.digest:
            raise UnknownName("encoder", message.encoder, (self._encoder.digest,))
        modality = self._settings.modality
        items, name = (message.texts, "texts") if isinstance(message, Texts) else (message.items, "items")
        if isinstance(message, Texts) != (modality == "text"):
            raise InvalidRequest(name, f"the encoder {self._settings.id} reads {modality}, not these")
        num_items, limit = len(items), self._settings.max_queued_texts
        if num_items > limit:
            raise InvalidRequest(name, f"{num_items} {name}; at most {limit} at once")
        if self._num_queued + num_items > limit:
            raise Overloaded(f"the queue of encoder {self._settings.id}", self._retry_after_s())
        request = _Request(items, message.deadline_unix_s, traceparent=message.traceparent)
        vectors = await self._ask(request)
        num_tokens = sum(map(len, request.prepared))
        self._num_counted += num_items
        self._num_counted_tokens += num_tokens
        return vectors, num_tokens

    async def check(self, timeout_s: float = 10.0) -> None:
        """One real forward, past queue limit and cache. Raises Unavailable when none comes back."""
        try:
            vectors = await self._ask(_Request((self._probe,), time.time() + timeout_s, use_cache=False))
        except DeadlineExceeded:
            raise Unavailable(f"encoder {self._settings.id}", 1.0) from None
        if not np.isfinite(vectors).all():
            raise Unavailable(f"encoder {self._settings.id} (its vectors are not finite)", 60.0)

    def stop(self) -> None:
        """Ends the worker; what waits fails with Unavailable."""
        with self._arrived:
            self._stopping = True
            self._arrived.notify()
        self._worker.join()

    async def _ask(self, request: _Request) -> np.ndarray:
        if not self._worker.is_alive():
            raise Unavailable(f"encoder {self._settings.id}", 1.0)
        timeout_s = remaining_s(request.deadline_unix_s, f"encoder {self._settings.id}")
        self._num_queued += len(request.items)
        try:
            with self._arrived:
                self._inbox.append(request)
                self._arrived.notify()
            return await answer_within(request.answer, timeout_s, f"encoder {self._settings.id}")
        finally:
            self._num_queued -= len(request.items)

    def _retry_after_s(self) -> float:
        """How long the texts that wait now will take, at the speed last measured; from 1 to 60."""
        return min(60.0, max(1.0, self._num_queued / self._texts_per_s)) if self._texts_per_s else 1.0

    def _work(self) -> None:
        _limit_threads(self._settings.threads)  # OpenMP keeps this for each thread
        waiting: deque[_Request] = deque()
        while True:
            with self._arrived:
                while not (self._inbox or waiting or self._stopping):
                    self._arrived.wait()
                arrived, self._inbox = self._inbox, []
                if self._stopping:
                    for request in (*waiting, *arrived):
                        request.fail(Unavailable(f"encoder {self._settings.id}", 1.0))
                    return
            waiting.extend(request for request in arrived if self._admit(request))
            for request in waiting:
                if request.deadline_unix_s <= time.time():
                    request.fail(DeadlineExceeded(f"encoder {self._settings.id}", 0.0))
            alive = [request for request in waiting if not request.answer.done()]
            num_served = self._round(alive)
            # Those served go behind those that the round's budget did not reach.
            waiting = deque(r for r in (*alive[num_served:], *alive[:num_served]) if not r.answer.done())

    def _admit(self, request: _Request) -> bool:
        """Tokenises a request and answers what the cache holds; whether a forward is needed."""
        try:
            request.prepared = self._encoder.tokenize(request.items)
        except MetasepiaError as error:
            request.fail(error)
            return False
        except Exception as error:  # a tokenizer's or decoder's own failure must not take the worker with it
            name = "texts" if self._settings.modality == "text" else "items"
            request.fail(InvalidRequest(name, f"the tokenizer refuses them ({error})"))
            return False
        request.vectors = np.empty((len(request.items), self._encoder.width), np.float32)
        for i, item in enumerate(request.items):
            known = self._cache.get(item) if request.use_cache else None
            if known is None:
                request.pending.append(i)
            else:
                request.vectors[i] = known
        lengths = [len(one) for one in request.prepared]
        request.pending.sort(key=lambda i: lengths[i])
        request.num_left = len(request.pending)
        meters.ENCODER_ITEMS.inc(len(lengths) - request.num_left, encoder=self._settings.id, source="cache")
        if not request.pending:
            request.finish()
        return bool(request.pending)

    def _round(self, requests: Sequence[_Request]) -> int:
        """Embeds a share of each request, as far as the round's tokens go; how many requests had one."""
        budget = ROUND_BATCHES * self._encoder.max_batch_tokens
        chosen: list[tuple[_Request, int, Sized]] = []
        num_served = 0
        for request in requests:
            share = budget // (len(requests) - num_served)  # what earlier requests did not use passes to later ones
            num_served += 1
            taken = 0
            while request.pending and (taken == 0 or taken + len(request.prepared[request.pending[-1]]) <= share):
                i = request.pending.pop()
                chosen.append((request, i, request.prepared[i]))
                taken += len(request.prepared[i])
            budget -= taken
            if budget <= 0:
                break
        began_s = time.monotonic()
        for group in self._encoder.plan([len(one) for _, _, one in chosen]):
            self._forward([chosen[i] for i in group])
        if chosen:
            speed = len(chosen) / max(time.monotonic() - began_s, 1e-6)
            self._texts_per_s = speed if self._texts_per_s is None else 0.8 * self._texts_per_s + 0.2 * speed
        return num_served

    def _forward(self, group: Sequence[tuple[_Request, int, Sized]]) -> None:
        began_unix_s = time.time()
        try:
            vectors = self._encoder.forward([one for _, _, one in group])
        except Exception as error:
            # Out of memory, or a file whose body is broken: halves may fit, and one that fails alone fails nobody else.
            if len(group) > 1:
                self._forward(group[: len(group) // 2])
                self._forward(group[len(group) // 2 :])
            elif isinstance(error, InvalidRequest):
                group[0][0].fail(error)
            else:
                group[0][0].fail(Unavailable(f"encoder {self._settings.id} ({error})", 1.0))
            return
        self._num_forwards += 1
        self._num_texts += len(group)
        self._measure(group, began_unix_s)
        for (request, i, _), vector in zip(group, vectors, strict=True):
            assert request.vectors is not None
            request.vectors[i] = vector
            request.num_left -= 1
            if request.use_cache:
                self._cache.put(request.items[i], vector)
            if request.num_left == 0:
                request.finish()

    def _measure(self, group: Sequence[tuple[_Request, int, Sized]], began_unix_s: float) -> None:
        """A forward that went well."""
        id_, now, lengths = self._settings.id, time.time(), [len(one) for _, _, one in group]
        meters.ENCODER_FORWARD.observe(now - began_unix_s, encoder=id_)
        meters.ENCODER_BATCH.observe(len(group), encoder=id_)
        meters.ENCODER_ITEMS.inc(len(group), encoder=id_, source="forward")
        meters.BATCH_TOKENS.inc(sum(lengths), part="encoder", model=id_, what="used")
        padding = len(lengths) * max(lengths) - sum(lengths)
        meters.BATCH_TOKENS.inc(padding, part="encoder", model=id_, what="padding")
        for request, _, _ in group:
            if not request.begun:
                request.begun = True
                meters.ENCODER_QUEUE.observe(began_unix_s - request.arrived_unix_s, encoder=id_)
                tracing.record("encoder queue", request.traceparent, request.arrived_unix_s, began_unix_s, encoder=id_)
        traced = [request.traceparent for request, _, _ in group]
        tracing.batch("encoder", traced, began_unix_s, now, encoder=id_, items=len(group))


class _Encodes(Protocol):
    """What a text encoder and a media encoder have in common: all that the worker needs."""

    digest: str
    width: int
    window: int
    dtype: str
    device: str
    max_batch_tokens: int

    def tokenize(self, items: Sequence[Any], /) -> Sequence[Sized]: ...
    def plan(self, lengths: Sequence[int]) -> list[list[int]]: ...
    def forward(self, prepared: Sequence[Any], /) -> np.ndarray: ...


def _load(settings: EncoderSettings) -> "TextEncoder | MediaEncoder[Any]":
    source, device, modality = settings.source, settings.device, settings.modality
    if modality == "text":
        from metasepia.encoders import TextEncoder

        _limit_threads(settings.threads)
        return TextEncoder.load(source, device, max_batch_tokens=settings.max_batch_tokens)
    from metasepia.modalities import loading

    return loading.load(modality, source, device, max_batch_tokens=settings.max_batch_tokens)


def _limit_threads(num_threads: int) -> None:
    """Of torch, where something imported it: an encoder of pixels does without."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(num_threads)


class VectorCache:
    """Vectors of one encoder by the sha256 of their item; the least recently used leave when `max_bytes` are full."""

    ENTRY_BYTES = 400
    """What Python keeps for an entry beside its vector's numbers, about."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes, self.num_hits = max_bytes, 0, 0
        self._vectors: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def get(self, item: Item) -> np.ndarray | None:
        key = _key(item)
        vector = self._vectors.get(key)
        if vector is not None:
            self._vectors.move_to_end(key)
            self.num_hits += 1
        return vector

    def put(self, item: Item, vector: np.ndarray) -> None:
        key = _key(item)
        if key not in self._vectors:
            self._vectors[key] = vector.copy()  # a view would keep the whole batch
            self.num_bytes += vector.nbytes + self.ENTRY_BYTES
        while self.num_bytes > self.max_bytes:
            _, dropped = self._vectors.popitem(last=False)
            self.num_bytes -= dropped.nbytes + self.ENTRY_BYTES


def _key(item: Item) -> bytes:
    return hashlib.sha256(item.encode() if isinstance(item, str) else item).digest()
