"""The console in a real browser, over the door with small fake parts behind it, on a real socket."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn

from serve.pages import console_pages
from tests.doors import Bench
from tests.unit.browser import Tab, browser
from tests.unit.test_prompts import write_byte_tokenizer


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """The URL under which an ASGI application listens."""
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    made = Bench(write_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    return made.with_contexts(tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="module")
def url(bench: Bench) -> Iterator[str]:
    with listening(bench.app) as found:
        yield found


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser(tmp_path_factory.mktemp("browser")) as one:
        yield one


@pytest.fixture
def page(tab: Tab, url: str) -> Tab:
    """Opened anew, with the lists in."""
    tab.problems.clear()
    tab.asked_for.clear()
    tab.visit(url)
    tab.until("document.getElementById('model').value && document.querySelectorAll('#parts tbody tr').length > 0")
    return tab


def text(tab: Tab, selector: str) -> str:
    return tab.value(f"document.querySelector({json.dumps(selector)}).innerText")


def put(tab: Tab, id_: str, value: str) -> None:
    tab.value(
        f"(one => {{ one.value = {json.dumps(value)}; one.dispatchEvent(new Event('input')); "
        f"one.dispatchEvent(new Event('change')); }})(document.getElementById({json.dumps(id_)}))"
    )


def press(tab: Tab, selector: str) -> None:
    tab.value(f"document.querySelector({json.dumps(selector)}).click()")


def test_parts_queues_plots_and_models_are_shown(page: Tab):
    assert "reasoning pool" in text(page, "#parts")
    assert page.value("document.querySelectorAll('#plots figure').length") == 4
    assert page.value("[...document.querySelectorAll('.plot')].every(one => one.getAttribute('aria-label'))")
    assert "tiny:maths" in text(page, "#models-table")
    put(page, "models-filter", "minilm")
    rows = "[...document.querySelectorAll('#models-table tbody th')].map(one => one.innerText)"
    assert page.value(rows) == ["minilm-fake"]
    page.until("document.getElementById('latency').innerText.includes('/v1/models')")


def test_texts_are_labelled_by_examples_and_by_the_context_kept_of_them(page: Tab):
    put(page, "inputs", "<b>tiny</b>\nanother text")
    press(page, "#classify-form button")
    page.until("document.querySelectorAll('#labels tbody tr').length === 2")
    assert "<b>tiny</b>" in text(page, "#labels")  # as text
    assert page.value("document.querySelectorAll('#labels meter').length") >= 2
    assert "labelled in" in text(page, "#classify-said")
    assert "context" in page.value("JSON.parse(document.querySelector('#classify-receipt pre').textContent)")
    press(page, "#keep")
    page.until("document.getElementById('classify-by').value.startsWith('ctx-')")
    assert page.value("document.getElementById('examples-part').hidden")
    page.value("document.querySelector('#labels tbody').replaceChildren()")
    press(page, "#classify-form button")
    page.until("document.querySelectorAll('#labels tbody tr').length === 2")
    assert page.value("document.querySelectorAll('#contexts-table tbody button').length") == 1


def test_what_is_wrong_is_said_where_it_was_typed(page: Tab):
    put(page, "classify-by", "")
    put(page, "examples", "praise | good\nno label here")
    press(page, "#classify-form button")
    page.until("document.getElementById('classify-problem').innerText")
    assert text(page, "#classify-problem") == "example 2 has no label: write it as label | text"
    put(page, "examples", "praise | good")
    press(page, "#classify-form button")
    page.until("!document.getElementById('classify-problem').innerText.includes('example 2')")
    page.until("document.getElementById('classify-problem').innerText.startsWith('examples')")


def test_an_answer_streams_and_stops(page: Tab, bench: Bench):
    bench.says("Paris <i>€</i>")
    put(page, "max-tokens", "20")
    press(page, "#generate-go")
    page.until("document.getElementById('generate-said').innerText.includes('tokens in')")
    assert text(page, "#answer") == "Paris <i>€</i>"
    assert page.value("JSON.parse(document.querySelector('#generate-receipt pre').textContent).path") == "plain"
    bench.backbone.answer, bench.backbone.hang = [], True
    try:
        press(page, "#generate-go")
        page.until("!document.getElementById('generate-stop').disabled")
        press(page, "#generate-stop")
        page.until("document.getElementById('generate-said').innerText === 'stopped'")
    finally:
        bench.backbone.hang = False


def test_a_map_without_tasks_is_refused_in_the_doors_words(page: Tab):
    press(page, "#map-draw")
    page.until("document.getElementById('map-problem').innerText")
    assert page.value("document.getElementById('map').hidden")


def test_it_can_be_used_by_keyboard_and_read_aloud(page: Tab):
    unnamed = """[...document.querySelectorAll('input, select, textarea, button, iframe')]
        .filter(one => !(one.labels?.length || one.innerText || one.getAttribute('aria-label') || one.title))
        .map(one => one.outerHTML)"""
    assert page.value(unnamed) == []
    assert page.value("[...document.querySelectorAll('table')].every(one => one.tHead && one.parentElement.ariaLabel)")
    levels = page.value("[...document.querySelectorAll('h1, h2')].map(one => one.tagName)")
    assert levels[0] == "H1" and set(levels[1:]) == {"H2"} and page.value("document.documentElement.lang") == "en"
    page.key("Tab")
    assert page.value("document.activeElement.className") == "skip"


@pytest.mark.parametrize("dark", [False, True])
def test_words_stand_out_from_what_is_behind_them(page: Tab, url: str, dark: bool):
    page.visit(url, dark=dark)
    ratio = """(() => {
      const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
      const light = rgb => rgb.match(/[\\d.]+/g).slice(0, 3).map(v => linear(v / 255))
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
      const behind = one => {
        for (; one; one = one.parentElement) {
          const colour = getComputedStyle(one).backgroundColor;
          if (colour !== 'rgba(0, 0, 0, 0)') return colour;
        }
        return 'rgb(255, 255, 255)';
      };
      return Math.min(...[...document.querySelectorAll('h1, h2, p, a, label, th, button, .quiet, figcaption')]
        .map(one => [light(getComputedStyle(one).color), light(behind(one))].sort((a, b) => b - a))
        .map(([a, b]) => (a + .05) / (b + .05)));
    })()"""
    assert page.value(ratio) >= 4.5  # WCAG AA


def test_it_asks_its_own_graph_alone_and_its_console_is_quiet(page: Tab, url: str):
    assert page.asked_for and all(one.startswith((url, "data:", "about:")) for one in page.asked_for)
    assert page.problems == []
    assert len(page.screenshot()) > 10_000


def test_files_are_answered_with_a_validator_and_a_policy(url: str):
    first = httpx.get(url)
    assert "default-src 'none'" in first.headers["content-security-policy"]
    assert httpx.get(url, headers={"if-none-match": first.headers["etag"]}).status_code == 304
    for name in ("console.js", "plots.js", "console.css", "icon.svg", "frame.html"):
        assert httpx.get(f"{url}/console/{name}").status_code == 200
    assert "sandbox" in httpx.get(f"{url}/console/frame.html").headers["content-security-policy"]
    assert httpx.get(f"{url}/console/../gateway.py").status_code == 404
    assert httpx.head(url).status_code == 200 and httpx.post(url).status_code in (404, 405)
    total = sum(path.stat().st_size for path in console_pages.FOLDER.iterdir())
    assert total < 64_000  # plain and fast
