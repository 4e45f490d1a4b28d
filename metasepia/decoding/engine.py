"""One process that decodes rows in continuous batches: the gang's scheduler and decoder without a gang.

For programs that want many rows answered on this machine and need no server: training rollouts, searches, benchmarks.
Rows join and leave between steps, each with its own expert, sampling and seed, as they do on the gang.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import threading
from collections.abc import AsyncGenerator, Callable

import torch
from transformers import PreTrainedModel

from metasepia.decoding.asking import AsksRows
from metasepia.decoding.generation import RowDecoder
from metasepia.decoding.inflight import Answer, Limits, Load
from metasepia.decoding.scheduling import Scheduler
from metasepia.decoding.steps import StepPlan, StepResult
from metasepia.errors import InvalidSettings, MetasepiaError, Unavailable
from metasepia.experts.expert_linear import ExpertLinear
from metasepia.experts.lora import LoraAdapter
from metasepia.experts.svf import ExpertLayers, attach
from metasepia.experts.vectors import ExpertVectors
from metasepia.models.prepared import PreparedBackbone
from metasepia.rows import HiddenStates, Row, Scores, TokenChunk, Want

DEFAULT_LIMITS = Limits(max_rows=16, max_batch_tokens=16_384, max_queued_tokens=1 << 20, max_prefix_tokens=4096)
RETRY_AFTER_S = 1.0


class Engine(AsksRows):
    """A `Backbone` on one model in this process. Rows may be asked for from any number of threads and event loops.

    A thread of its own steps while rows wait, with torch's number of threads as it was when the engine was made; the
    model is the engine's until `close`. A step that raises closes the engine: rows in flight and later ones raise
    Unavailable, whose cause is what the step raised.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prepared: PreparedBackbone,
        *,
        experts: ExpertLayers | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """`experts`: what `svf.attach` made of this model; left out, it is attached here and holds low-rank ones only.

        Raises NotSupported for a model that does not attend, InvalidSettings for one whose layers are not given.
        """
        if experts is None and any(isinstance(module, ExpertLinear) for module in model.modules()):
            raise InvalidSettings("experts", None, "what `svf.attach` gave for this model: it is attached once")
        self.prepared = prepared
        self.experts = attach(model, backbone=prepared.digest) if experts is None else experts
        factors = self.experts.factors_digest
        self._decoder = RowDecoder(model, backbone=prepared.digest, experts=self.experts, factors=factors)
        self._scheduler = Scheduler(self._run, limits, prepared)
        self._model_lock = threading.Lock()  # steps against changes of the expert table
        self._keys = itertools.count()
        self._callers: dict[str, Callable[[Answer], None]] = {}
        self._callers_lock = threading.Lock()
        self._failure: BaseException | None = None
        self._num_threads = torch.get_num_threads()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._step_forever, name="engine", daemon=True)
        self._thread.start()

    # -- life ----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends the thread after the step it is in; rows in flight raise Unavailable. Calling it again does nothing."""
        self._stop.set()
        self._thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def digest(self) -> str:
        return self.prepared.digest

    def load(self) -> Load:
        """What the scheduler holds now."""
        return self._scheduler.load()

    # -- experts -------------------------------------------------------------------------------------------------------

    def put_expert(self, expert: ExpertVectors | LoraAdapter) -> None:
        """Holds an expert from now on. Raises CorruptArtefact when it does not fit the model or its factors."""
        with self._model_lock:
            self.experts.put(expert.digest, expert)

    def drop_expert(self, digest: str) -> None:
        """Forgets an expert; rows in flight that use it raise UnknownName at their next step."""
        with self._model_lock:
            self.experts.drop(digest)

    # -- rows ----------------------------------------------------------------------------------------------------------

    async def _ask(self, row: Row, want: Want) -> AsyncGenerator[TokenChunk | Scores | HiddenStates]:
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[Answer]()
        # Our own name for it: callers may use a request_id twice.
        key = str(next(self._keys))

        def answered(answer: Answer) -> None:
            loop.call_soon_threadsafe(inbox.put_nowait, answer)

        # Known before it is queued: whatever ends the thread then answers it.
        with self._callers_lock:
            self._callers[key] = answered
        finished = False
        try:
            self._submit(dataclasses.replace(row, request_id=key, want=want), answered)
            while not finished:
                answer = await inbox.get()
                finished = not isinstance(answer, TokenChunk) or answer.finish is not None
                if isinstance(answer, MetasepiaError):
                    raise answer from (self._failure if isinstance(answer, Unavailable) else None)
                yield dataclasses.replace(answer, request_id=row.request_id)
        finally:
            with self._callers_lock:
                self._callers.pop(key, None)
            if not finished:
                self._scheduler.cancel(key)

    def _submit(self, row: Row, answered: Callable[[Answer], None]) -> None:
        try:
            self._scheduler.submit(row, answered)
        except Unavailable:
            raise self._unavailable() from self._failure

    def _unavailable(self) -> Unavailable:
        why = f"a step raised {type(self._failure).__name__}: {self._failure}" if self._failure else "closed"
        return Unavailable(f"the engine ({why})", RETRY_AFTER_S)

    # -- the stepping thread -------------------------------------------------------------------------------------------

    def _step_forever(self) -> None:
        torch.set_num_threads(self._num_threads)  # OpenMP's own number belongs to the thread
        try:
            self._scheduler.run_forever(self._stop)
        except BaseException as error:  # whatever it is, the callers must learn of it
            self._failure = error
        with self._callers_lock:
            callers = list(self._callers.values())
        for answered in callers:
            with contextlib.suppress(RuntimeError):  # its event loop is closed
                answered(self._unavailable())

    @torch.inference_mode()
    def _run(self, plan: StepPlan) -> StepResult:
        with self._model_lock:
            return self._decoder.run(plan)
