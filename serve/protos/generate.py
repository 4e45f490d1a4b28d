"""`python -m serve.protos.generate`: metasepia_pb2.py, its types and metasepia_pb2_grpc.py from metasepia.proto.

Needs grpcio-tools, which brings the compiler. What it writes is committed, since the graph runs without it.
"""

import sys
from importlib import resources
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("metasepia.proto")
WRITTEN = ("metasepia_pb2.py", "metasepia_pb2.pyi", "metasepia_pb2_grpc.py")


def generate(root: Path) -> None:
    """Writes `WRITTEN` into serve/protos under a directory. Raises RuntimeError where the compiler refuses.

    The path from the root is a part of what is written: by it the modules import each other.
    """
    from grpc_tools import protoc

    known = str(resources.files("grpc_tools") / "_proto")
    options = [f"--{what}={root}" for what in ("python_out", "pyi_out", "grpc_python_out")]
    status = protoc.main(["protoc", f"--proto_path={ROOT}", f"--proto_path={known}", *options, str(SOURCE)])
    if status:
        raise RuntimeError(f"{SOURCE} could not be compiled; the reason stands above")


if __name__ == "__main__":
    generate(ROOT)
    sys.exit(0)
