"""How many replicas a queue asks for."""

from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle  # (in memory) as Serve sends the policy
from ray.serve.config import AutoscalingConfig

from cluster import resources
from cluster import settings as settings_of
from cluster.scaling_settings import ScalingSettings
from metasepia.errors import CannotPlace, InvalidSettings
from serve.load.autoscaling import OnQueued, replicas


def wanted(policy: Any, now: int, queued: list[float], waiting: float = 0.0) -> int:
    told = {
        "queued": {f"replica {index}": one for index, one in enumerate(queued)},
        "waiting": {f"replica {index}": waiting for index in range(len(queued))},
    }
    context: Any = SimpleNamespace(aggregated_metrics=told, target_num_replicas=now)
    return policy(context)[0]


def test_replicas_are_as_many_as_share_the_queue():
    policy = OnQueued(1000)
    assert [wanted(policy, 1, [amount]) for amount in (0, 1000, 1001, 4500)] == [1, 1, 2, 5]
    assert wanted(policy, 2, [900, 900, 900]) == 3


def test_what_waits_at_the_gateway_counts_once_however_many_tell_it():
    assert wanted(OnQueued(1000), 2, [500, 500], waiting=1500) == 3


def test_a_replica_leaves_only_where_the_others_have_room_to_spare():
    policy = OnQueued(1000)
    for amount in (1999, 1500, 1401):  # two would do, and be asked for a third again soon
        assert wanted(policy, 3, [amount / 3] * 3) == 3
    assert wanted(policy, 3, [1400 / 3] * 3) == 2
    assert wanted(policy, 3, [0, 0, 0]) == 1


def test_nothing_told_changes_nothing():
    context: Any = SimpleNamespace(aggregated_metrics=None, target_num_replicas=4)
    assert OnQueued(1000)(context)[0] == 4


def test_equal_bounds_fix_the_number_and_others_make_a_configuration_that_serve_takes():
    assert replicas(ScalingSettings(min_replicas=3, max_replicas=3)) == {"num_replicas": 3}
    made = replicas(ScalingSettings(max_replicas=4, queued_per_replica=500.0, upscale_delay_s=2.0))[
        "autoscaling_config"
    ]
    assert isinstance(made, AutoscalingConfig)
    assert (made.min_replicas, made.max_replicas, made.upscale_delay_s) == (1, 4, 2.0)
    policy = cloudpickle.loads(made.policy.get_serialized_policy_def() or b"")(**made.policy.policy_kwargs)
    assert wanted(policy, 1, [1001]) == 3


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ({"min_replicas": 0}, r"scaling\.min_replicas = 0"),
        ({"min_replicas": 3, "max_replicas": 2}, "from 3 to 1000"),
        ({"max_replicas": 2, "queued_per_replica": 10.0**6}, "below 65536, beyond which reasoning refuses"),
    ],
)
def test_bounds_that_make_no_sense_are_refused_in_words(over: dict[str, Any], words: str):
    with pytest.raises(InvalidSettings, match=words):
        settings_of.read("laptop", {}, {"reasoning": {"scaling": over}})


def test_a_cluster_of_our_own_must_have_room_for_all_that_may_come_and_one_that_grows_for_the_first():
    over: dict[str, Any] = {"reasoning": {"scaling": {"max_replicas": 8}}}
    mine = settings_of.read("laptop", {}, over)
    with pytest.raises(CannotPlace, match="reasoning pool x 8"):
        resources.check_fits(mine, {"CPU": 2.0})
    resources.check_fits(settings_of.read("laptop", {}, over | {"ray": {"address": "auto"}}), {"CPU": 2.0})
