"""One tensor-parallel rank of a gang: process group, its share of the weights, expert layers, decoder.

A process lives through `warm` (imports, and files brought into memory: all that is the same for any rank of any gang,
so a spare may do it ahead) and `join` (process group, its share of the weights, experts: once, because DeepSpeed's
state belongs to the process).
Rank 0 then schedules: its thread plans a step, sends the plan to its peers as a message, and runs it; a rank without a
plan sits in no collective. torch and DeepSpeed are imported inside the methods, so a gang's owner needs neither.
"""

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorClass

from actors import logs
from actors.messages import News
from actors.processes import Identity, Joined, Pulse, process_state
from actors.row_meters import RowMeters
from cluster.settings import BackboneSettings
from metasepia.decoding.steps import StepPlan, StepResult
from metasepia.digests import short
from metasepia.errors import CorruptArtefact, MetasepiaError
from metasepia.models.prepared import PreparedBackbone
from metasepia.rows import Row

if TYPE_CHECKING:
    import torch

    from metasepia.decoding.inflight import Answer, Limits, Load
    from metasepia.decoding.leases import Moves
    from metasepia.decoding.scheduling import Scheduler
    from metasepia.experts.factors import FactorSet
    from metasepia.experts.held import PreparedExpert
    from metasepia.models.shards import LayerShard

OWNER_CHECK_S = 0.5


