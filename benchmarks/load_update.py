"""`python -m benchmarks.load_update ADDRESS HOME`: deploys the graph again on a running cluster, as an operator does.

Serve then replaces every replica; this returns when the new ones serve.
"""

import sys
import time

from ray import serve
from ray.serve.schema import ApplicationStatus

from cluster import connect
from cluster import settings as settings_of
from cluster.settings import RaySettings
from serve import graph


def main() -> int:
    address, home = sys.argv[1:]
    connect.connect(RaySettings(address=address))
    settings = settings_of.read("laptop", {"METASEPIA_HOME": home})
    serve.run(graph.application(settings), name=graph.NAME, blocking=False)
    while (now := serve.status().applications[graph.NAME]).status != ApplicationStatus.RUNNING:
        if now.status == ApplicationStatus.DEPLOY_FAILED:
            print(now.message)
            return 1
        time.sleep(0.25)
    return 0


if __name__ == "__main__":
    sys.exit(main())
