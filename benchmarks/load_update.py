"""`python -m benchmarks.load_update ADDRESS HOME`: deploys the graph again on a running cluster, as an operator does.

Serve then replaces every replica; this returns when the new ones serve.
"""

import sys
import time

from ray import serve

from cluster import connect
from cluster import settings as settings_of
from cluster.settings import RaySettings
from serve import graph


def main() -> int:
    address, home = sys.argv[1:]
    connect.connect(RaySettings(address=address))
    before = serve.status().applications[graph.NAME].last_deployed_time_s
    settings = settings_of.read("laptop", {"METASEPIA_HOME": home})
    serve.run(graph.application(settings), name=graph.NAME, blocking=False)
    while True:
        now = serve.status().applications[graph.NAME]
        if now.status == "RUNNING" and now.last_deployed_time_s > before:
            return 0
        if now.status == "DEPLOY_FAILED":
            print(now.message)
            return 1
        time.sleep(0.25)


if __name__ == "__main__":
    sys.exit(main())
