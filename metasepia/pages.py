"""Self-contained HTML reports: headings, paragraphs, tables and PNG figures in one file that needs no network.

Everything given is text and is escaped; figures are data URIs. The same calls give the same bytes: no clock is read.
"""

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path

from metasepia.errors import InvalidSettings

_PNG = b"\x89PNG\r\n\x1a\n"

_STYLE = """
:root { color-scheme: light dark; --text: #1b1e23; --quiet: #5b6370; --line: #d9dde3; --back: #fff; --band: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e8eb; --quiet: #a0a8b3; --line: #3a4049; --back: #16181c; --band: #1f2329; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 60rem; color: var(--text); background: var(--back);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
p, ul, pre, figure, .table { margin: 0 0 1rem; }
pre { padding: .75rem; overflow-x: auto; background: var(--band); font: 13px/1.45 ui-monospace, monospace; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption, figcaption { text-align: left; color: var(--quiet); font-size: .9rem; padding: .25rem 0 .5rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { background: var(--band); }
td.number { text-align: right; white-space: nowrap; }
img { display: block; max-width: 100%; height: auto; background: #fff; }
@media print {
  :root { --text: #000; --quiet: #333; --line: #999; --back: #fff; --band: #fff; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  h2 { break-after: avoid; } figure, tr, pre { break-inside: avoid; } pre { white-space: pre-wrap; }
  .table { overflow: visible; }
}
"""


class Page:
    """One report, written top to bottom; every method but `write` and `html` returns the page itself.

    Page("Title").text("What was run.").section("Figures").figure(png, "Figure 1", "A curve that rises").write(path)
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []

    def section(self, title: str) -> "Page":
        return self._add(f"<h2>{html.escape(title)}</h2>")

    def text(self, *paragraphs: str) -> "Page":
        """Each argument is a paragraph of plain text."""
        return self._add(*(f"<p>{html.escape(one)}</p>" for one in paragraphs))

    def items(self, items: Sequence[str]) -> "Page":
        """A list with bullets."""
        return self._add("<ul>", *(f"<li>{html.escape(one)}</li>" for one in items), "</ul>")

    def code(self, text: str) -> "Page":
        """A command or file, as it is."""
        return self._add(f"<pre>{html.escape(text)}</pre>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> "Page":
        """Numbers stand to the right, floats with four significant digits; None is an empty cell.

        Raises InvalidSettings for a row that is not as long as the header.
        """
        for row in rows:
            if len(row) != len(header):
                raise InvalidSettings("row", list(row), f"{len(header)} cells long, as the header {list(header)}")
        head = "".join(f'<th scope="col">{html.escape(one)}</th>' for one in header)
        body = [f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows]
        title = [f"<caption>{html.escape(caption)}</caption>"] if caption else []
        start = '<div class="table"><table>'
        return self._add(start, *title, f"<thead><tr>{head}</tr></thead>", "<tbody>", *body, "</tbody></table></div>")

    def figure(self, png: bytes, caption: str, alt: str) -> "Page":
        """A picture; `alt` says what it shows to those who do not see it. Raises InvalidSettings for no PNG."""
        if not png.startswith(_PNG):
            raise InvalidSettings("png", png[:8], "the bytes of a PNG file")
        data = base64.b64encode(png).decode()
        image = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'
        return self._add(f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>")

    def html(self) -> str:
        """The whole document."""
        title = html.escape(self.title)
        head = (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n"
        )
        return "\n".join([f"{head}<body>\n<h1>{title}</h1>", *self._parts, "</body>\n</html>\n"])

    def write(self, path: Path) -> Path:
        """Writes the file whole or not at all, and returns its path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            scratch.write_text(self.html(), encoding="utf-8")
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)
        return path

    def _add(self, *parts: str) -> "Page":
        self._parts += parts
        return self


def _cell(value: object) -> str:
    if value is None:
        return "<td></td>"
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return f"<td>{html.escape(str(value))}</td>"
    number = float(value)  # pyright: ignore[reportArgumentType]  # numpy's scalars too
    text = f"{number:,.0f}" if _whole(value, number) else f"{number:.4g}"
    return f'<td class="number">{text}</td>'


def _whole(value: object, number: float) -> bool:
    return hasattr(value, "__index__") or (number.is_integer() and abs(number) >= 1e4)
