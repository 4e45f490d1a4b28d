"""`python -m benchmarks.overhead_noop ADDRESS`: deploys, beside the graph, a deployment that does nothing, at /noop."""

import sys

from ray import serve
from starlette.requests import Request

from cluster import connect
from cluster.settings import RaySettings


@serve.deployment(name="noop", max_ongoing_requests=100, ray_actor_options={"num_cpus": 0})
class Noop:
    async def __call__(self, _: Request) -> bytes:
        return b""


def main() -> None:
    connect.connect(RaySettings(address=sys.argv[1]))
    serve.run(Noop.bind(), name="noop", route_prefix="/noop")


if __name__ == "__main__":
    main()
