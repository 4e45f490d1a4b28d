"""The graph for Serve's own tools: typed arguments, nothing read at import, and the example says what is built."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from ray.serve import scripts
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema

from cluster import settings as settings_of
from cluster import tables
from cluster.settings import Settings
from metasepia.errors import InvalidSettings
from serve import graph
from serve.graph import GraphArgs

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "serve" / "config.yaml"


def built(args: dict[str, Any]) -> dict[str, Any]:
    """Deployments by name, as Serve's controller builds them."""
    app = call_user_app_builder_with_args_if_necessary(graph.build, args)
    return {one.name: one for one in build_app(app, name="metasepia").deployments}


def test_importing_the_builder_reads_no_settings_and_loads_no_torch():
    env = {"PATH": os.environ["PATH"], "METASEPIA_HTTP__PORT": "no port", "METASEPIA_PROFILE": "/nowhere.toml"}
    code = "import sys, serve.graph as g; app = g.app; print('torch' in sys.modules, type(app).__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "Application"]


def test_what_serve_build_prints_is_what_the_committed_example_deploys(tmp_path: Path):
    done = CliRunner().invoke(scripts.cli, ["build", "serve.graph:app", "-o", str(tmp_path / "built.yaml")])
    assert done.exit_code == 0, done.output
    printed = yaml.safe_load((tmp_path / "built.yaml").read_text())["applications"][0]["deployments"]
    example = yaml.safe_load(CONFIG.read_text())
    ServeDeploySchema.model_validate(example)
    deployments = built(example["applications"][0]["args"])
    assert [one["name"] for one in printed] == list(deployments)
    for one in printed:
        made = deployments[one["name"]]
        assert made.max_ongoing_requests == one["max_ongoing_requests"]
        assert made.num_replicas == one.get("num_replicas", 1)
        assert made.ray_actor_options["num_cpus"] == one["ray_actor_options"]["num_cpus"]
    comment = CONFIG.read_text().partition("proxy_location")[0]
    assert all(name in comment for name in deployments)


def test_arguments_are_a_profile_with_tables_over_it():
    scaling = {"max_replicas": 3}
    deployments = built({"profile": "laptop", "settings": {"reasoning": {"scaling": scaling, "cpus": 0.2}}})
    pool = deployments["reasoning-pool"]
    assert pool.ray_actor_options["num_cpus"] == 0.2
    assert pool._deployment_config.autoscaling_config.max_replicas == 3
    assert "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S" in str(pool.ray_actor_options)
    text = GraphArgs.model_validate({"settings": '{"home": "/data"}'})  # as `serve run ... settings='{...}'` gives it
    assert text.read().home == Path("/data")


@pytest.mark.parametrize(
    ("args", "error", "words"),
    [
        ({"profil": "laptop"}, ValueError, "profil"),
        ({"settings": "{"}, ValueError, "JSON|Expecting"),
        ({"profile": "desktop"}, InvalidSettings, "one of gpu, laptop"),
        ({"settings": {"http": {"port": 0}}}, InvalidSettings, r"http\.port = 0"),
        ({"settings": {"doors": {}}}, InvalidSettings, "doors"),
        ({"settings": {"http": 5}}, InvalidSettings, "a table"),
        ({"settings": {"dispatch": ["oracle"]}}, InvalidSettings, "oracle"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_in_words(args: dict[str, Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        built(args)


@pytest.mark.parametrize("profile", sorted(path.stem for path in settings_of.PROFILES.glob("*.toml")))
def test_settings_as_tables_give_the_same_settings_again(profile: str):
    read = settings_of.read(profile, {})
    assert tables.build(Settings, tables.tree_of(read)) == read
