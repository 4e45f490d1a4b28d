"""Where parts of a graph lie, on nodes and in pods: sums that close, and what has no room is named."""

import dataclasses
import re

import pytest

from cluster import plan, pods, resources
from cluster import settings as settings_of
from cluster.pods import Node
from cluster.settings import Settings
from tests.k8s import SMOLLM2

LAPTOP = settings_of.read("laptop", {})
PLANNED = dataclasses.replace(
    LAPTOP, backbones=tuple(dataclasses.replace(one, shapes=SMOLLM2) for one in LAPTOP.backbones)
)


def of(profile: str, settings: dict[str, object]) -> Settings:
    return settings_of.read(profile, {}, settings)


def test_the_nodes_given_are_read_as_people_write_them() -> None:
    nodes = pods.nodes_of("2x16cpu+8gpu,4")
    assert [dict(node.offers) for node in nodes] == [{"CPU": 16, "GPU": 8}] * 2 + [{"CPU": 4}]
    for wrong in ("2x16apples", "many", "x", "2x"):
        with pytest.raises(ValueError):
            pods.nodes_of(wrong)


def test_every_bundle_is_placed_once_and_what_is_free_is_what_is_left() -> None:
    (node,) = pods.nodes_of("2cpu")
    assert pods.place(resources.all_parts(LAPTOP), [node]) == []
    assert node.free("CPU") == 0
    assert len(node.placed) == sum(len(one.bundles) for one in resources.all_parts(LAPTOP))


def test_a_gang_is_never_cut_over_two_nodes() -> None:
    backbone = {"id": "big", "source": "/none", "tp_size": 4, "rank_cpus": 1.0, "replica_cpus": 0.1}
    parts = [one for one in resources.all_parts(of("laptop", {"backbones": [backbone]})) if "backbone" in one.name]
    assert pods.place(parts, pods.nodes_of("4x2cpu")) == ["backbone big (tp_size 4)"]
    assert pods.place(parts, pods.nodes_of("2x5cpu")) == []


def test_replicas_that_a_part_begins_with_are_all_placed() -> None:
    settings = of("laptop", {"reasoning": {"cpus": 0.5, "scaling": {"min_replicas": 3, "max_replicas": 5}}})
    (part,) = (one for one in resources.all_parts(settings) if one.name == "reasoning pool")
    assert (part.min_replicas, part.max_replicas) == (3, 5)
    assert pods.place([part], pods.nodes_of("1cpu")) == ["reasoning pool"]
    assert (pods.min_workers(settings), pods.max_workers(settings)) == (3, 5)


def test_what_keeps_to_the_disk_takes_no_cpu_of_its_node_and_asks_for_it_by_name() -> None:
    there = of("laptop", {"registry": {"node_resource": "disk"}})
    kept = [one for one in resources.all_parts(there) if one.at_home]
    assert [one.name for one in kept] == ["registry", "expert mixing"]
    assert all(one.amount("CPU") == 0 for one in kept)
    asked = resources.registry(there.registry)
    assert (asked["num_cpus"], asked["resources"]) == (0, {"disk": resources.NODE_SHARE})
    assert "resources" not in resources.registry(LAPTOP.registry) and resources.at_home(LAPTOP.registry) == {}


def test_pods_hold_every_part_once_and_a_worker_what_a_laptop_does() -> None:
    head, keeper, worker = pods.pods(PLANNED)
    assert head.holds == () and head.cpus == keeper.cpus == 0
    assert sorted((*keeper.holds, *worker.holds)) == sorted(one.name for one in resources.all_parts(PLANNED))
    assert worker.cpus == 2 and worker.gpus == 0
    (backbone,) = PLANNED.backbones
    made = plan.planning.plan(plan.config_of(backbone, PLANNED.home), plan.need_of(backbone))
    assert worker.memory_bytes > made.num_bytes and worker.disk_bytes == made.weights_on_disk + made.factors_on_disk


def test_a_rank_on_a_gpu_takes_main_memory_for_its_largest_tensor_alone() -> None:
    there = dataclasses.replace(settings_of.read("llama-3-70b", {}), home=LAPTOP.home)
    (part,) = (one for one in resources.all_parts(there) if one.name.startswith("backbone"))
    assert pods.memory_of(there, part) < 8 * (pods.TORCH_BYTES + 2 * pods.GIB) + pods.PLAIN_BYTES
    assert [pod.gpus for pod in pods.pods(there)] == [0, 0, 8]


def test_the_command_says_what_has_no_room_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["llama-3-8b", "--nodes", "1x8cpu+1gpu", "--pods"]) == 0
    assert re.search(r"worker +1 to 1: 6 logical CPUs, 1 GPUs", capsys.readouterr().out)
    assert plan.main(["llama-3-8b", "--nodes", "1x8cpu"]) == 1
    assert "NO ROOM for backbone llama-3-8b" in capsys.readouterr().out
    assert plan.main(["llama-3-8b", "--nodes", "1xfoo"]) == 1
    assert "neither CPUs nor GPUs" in capsys.readouterr().err


def test_nodes_without_a_name_for_cpus_have_none() -> None:
    node = Node(name="one", offers={"memory": 1.0})
    assert not node.takes(resources.all_parts(LAPTOP)[0])
