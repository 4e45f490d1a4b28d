"""The Serve graph on one page: a gateway over backbones, encoders and the reasoning pool.

    gateway --+-- backbone <id>: a replica that owns one gang, in a placement group of its own
              +-- encoder <id>
              +-- reasoning pool
              +-- expert mixing: mixtures, few-shot searches over the backbones, online centroids
              +-- task embedding: data sets, prompts and models in one space, over an encoder and the backbones
              +-- registry: a detached actor beside Serve, since it outlives deployments

Every class here is plain; only these lines make them remote. Queues are bounded where the work is (tokens, texts,
queries), so Serve's own limits are wide: a request inside the gateway always reaches the queue that can refuse it.

`build` is for Serve's own tools and configuration files (`serve/config.yaml`); `serve.main` calls `application`. Both
only say what is to run: every part then makes ready what it needs, where it is (`serve.prepare`, `actors.registry`).
"""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import BackpressureConfig

from actors.reasoning_pool import ReasoningPool
from actors.registry import RegistryClient, RegistryPlace
from cluster import settings as settings_of
from cluster.resources import at_home, gang_bundles
from cluster.scaling_settings import ScalingSettings
from cluster.settings import BackboneSettings, Settings
from serve.backbone_replica import BackboneReplica
from serve.gateway import Gateway
from serve.load.autoscaling import GATEWAY, ScaledEncoder, replicas, reports
from serve.mixing_replica import MixingReplica
from serve.models.routing import check_stages
from serve.requests.schemas import MAX_CHOICES
from serve.task_replica import TaskEmbeddingReplica

NAME = "metasepia"
MARGIN = 64
"""Calls of a part beside the requests inside the gateway: probes, metrics, Serve's own checks."""
_ALL: dict[str, Any] = {
    "graceful_shutdown_wait_loop_s": 0.5,
    "health_check_period_s": 10,
    "health_check_timeout_s": 30,
    "max_constructor_retry_count": 4,
    "logging_config": {"enable_access_log": False},  # every request has a line in our own log
}

GatewayDeployment: Deployment = serve.deployment(**_ALL)(serve.ingress()(Gateway))
BackboneDeployment: Deployment = serve.deployment(**_ALL)(BackboneReplica)
EncoderDeployment: Deployment = serve.deployment(**_ALL)(ScaledEncoder)
MixingDeployment: Deployment = serve.deployment(**_ALL)(MixingReplica)
TaskDeployment: Deployment = serve.deployment(**_ALL)(TaskEmbeddingReplica)
ReasoningDeployment: Deployment = serve.deployment(**_ALL)(ReasoningPool)


class GraphArgs(BaseModel):
    """What `build` is told: a profile, and tables laid over it. The environment is not asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    profile: str = "laptop"
    """A name, or a path to a .toml file on the machine that builds."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Tables as a profile has them, or their JSON as one text; a list, such as `backbones`, takes the whole place of
    the profile's. A relative `home` is under the code's own folder, which may be a temporary one: give a whole path."""

    @field_validator("settings", mode="before")
    @classmethod
    def _of_text(cls, value: object) -> object:
        return json.loads(value) if isinstance(value, str) else value

    def read(self) -> Settings:
        """Raises InvalidSettings."""
        return settings_of.read(self.profile, {}, self.settings)


def build(args: GraphArgs) -> Application:
    """The application for `serve run`, `serve deploy` and `serveConfigV2`: import path `serve.graph:build`."""
    return application(args.read())


def __getattr__(name: str) -> Application:
    """`app`, for tools that take no arguments (`serve build serve.graph:app`): the default profile, read when asked."""
    if name == "app":
        return build(GraphArgs())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def application(settings: Settings, registry: RegistryClient | None = None) -> Application:
    """What is to run. `registry` None: the first part that asks for it starts it on the cluster's head node.

    Names of deployments are those of the parts, and stay: `gateway`, `backbone-<id>`, `encoder-<id>`, `reasoning-pool`,
    `expert-mixing`, `task-embedding`.
    """
    check_stages(settings.dispatch)
    registry = registry or RegistryClient(RegistryPlace.of(settings))
    inside = settings.gateway.max_ongoing_requests
    told, ends = _told(settings), _ends(settings)
    backbones = {one.id: backbone(settings, one, registry) for one in settings.backbones}
    encoders = {
        one.id: EncoderDeployment.options(
            **ends,
            name=f"encoder-{one.id}",
            max_ongoing_requests=inside + MARGIN,
            ray_actor_options={"num_cpus": one.cpus, "num_gpus": one.gpus, **_told(settings, one.scaling)},
            **replicas(one.scaling),
        ).bind(one)
        for one in settings.encoders
    }
    reasoning = ReasoningDeployment.options(
        **ends,
        name="reasoning-pool",
        max_ongoing_requests=inside + MARGIN,
        ray_actor_options={"num_cpus": settings.reasoning.cpus, **_told(settings, settings.reasoning.scaling)},
        **replicas(settings.reasoning.scaling),
    ).bind(settings.reasoning, registry)
    mixing = MixingDeployment.options(
        **ends,
        name="expert-mixing",
        max_ongoing_requests=inside + MARGIN,
        ray_actor_options={"num_cpus": settings.mixing.cpus, **told} | at_home(settings.registry),
    ).bind(settings, registry, backbones)
    tasks = TaskDeployment.options(
        **ends,
        name="task-embedding",
        max_ongoing_requests=inside + MARGIN,
        ray_actor_options={"num_cpus": settings.tasks.cpus, **told},
    ).bind(settings, registry, encoders[settings.surrogate.id], backbones)
    return GatewayDeployment.options(
        **ends,
        name=GATEWAY,
        max_ongoing_requests=inside,
        max_queued_requests=inside,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=1),
        ray_actor_options={"num_cpus": settings.gateway.cpus, **told},
    ).bind(settings, backbones, encoders, reasoning, mixing, tasks, registry)


def backbone(settings: Settings, one: BackboneSettings, registry: RegistryClient) -> Application:
    """One backbone's gangs."""
    return BackboneDeployment.options(
        **_ends(settings),
        name=f"backbone-{one.id}",
        max_ongoing_requests=settings.gateway.max_ongoing_requests * MAX_CHOICES + MARGIN,
        ray_actor_options={"num_cpus": one.replica_cpus, **_told(settings, one.scaling)},
        placement_group_bundles=gang_bundles(one),
        placement_group_strategy="STRICT_PACK",
        **replicas(one.scaling),
    ).bind(settings, one.id, registry)


def _told(settings: Settings, scaling: ScalingSettings | None = None) -> dict[str, Any]:
    """What every replica's environment says."""
    return {"runtime_env": {"env_vars": {**settings.telemetry.environment, **reports(scaling)}}}


def _ends(settings: Settings) -> dict[str, Any]:
    """How long a replica that leaves may go on with what it has begun."""
    return {"graceful_shutdown_timeout_s": settings.admission.drain_s}
