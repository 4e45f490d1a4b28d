"""The page that shows the document, in a browser: every call is there and opens; nobody else is asked for anything."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from serve.contracts import CONTRACTS
from tests.doors import Bench
from tests.serving import free_port
from tests.unit.browser import CHROMIUM, browser
from tests.unit.test_prompts import write_byte_tokenizer


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    bench, port = Bench(write_byte_tokenizer(tmp_path)), free_port()
    server = uvicorn.Server(uvicorn.Config(bench.app, port=port, lifespan="off", log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


def test_the_page_shows_every_call_and_what_one_takes_and_answers(url: str, tmp_path: Path):
    with browser(tmp_path / "browser") as tab:
        tab.visit(f"{url}/docs#Classify")
        tab.until("document.querySelectorAll('details.call').length > 0")
        assert tab.value("document.querySelectorAll('details.call').length") == len(CONTRACTS)
        tab.until("document.querySelector('#Classify .inside') !== null")
        shown = tab.value("document.querySelector('#Classify .inside').innerText")
        for word in ("abstain_below", "Idempotency", "probabilities", "vnd.apache.arrow.stream", "429", "required"):
            assert word.lower() in shown.lower(), word
        assert "undefined" not in tab.value("document.body.innerText")
        for id_ in CONTRACTS:  # each opens without a mistake of the script
            tab.value(f"document.getElementById('{id_}').open = true")
        tab.settle()
        assert tab.value("document.querySelectorAll('.inside').length") == len(CONTRACTS)
        tab.value("document.getElementById('filter').focus()")
        tab.type("DELETE context")
        assert tab.value("document.getElementById('count').textContent").startswith("1 of ")
        assert tab.problems == []
        assert {one.split("/")[2] for one in tab.asked_for if one.startswith("http")} == {url.split("/")[2]}
        width = tab.value("document.documentElement.scrollWidth")
        assert width <= 1200, "wider than the window"
