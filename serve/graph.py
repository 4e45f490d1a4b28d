"""The Serve graph on one page: a gateway over backbones, encoders and the reasoning pool.

    gateway --+-- backbone <id>: a replica that owns one gang, in a placement group of its own
              +-- encoder <id>
              +-- reasoning pool
              +-- expert mixing: mixtures, few-shot searches over the backbones, online centroids
              +-- task embedding: data sets, prompts and models in one space, over an encoder and the backbones
              +-- registry: a detached actor beside Serve, since it outlives deployments

Every class here is plain; only these lines make them remote. Queues are bounded where the work is (tokens, texts,
queries), so Serve's own limits are wide: a request inside the gateway always reaches the queue that can refuse it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import BackpressureConfig

from actors.encoder import Encoder
from actors.reasoning_pool import ReasoningPool
from actors.registry import RegistryClient
from cluster.resources import gang_bundles
from cluster.settings import Settings
from metasepia.models.prepared import PreparedBackbone
from serve.accepting import Fits
from serve.backbone_replica import BackboneReplica
from serve.gateway import Gateway
from serve.mixing_replica import MixingReplica
from serve.routing import check_stages
from serve.schemas import MAX_CHOICES
from serve.shipped import ModuleCard
from serve.task_replica import TaskEmbeddingReplica

NAME = "metasepia"
_ALL: dict[str, Any] = {
    "graceful_shutdown_wait_loop_s": 0.5,
    "graceful_shutdown_timeout_s": 5,
    "health_check_period_s": 10,
    "health_check_timeout_s": 30,
    "max_constructor_retry_count": 4,
}

GatewayDeployment: Deployment = serve.deployment(**_ALL)(serve.ingress()(Gateway))
BackboneDeployment: Deployment = serve.deployment(**_ALL)(BackboneReplica)
EncoderDeployment: Deployment = serve.deployment(**_ALL)(Encoder)
MixingDeployment: Deployment = serve.deployment(**_ALL)(MixingReplica)
TaskDeployment: Deployment = serve.deployment(**_ALL)(TaskEmbeddingReplica)
ReasoningDeployment: Deployment = serve.deployment(**_ALL)(ReasoningPool)


def build(
    settings: Settings,
    prepared: Mapping[str, PreparedBackbone],
    modules: Sequence[ModuleCard],
    registry: RegistryClient,
) -> Application:
    """The application for `serve.run`; `prepared` holds each backbone of the settings by its id, `modules` the cards
    of the settings' reasoning modules in their order.
    """
    check_stages(settings.dispatch)
    inside = settings.gateway.max_ongoing_requests
    margin = 64  # probes, metrics, Serve's own checks
    backbones = {
        one.id: BackboneDeployment.options(
            name=f"backbone-{one.id}",
            max_ongoing_requests=inside * MAX_CHOICES + margin,
            ray_actor_options={"num_cpus": one.replica_cpus},
            placement_group_bundles=gang_bundles(one),
            placement_group_strategy="STRICT_PACK",
        ).bind(one, prepared[one.id], str(settings.home), registry)
        for one in settings.backbones
    }
    encoders = {
        one.id: EncoderDeployment.options(
            name=f"encoder-{one.id}",
            max_ongoing_requests=inside + margin,
            ray_actor_options={"num_cpus": one.cpus, "num_gpus": one.gpus},
        ).bind(one)
        for one in settings.encoders
    }
    reasoning = ReasoningDeployment.options(
        name="reasoning-pool",
        num_replicas=settings.reasoning.num_replicas,
        max_ongoing_requests=inside + margin,
        ray_actor_options={"num_cpus": settings.reasoning.cpus},
    ).bind(settings.reasoning, registry)
    mixing = MixingDeployment.options(
        name="expert-mixing",
        max_ongoing_requests=inside + margin,
        ray_actor_options={"num_cpus": settings.mixing.cpus},
    ).bind(settings.mixing, str(settings.home), registry, backbones, dict(prepared), settings.centroids)
    surrogate = settings.surrogate
    tasks = TaskDeployment.options(
        name="task-embedding",
        max_ongoing_requests=inside + margin,
        ray_actor_options={"num_cpus": settings.tasks.cpus},
    ).bind(settings.tasks, surrogate, registry, encoders[surrogate.id], backbones, dict(prepared))
    return GatewayDeployment.options(
        name="gateway",
        max_ongoing_requests=inside,
        max_queued_requests=inside,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=1),
        ray_actor_options={"num_cpus": settings.gateway.cpus},
    ).bind(
        settings.http,
        backbones,
        dict(prepared),
        encoders,
        reasoning,
        mixing,
        tuple(modules),
        registry,
        settings.dispatch,
        settings.dispatch_margins,
        {one.id: Fits.of(one, prepared[one.id], settings.home) for one in settings.backbones},
        settings.centroids,
        tasks,
        settings.tasks,
    )
