"""The client of a Metasepia server: `Client`, `AsyncClient`, and what they raise. Needs httpx; no torch, no Ray.

A call is written once, as a generator of steps (`calls`), and carried out by threads or by an event loop
(`transports`); `trying` decides what is tried again. `answering` classifies and embeds inputs of any number, which
`large` cuts and `tables` takes out of frames and puts back; `generating` completes text, whole or as a stream
(`events`); `registering`, `embedding_tasks` and `administering` are the rest of the server's calls, `results` what
they answer, `client` the two classes. pandas, pyarrow, numpy and rich are imported when a call needs them.
"""

from metasepia.client import errors
from metasepia.client.client import AsyncClient, Client, Context
from metasepia.client.errors import BadInput, NoAnswer, NotOurs, OutOfTime, PartlyDone, Refused, StreamBroken

__all__ = [
    "AsyncClient",
    "BadInput",
    "Client",
    "Context",
    "NoAnswer",
    "NotOurs",
    "OutOfTime",
    "PartlyDone",
    "Refused",
    "StreamBroken",
    "errors",
]
