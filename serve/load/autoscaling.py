"""Replicas by the work that waits: Serve's own autoscaler, asked for a number by the policy here.

Bounds and delays are Serve's (`AutoscalingConfig`). A replica tells by `record_autoscaling_stats` what it has in hand,
and what still waits at the gateway for its part. Serve runs the policy in its controller, from a pickled copy of the
class alone: it needs nothing but the standard library.
"""

import asyncio
import math
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from actors.encoder import Encoder
from cluster.scaling_settings import ScalingSettings
from serve.parts import answered

QUEUED, WAITING = "queued", "waiting"
"""What a replica has in hand, and what waits before all of them together."""
GATEWAY = "gateway"
ASK_TIMEOUT_S = 2.0


class OnQueued:
    """As many replicas as share what is queued, each at most `per_replica` of it.

    A replica is taken away only where the others would be at most `full` of the way to asking for it back: at an even
    load the number does not swing.
    """

    def __init__(self, per_replica: float, full: float = 0.7) -> None:
        self.per_replica, self.full = per_replica, full

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number wanted now. A replica that has not told its amount yet counts as an idle one."""
        told, target = context.aggregated_metrics or {}, context.target_num_replicas
        if not told.get(QUEUED):
            return target, {}
        queued = sum(told[QUEUED].values()) + max(told.get(WAITING, {}).values(), default=0.0)
        wanted = math.ceil(queued / self.per_replica)
        if wanted < target:
            wanted = min(target, math.ceil(queued / (self.per_replica * self.full)))
        return max(1, wanted), {}


class ScaledEncoder(Encoder):
    """An encoder that also tells what waits for it at the gateway."""

    async def record_autoscaling_stats(self) -> dict[str, float]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return {**super().record_autoscaling_stats(), WAITING: await waiting_tokens(self._settings.id)}


async def waiting_tokens(part: str) -> float:
    """At the gateway, for a part; none where no gateway answers. To be called in a replica."""
    try:
        app = serve.get_replica_context().app_name
        gateway = serve.get_deployment_handle(GATEWAY, app_name=app)
        return await asyncio.wait_for(answered(gateway.waiting_tokens.remote(part)), ASK_TIMEOUT_S)
    except Exception:  # whatever it is, what the replica has in hand is still to be told
        return 0.0


def replicas(settings: ScalingSettings) -> dict[str, Any]:
    """The options of a deployment: a fixed number, or an autoscaling configuration."""
    if settings.is_fixed:
        return {"num_replicas": settings.min_replicas}
    policy = AutoscalingPolicy(
        policy_function=f"{__name__}:{OnQueued.__name__}", policy_kwargs={"per_replica": settings.queued_per_replica}
    )
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=settings.max_replicas,
            upscale_delay_s=settings.upscale_delay_s,
            downscale_delay_s=settings.downscale_delay_s,
            look_back_period_s=settings.look_back_s,
            policy=policy,
        )
    }


def reports(scaling: ScalingSettings | None) -> dict[str, str]:
    """The environment of a replica that scales: Serve is told every 10 s otherwise, however short the look back."""
    if scaling is None or scaling.is_fixed:
        return {}
    return {"RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": f"{min(10.0, scaling.look_back_s / 2):g}"}
