"""What goes with a gRPC status: the door's error envelope as google.rpc.Status, in the metadata where clients look.

Light: the proxy's process loads it too (`serve.grpc_door.proxy`).
"""

import urllib.parse

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

DETAILS = "grpc-status-details-bin"
DOMAIN = "metasepia"
MAX_TEXT_BYTES = 1024
"""Of a message on the wire, where it stands three times: a client takes 8 KiB of trailing metadata by default."""


def cut(text: str) -> str:
    """No longer than `MAX_TEXT_BYTES` as gRPC spells it, percent-encoded."""
    while len(urllib.parse.quote(text, safe=" " + "!\"#$&'()*+,/:;<=>?@[\\]^`{|}")) > MAX_TEXT_BYTES:
        text = text[: len(text) * 3 // 4].rstrip() + "..."
    return text


def details(
    code: grpc.StatusCode,
    message: str,
    *,
    reason: str,
    http_status: int,
    param: str | None = None,
    retry_after_s: float | None = None,
    request_id: str = "",
) -> bytes:
    """A serialised google.rpc.Status: ErrorInfo always, BadRequest for a field, RetryInfo where trying again helps."""
    facts = {"http_status": str(http_status)} | ({} if param is None else {"param": param})
    parts = [_any(error_details_pb2.ErrorInfo(reason=reason.upper(), domain=DOMAIN, metadata=facts))]
    if param is not None and http_status == 400:
        violation = error_details_pb2.BadRequest.FieldViolation(field=param, description=message)
        parts.append(_any(error_details_pb2.BadRequest(field_violations=[violation])))
    if retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(retry_after_s * 1e9))
        parts.append(_any(error_details_pb2.RetryInfo(retry_delay=delay)))
    if request_id:
        parts.append(_any(error_details_pb2.RequestInfo(request_id=request_id)))
    status = status_pb2.Status(code=code_pb2.Code.Value(code.name), message=message, details=parts)
    return status.SerializeToString()


def _any(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
