"""What the commands of `metasepia` share: the server's routes, its refusals as exit statuses, and what is printed."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported when something is asked: help and misuse need no client
    import httpx

URL = "http://127.0.0.1:8000"
REFUSED, UNKNOWN, LATER, NOBODY = 1, 3, 4, 5
_EXIT_OF_STATUS = {404: UNKNOWN, 410: UNKNOWN, 429: LATER, 503: LATER, 504: LATER}
POLL_S = 1.0


class Failed(Exception):
    """What ends the program: words for stderr, and its exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message, status)
        self.message, self.status = message, status


class Door:
    """The server's routes, its errors as `Failed`."""

    def __init__(self, url: str, timeout_s: float) -> None:
        import httpx

        self._url = url.rstrip("/")
        headers = {"x-request-timeout-seconds": f"{timeout_s:g}"}
        self._client = httpx.Client(base_url=self._url, timeout=timeout_s + 5.0, headers=headers)

    def ask(self, method: str, path: str, **what: Any) -> "httpx.Response":
        import httpx

        try:
            response = self._client.request(method, path, **what)
        except httpx.TimeoutException:
            raise Failed(f"{self._url} did not answer in time; give more with --timeout", LATER) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Failed(
                f"nobody answers at {self._url} ({error}); is it running? --url or METASEPIA_URL says where", NOBODY
            ) from None
        if response.is_success:
            return response
        try:
            error = response.json()["error"]
            words, code = str(error["message"]), str(error["code"])
        except (ValueError, KeyError, TypeError):
            words, code = f"an answer that is not this server's: {response.text[:200]!r}", "unknown"
        wait = response.headers.get("retry-after")
        words += f" (retry after {wait} s)" if wait else ""
        raise Failed(f"{words} [{response.status_code} {code}]", _EXIT_OF_STATUS.get(response.status_code, REFUSED))

    def json(self, method: str, path: str, **what: Any) -> Any:
        return self.ask(method, path, **what).json()

    def everything(self, path: str) -> list[dict[str, Any]]:
        """All pages of a list."""
        found: list[dict[str, Any]] = []
        params: dict[str, Any] = {"limit": 1000}
        while True:
            page = self.json("GET", path, params=params)
            found += page["data"]
            if not page.get("has_more"):
                return found
            params["after"] = page["last_id"]


def add_verb(
    verbs: Any,
    name: str,
    run: Callable[[Door, argparse.Namespace], None],
    about: str,
    shared: argparse.ArgumentParser,
) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = verbs.add_parser(name, help=about, description=about, parents=[shared])
    made.set_defaults(run=run)
    return made


def quoted(name: str) -> str:
    from urllib.parse import quote

    return quote(name, safe="")


def existing(path: Path) -> Path:
    if not path.is_file():
        raise Failed(f"{path} does not exist", REFUSED)
    return path


def json_file(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(existing(path).read_text())
    except ValueError as error:
        raise Failed(f"{path} is not JSON: {error}", REFUSED) from None
    if not isinstance(found, dict):
        raise Failed(f"{path} must be a JSON object", REFUSED)
    return found


def show(options: argparse.Namespace, answer: Any, words: Callable[[], None]) -> None:
    if options.json:
        print(json.dumps(answer, ensure_ascii=False))
    else:
        words()


def show_fields(options: argparse.Namespace, shown: dict[str, Any]) -> None:
    def words() -> None:
        wide = max(map(len, shown))
        for key, value in shown.items():
            if value not in (None, {}, []):
                text = value if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)
                print(f"{key:{wide}}  {text}")

    show(options, shown, words)


def cell(value: Any, column: str) -> str:
    if value is None:
        return "-"
    return str(value)[:12] if column == "digest" else f"{value:,}" if isinstance(value, int) else str(value)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def examples_of(path: Path) -> list[Any]:
    """A JSON array, or an object a line."""
    text = existing(path).read_text()
    try:
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise Failed(f"{path} is neither a JSON array nor JSON lines: {error}", REFUSED) from None