class BackboneShard:
    """One rank. Calls of one concurrency group run one after another; `pulse` answers while a step runs."""

    def __init__(self, settings: BackboneSettings, prepared: PreparedBackbone, home: str, owner: Identity) -> None:
        logs.begin()
        self._settings, self._prepared, self._home = settings, prepared, Path(home)
        self._seconds: dict[str, float] = {}
        self._lock = threading.Lock()  # the decoder and the expert table: steps against pin_expert
        self._progress, self._busy = 0, False
        self._failed: str | None = None
        self._scheduler: Scheduler | None = None
        """Rank 0's."""
        self._last_step = -1
        self._peers: list[Any] = []
        self._answers: list[tuple[str, Answer]] = []
        self._moves: list[Moves] = []
        self._aside: dict[str, PreparedExpert] = {}
        """Experts by digest, checked and ready, that a plan will name."""
        self._answered = threading.Condition()
        self._store: Any = None
        threading.Thread(target=self._die_with, args=(owner,), daemon=True).start()

    # -- life ----------------------------------------------------------------------------------------------------------

    @ray.method(concurrency_group="pulse")
    def identity(self) -> Identity:
        return Identity.mine()

    @ray.method(concurrency_group="pulse")
    def pulse(self) -> Pulse:
        return Pulse(progress=self._progress, busy=self._busy, failed=self._failed)

    def _die_with(self, owner: Identity) -> None:
        """Ray ends the actors of a dead owner too, in its own time; a rank without owner only holds memory."""
        if owner.node != ray.get_runtime_context().get_node_id():
            return
        while process_state(owner.pid)[1] == owner.start_ticks and process_state(owner.pid)[0] not in "ZX":
            time.sleep(OWNER_CHECK_S)
        os._exit(1)

    # -- start ---------------------------------------------------------------------------------------------------------

    def warm(self) -> None:
        """Imports, the factors if nobody has made them, and the files brought into memory by the kernel.

        No weights: a rank's share follows from its place in the gang. Calling it again does nothing.
        """
        if "files" in self._seconds:
            return
        begin = time.monotonic()
        import torch

        from actors import heap, tensor_parallel
        from metasepia import stored
        from metasepia.experts import factors

        tensor_parallel.load()
        heap.give_back_for_ever()
        torch.set_num_threads(self._settings.threads)
        torch.set_grad_enabled(False)
        self._seconds["imports"] = time.monotonic() - begin
        stored.read_ahead(stored.weight_files(Path(self._prepared.path)))
        self._factors: FactorSet | None = None
        if self._settings.expert_layers:
            # Made here if nobody has, of the weights in fp32 whatever dtype runs. Mapped: not in memory yet.
            self._factors = factors.factors_of_backbone(
                self._prepared,
                self._settings.expert_layers,
                self._home,
                rank=self._settings.expert_rank,
                progress=False,
            )
        self._seconds["files"] = time.monotonic() - begin - self._seconds["imports"]

    def _own_factors(self, shards: "dict[str, LayerShard]", device: "torch.device") -> "FactorSet | None":
        """The factors as this rank holds them: of what is cut, rounded or elsewhere only its own part is ever read."""
        import torch

        from metasepia.experts.factors import cut_factors

        settings, whole = self._settings, self._factors
        if whole is None or (settings.tp_size == 1 and device.type == "cpu" and settings.dtype == "float32"):
            return whole
        self._factors = None
        return cut_factors(
            whole.digest,
            whole.backbone,
            self._home,
            {name: cut for name, cut in shards.items() if name in whole.factors},
            rank=settings.expert_rank,
            dtype=getattr(torch, settings.dtype),
            device=device,
        )

    def open_store(self, address: str) -> int:
        """Rank 0: opens the store at which the gang meets, on a port that the kernel chooses, and returns the port."""
        import socket
        from datetime import timedelta

        from torch.distributed import TCPStore

        listening = socket.create_server((address, 0))  # left to itself the store would listen on every interface
        port = listening.getsockname()[1]
        self._store = TCPStore(
            address,
            port,
            self._settings.tp_size,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=self._settings.start_timeout_s),
            master_listen_fd=listening.detach(),
        )
        return int(port)

    def join(self, tp_rank: int, address: str, port: int, peers: list[Any], limits: "Limits") -> Joined:
        """Becomes rank `tp_rank` of a new gang that meets at address:port. `peers`: rank 0 only, the other ranks."""
        import torch

        from actors import tensor_parallel
        from metasepia.decoding.generation import RowDecoder
        from metasepia.experts.svf import attach

        begin = time.monotonic()
        settings, world = self._settings, self._settings.tp_size
        device = torch.device(settings.device, 0) if settings.device == "cuda" else torch.device("cpu")
        if world > 1:
            timeout_s = settings.collective_timeout_s
            tensor_parallel.join_process_group(
                tp_rank, world, address, port, timeout_s, settings.device, store=self._store
            )
        self._seconds["group"] = time.monotonic() - begin
        model = tensor_parallel.load_shard(self._prepared, world, getattr(torch, settings.dtype), device)
        reduce, all_reduce = tensor_parallel.choose_all_reduce(
            tp_rank, world, settings.collective_timeout_s, settings.device
        )
        shards = tensor_parallel.layer_shards(model)
        shapes = {name: tuple(model.get_parameter(name).shape) for name in shards}
        factors = self._own_factors(shards, device)
        if factors is not None:
            tensor_parallel.check_cuts(model, factors, shards)
        # Without factors too: low-rank adapters need none.
        experts = attach(model, factors, shards, reduce, backbone=self._prepared.digest)
        for block in _blocks(model):
            # Its MLP where it has one: that is a module's call in a fused forward too.
            getattr(block, "mlp", block).register_forward_hook(self._count)
        self._experts = experts
        self._decoder = RowDecoder(
            model,
            backbone=self._prepared.digest,
            experts=experts,
            factors=factors.digest if factors else None,
            tp_size=world,
            chooses=tp_rank == 0,
            shards=shards,
            reduce=reduce,
        )
        self._seconds["shard"] = time.monotonic() - begin - self._seconds["group"]
        if tp_rank == 0:
            self._schedule(peers, limits, factors.digest if factors else None)
        return Joined(
            tp_rank=tp_rank,
            tp_world_size=tensor_parallel.tp_world_size(model),
            group_timeout_s=tensor_parallel.group_timeout_s(settings.device) if world > 1 else None,
            shard_shapes=shapes,
            partition_sizes={name: one.sizes for name, one in shards.items()},
            all_reduce=all_reduce,
            factors=factors.digest if factors else None,
            seconds=dict(self._seconds),
        )

    def _count(self, *_: object) -> None:
        self._progress += 1

    # -- steps ---------------------------------------------------------------------------------------------------------

    def step(self, plan: StepPlan) -> None:
        """Peers: runs a step that rank 0 planned. Steps arrive in the order in which rank 0 sent them."""
        self._run(plan)

    @ray.method(concurrency_group="experts")
    def put_expert(self, digest: str, blob: bytes) -> None:
        """Puts an expert aside, ready for the plan that learns it; steps go on meanwhile. Rank 0 is given it last.

        CorruptArtefact when the bytes are not this expert of this backbone.
        """
        expert = self._prepare_expert(digest, blob)
        self._aside[digest] = expert
        if self._scheduler is not None:
            self._scheduler.expert_arrived(digest, expert.num_bytes)

    @ray.method(concurrency_group="experts")
    def take_back_expert(self, digest: str) -> None:
        """Forgets what was put aside and no plan has learnt."""
        self._aside.pop(digest, None)

    def pin_expert(self, digest: str, blob: bytes) -> None:
        """Before the first row: holds an expert for good, and rebuilds its weights. Raises as `put_expert` does."""
        expert = self._prepare_expert(digest, blob)
        if expert.num_bytes > self._settings.max_expert_bytes:
            raise CorruptArtefact(
                f"expert {short(digest)}",
                f"it takes {expert.num_bytes / 2**20:.3g} MiB and max_expert_mib is {self._settings.max_expert_mib:g}",
            )
        with self._lock:
            self._experts.insert(digest, expert)
            self._experts.pin(((digest, 1.0),))
        if self._scheduler is not None:
            self._scheduler.expert_pinned(digest, expert.num_bytes)

    def _prepare_expert(self, digest: str, blob: bytes) -> "PreparedExpert":
        from metasepia.experts.lora import read_adapter

        return self._experts.prepare(digest, read_adapter(blob, f"expert {short(digest)}"))

    def _change_experts(self, plan: StepPlan) -> None:
        """What the plan says, on each rank between the same two steps. What it learns is aside: rank 0 knows."""
        for digest in plan.forget:
            self._experts.drop(digest)
        for digest in plan.learn:
            self._experts.insert(digest, self._aside.pop(digest))

    def _run(self, plan: StepPlan) -> StepResult:
        import torch

        self._busy = True
        try:
            if plan.step <= self._last_step:
                raise RuntimeError(f"it came after step {self._last_step}")
            self._last_step = plan.step
            with self._lock:
                self._change_experts(plan)
                with torch.inference_mode():
                    return self._decoder.run(plan)
        except BaseException as error:
            self._fail(f"step {plan.step}: {type(error).__name__}: {error}")
            # Builtin on purpose: unpickling a class of torch would make the owner import torch first.
            raise RuntimeError(self._failed) from None
        finally:
            self._busy = False

    def _fail(self, reason: str) -> None:
        with self._answered:
            self._failed = self._failed or reason
            self._answered.notify_all()

    # -- rank 0 --------------------------------------------------------------------------------------------------------

    def _schedule(self, peers: list[Any], limits: "Limits", factors: str | None) -> None:
        from metasepia.decoding.leases import Leases
        from metasepia.decoding.scheduling import Scheduler
        from metasepia.experts.vectors import ExpertVectors

        self._peers = peers
        always: frozenset[str] = frozenset()
        if factors is not None:  # the base as an expert is held without being put
            base = [ExpertVectors.identity(self._prepared.digest, factors, form) for form in (False, True)]
            always = frozenset(one.digest for one in base)
        leases = Leases(self._settings.max_expert_bytes, always=always)
        watcher = RowMeters(self._settings)
        self._scheduler = Scheduler(
            self._run_on_all, limits, self._prepared, leases=leases, move=self._move, watcher=watcher
        )
        watcher.follow(self._scheduler)
        threading.Thread(target=self._schedule_forever, args=(self._scheduler,), daemon=True, name="scheduler").start()

    def _schedule_forever(self, scheduler: "Scheduler") -> None:
        try:
            scheduler.run_forever(threading.Event())
        except BaseException as error:
            self._fail(f"scheduler: {type(error).__name__}: {error}")

    def _run_on_all(self, plan: StepPlan) -> StepResult:
        # Peers first: they wait for us in the first all-reduce, and never while there is nothing to do.
        for peer in self._peers:
            peer.step.remote(plan)
        return self._run(plan)

    @ray.method(concurrency_group="door")
    def submit(self, row: Row) -> MetasepiaError | None:
        """Rank 0: queues a row; its answers come out of `next_answers`. The error, if it is refused."""
        assert self._scheduler is not None
        try:
            self._scheduler.submit(row, lambda answer: self._answer(row.request_id, answer))
        except MetasepiaError as error:
            return error
        return None

    @ray.method(concurrency_group="door")
    def cancel(self, request_id: str) -> bool:
        assert self._scheduler is not None
        return self._scheduler.cancel(request_id)

    @ray.method(concurrency_group="door")
    def load(self) -> "Load":
        assert self._scheduler is not None
        return self._scheduler.load()

    @ray.method(concurrency_group="door")
    def refuse_expert(self, digest: str, error: MetasepiaError) -> None:
        """Rank 0: an expert that its scheduler asked for cannot be had."""
        assert self._scheduler is not None
        self._scheduler.expert_refused(digest, error)

    @ray.method(concurrency_group="news")
    def news(self, wait_s: float) -> News:
        """Rank 0: all answers since the last call and what to do with experts, as soon as there is something; after
        `wait_s` perhaps nothing.

        RuntimeError when the gang can run no more steps.
        """
        with self._answered:
            self._answered.wait_for(lambda: self._answers or self._moves or self._failed, timeout=wait_s)
            if self._failed:
                raise RuntimeError(self._failed)
            news = News(answers=tuple(self._answers), moves=tuple(self._moves))
            self._answers, self._moves = [], []
        return news

    def _move(self, moves: "Moves") -> None:
        with self._answered:
            self._moves.append(moves)
            self._answered.notify_all()

    def _answer(self, request_id: str, answer: "Answer") -> None:
        with self._answered:
            self._answers.append((request_id, answer))
            self._answered.notify_all()


BackboneShardActor: ActorClass[BackboneShard] = ray.remote(
    concurrency_groups={"pulse": 1, "door": 1, "experts": 1, "news": 1}, max_restarts=0, max_task_retries=0
)(BackboneShard)  # pyright: ignore[reportCallIssue]


def _blocks(model: "torch.nn.Module") -> "list[torch.nn.Module]":
    """The transformer blocks: the longest list of modules."""
    import torch

    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return list(max(lists, key=len)) if lists else []
