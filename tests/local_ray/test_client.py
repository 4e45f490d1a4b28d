"""The client and the command over a real graph: one tour of it, by both doors' one code path."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from metasepia import cli
from metasepia.client import AsyncClient, Client, errors
from tests.requests import BACKBONE, ENCODER
from tests.serving import REVIEWS, Served


def test_a_frame_is_classified_by_a_context_and_the_answer_is_that_of_one_request(served: Served):
    frame = pd.DataFrame({"said": [text for text, _ in REVIEWS] * 5, "kind": [label for _, label in REVIEWS] * 5})
    with Client(served.url) as client:
        context = client.create_context(frame[:6], text="said", label="kind")
        cut = context.classify(frame, text="said", batch_size=7)
        whole = context.classify(frame["said"])
        assert cut["label"].tolist() == whole.labels == frame["kind"].tolist()
        probabilities = cut[[f"probability_{name}" for name in whole.classes]].to_numpy()
        np.testing.assert_allclose(probabilities, whole.probabilities, atol=1e-5)
        assert context.delete().deleted


def test_threads_and_an_event_loop_ask_the_same_and_hear_the_same(served: Served):
    async def soon() -> tuple[str, str, np.ndarray]:
        async with AsyncClient(served.url) as client:
            async with client.stream_chat("Name a colour.", model=BACKBONE, max_tokens=6, temperature=0) as pieces:
                streamed = "".join([piece.text async for piece in pieces])
            states = await client.hidden_states(["one body", "any colour"], model=f"{BACKBONE}:noisy", layers=[3, -1])
            told = pieces.receipt or {}
            return streamed, told["backbone"], states.to_numpy()

    streamed, backbone, states = asyncio.run(soon())
    with Client(served.url) as client:
        whole = client.chat("Name a colour.", model=BACKBONE, max_tokens=6, temperature=0)
        assert (whole.text, whole.receipt["backbone"]) == (streamed, backbone)
        again = client.hidden_states(
            ["one body", "any colour"], model=f"{BACKBONE}:noisy", layers=[3, -1], batch_size=1
        )
        np.testing.assert_allclose(states, again.to_numpy(), atol=1e-3)
        assert client.embed(["a", "b"], model=ENCODER).vectors.shape[0] == 2
        with pytest.raises(errors.NotFound, match="known: "):
            client.chat("x", model=f"{BACKBONE}:nobody")


def test_the_command_tells_how_the_graph_does(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "e.jsonl").write_text("\n".join(json.dumps({"text": t, "label": k}) for t, k in REVIEWS))
    out = tmp_path / "out.csv"
    line = ["classify", str(tmp_path / "e.jsonl"), "--examples", str(tmp_path / "e.jsonl"), "--prefix", "x_"]
    assert cli.main(["--url", served.url, *line, "--out", str(out)]) == 0
    assert [one.split(",")[2] for one in out.read_text().splitlines()[1:]] == [label for _, label in REVIEWS]
    assert cli.main(["--url", served.url, "jobs", "list"]) == 0
    assert cli.main(["--url", served.url, "status"]) == 0
    assert f"backbone {BACKBONE}" in capsys.readouterr().out
