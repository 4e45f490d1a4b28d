"""Starting the gRPC door: what Serve is told, what its processes' environment says, and where it listens in the end."""

import psutil
from ray.serve.config import gRPCOptions

from cluster.door_settings import GrpcSettings
from cluster.settings import Settings
from cluster.starting import is_public
from metasepia.errors import InvalidSettings
from serve.grpc_door.proxy import FUNCTIONS, HOST


def environment(settings: Settings) -> dict[str, str]:
    """What Ray's processes must have in theirs before they start."""
    return {
        HOST: settings.grpc_host,
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(int(settings.grpc.max_message_mib * 2**20)),
    }


def options(settings: GrpcSettings) -> gRPCOptions:
    """For `serve.start`; without functions Serve opens no port."""
    functions = FUNCTIONS if settings.enabled else []
    return gRPCOptions(port=settings.port, grpc_servicer_functions=functions, enable_reflection=settings.reflection)


def check_listening(host: str, port: int) -> None:
    """Raises InvalidSettings where a port that is for this machine alone is open to others.

    The proxy may be of a cluster that was started without `environment`, or Serve may have another way by now.
    """
    if is_public(host):
        return
    for one in psutil.net_connections("tcp"):
        if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr[1] == port and is_public(one.laddr[0]):
            problem = f"{host}, and Serve's proxy listens on {one.laddr[0]}: start Ray's head with {HOST}={host}"
            raise InvalidSettings("grpc.host", one.laddr[0], f"{problem}, or set grpc.enabled = false")
