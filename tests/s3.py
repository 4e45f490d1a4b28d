"""An object store on loopback: moto's S3 in a thread, its credentials in the environment as users give them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

KEY, SECRET = "AKIAFORTESTSONLY", "hunter2/of+the=store"


@dataclass(frozen=True)
class Bucket:
    """`s3://<name>` with the options that lead to loopback."""

    name: str
    endpoint: str

    def uri(self, path: str) -> str:
        return f"s3://{self.name}/{path}?endpoint_override={self.endpoint}&scheme=http&region=us-east-1"


@contextmanager
def serving() -> Iterator[Bucket]:
    """A bucket. Skips where moto is not installed."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    import pyarrow.fs as pafs

    given = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true"}
    before = {name: os.environ.get(name) for name in given}
    os.environ |= given
    server.start()
    try:
        host, port = server.get_host_and_port()
        made = pafs.S3FileSystem(
            endpoint_override=f"{host}:{port}", scheme="http", region="us-east-1", allow_bucket_creation=True
        )
        made.create_dir("things")
        yield Bucket("things", f"{host}:{port}")
    finally:
        server.stop()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
