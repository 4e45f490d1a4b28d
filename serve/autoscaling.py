"""Replicas by the work that waits: Serve's own autoscaler, asked for a number by the policy here.

Serve runs the policy in its controller, from a pickled copy of this class alone: it needs nothing but the standard
library. Bounds and delays are Serve's (`AutoscalingConfig`); a replica tells its amount by `record_autoscaling_stats`.
"""

import math
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from cluster.scaling_settings import ScalingSettings

QUEUED = "queued"
"""The name under which every replica that scales tells what it has in hand."""


class OnQueued:
    """As many replicas as share what is queued, each at most `per_replica` of it.

    A replica is taken away only where the others would be at most `full` of the way to asking for it back: at an even
    load the number does not swing.
    """

    def __init__(self, per_replica: float, metric: str = QUEUED, full: float = 0.7) -> None:
        self.per_replica, self.metric, self.full = per_replica, metric, full

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number wanted now. A replica that has not told its amount yet counts as an idle one."""
        target = context.target_num_replicas
        told = (context.aggregated_metrics or {}).get(self.metric, {})
        if not told:
            return target, {}
        queued = sum(told.values())
        wanted = math.ceil(queued / self.per_replica)
        if wanted < target:
            wanted = min(target, math.ceil(queued / (self.per_replica * self.full)))
        return max(1, wanted), {}


def replicas(settings: ScalingSettings) -> dict[str, Any]:
    """The options of a deployment: a fixed number, or an autoscaling configuration."""
    if settings.is_fixed:
        return {"num_replicas": settings.min_replicas}
    policy = AutoscalingPolicy(
        policy_function="serve.autoscaling:OnQueued", policy_kwargs={"per_replica": settings.queued_per_replica}
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
