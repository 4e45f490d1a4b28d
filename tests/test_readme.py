"""What the README shows is what the project says."""

import json
from pathlib import Path

from benchmarks import table
from cluster import settings
from serve.main import curl_lines

ROOT = Path(__file__).parents[1]


def test_the_readme_shows_the_three_requests_that_make_serve_prints():
    read = settings.read("laptop", {})
    backbone = read.backbones[0].id
    models = [{"id": backbone, "x_info": {"kind": "backbone"}}]
    for card in (ROOT / "metasepia/assets/experts").glob("*/card.json"):
        entry = {"kind": "expert", "card": json.loads(card.read_text())}
        models.append({"id": f"{backbone}:{card.parent.name}", "x_info": entry})
    readme = (ROOT / "README.md").read_text()
    for line in curl_lines(f"http://{read.http.host}:{read.http.port}", models, [e.id for e in read.encoders]):
        assert line in readme


def test_the_readme_holds_the_figures_of_the_committed_results():
    assert table.render() in (ROOT / "README.md").read_text()


def test_every_file_that_the_readme_names_exists():
    words = (ROOT / "README.md").read_text().replace("`", " ").split()
    named = [w.rstrip(".,;:") for w in words if w.startswith(("metasepia/", "serve/", "actors/", "cluster/", "jobs/"))]
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]
