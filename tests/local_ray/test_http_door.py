"""The HTTP door of the real graph: ids, the proxy's own bounds, the document, malformed requests."""

import json
import socket

import httpx
import pytest

from benchmarks import malformed
from tests.serving import Served

pytestmark = pytest.mark.timeout(600)


def test_the_request_id_of_the_client_comes_back_once_and_another_is_made_where_there_is_none(served: Served):
    response = httpx.get(f"{served.url}/version", headers={"x-request-id": "abc-123"})
    assert response.headers.get_list("x-request-id") == ["abc-123"]
    assert served.get("/nowhere").headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"GET / HTTP/1.1\r\nhost: x\r\nlong: " + b"a" * 200_000, 431, "head_too_large"),
        (b"GET /version HTTP/1.1\r\nhost: x\r\nbad header\r\n\r\n", 400, "malformed_request"),
    ],
    ids=["head bomb", "no HTTP"],
)
def test_the_proxy_itself_bounds_what_it_reads_and_refuses_in_the_envelope(
    served: Served, sent: bytes, status: int, code: str
):
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.sendall(sent)
        head, _, body = connection.recv(65536).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d" % status) and json.loads(body)["error"]["code"] == code


def test_the_document_names_what_is_served_and_its_page_is_there(served: Served):
    told = served.get("/openapi.json").json()
    assert told["paths"]["/v1/classify"]["post"]["operationId"] == "Classify"
    assert served.get("/docs").headers["content-type"].startswith("text/html")


@pytest.mark.soak
def test_malformed_requests_are_answered_in_words(served: Served):
    tally = malformed.sent(served.url, 2000, 0)
    assert tally.num > 1500 and tally.wrong == []
    assert served.get("/health").status_code == 200
