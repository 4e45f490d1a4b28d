"""GET /v1/jobs over the door: what is the tenant's, what Ray's dashboard can tell, and what it cannot."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from metasepia.errors import Unavailable
from serve import job_routes
from serve.access.principal import Principal, asking
from tests.doors import Bench
from tests.unit.test_prompts import write_byte_tokenizer


def details(id_: str, status: JobStatus, start_ms: int, **metadata: str) -> Any:
    return SimpleNamespace(
        submission_id=id_, status=status, start_time=start_ms, end_time=None, message="m" * 9999, metadata=metadata
    )


JOBS = [
    details("sweep-1", JobStatus.RUNNING, 2_000, job="sweep_tasks", tenant="local"),
    details("plain-1", JobStatus.SUCCEEDED, 1_000),
    details("acme-1", JobStatus.FAILED, 3_000, tenant="acme"),
]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = Bench(write_byte_tokenizer(tmp_path))
    told = [job_routes._ray_json(one) for one in JOBS]
    monkeypatch.setattr(bench.door.jobs, "_fresh", job_routes._Fresh(lambda: told))
    return bench


def test_jobs_are_the_tenants_own_and_the_newest_is_first(bench: Bench):
    listed = bench.get("/v1/jobs").json()
    assert [(one["id"], one["name"], one["status"]) for one in listed["data"]] == [
        ("sweep-1", "sweep_tasks", "running"),
        ("plain-1", "plain-1", "succeeded"),
    ]
    assert listed["ray"] == {"available": True, "reason": None}
    assert len(listed["data"][0]["message"]) == job_routes.MAX_MESSAGE_CHARS
    assert "tenant" not in listed["data"][0]
    assert bench.get("/v1/jobs?limit=1").json()["has_more"] is True


def test_anothers_job_is_as_unknown_as_one_that_is_not_there(bench: Bench):
    assert bench.get("/v1/jobs/sweep-1").json()["status"] == "running"
    foreign, absent = bench.get("/v1/jobs/acme-1"), bench.get("/v1/jobs/none-1")
    assert foreign.status_code == absent.status_code == 404
    assert foreign.text.replace("acme-1", "none-1") == absent.text
    with asking(Principal("acme", frozenset({"infer"}))):
        assert [one["id"] for one in bench.get("/v1/jobs").json()["data"]] == ["acme-1"]


def test_without_a_dashboard_the_graphs_own_works_are_listed_and_rays_are_a_503(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    def away() -> Any:
        raise Unavailable("Ray's list of jobs (its dashboard does not answer; ray.dashboard)", 30.0)

    monkeypatch.setattr(bench.door.jobs, "_fresh", job_routes._Fresh(away))
    listed = bench.get("/v1/jobs")
    assert listed.status_code == 200
    assert listed.json()["ray"]["available"] is False
    for path in ("/v1/jobs?kind=ray", "/v1/jobs/sweep-1"):
        answer = bench.get(path)
        assert answer.status_code == 503
        assert "ray.dashboard" in answer.json()["error"]["message"]
        assert int(answer.headers["retry-after"]) >= 1


def test_rays_list_is_asked_for_once_by_many(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    bench, asked = Bench(write_byte_tokenizer(tmp_path)), []
    monkeypatch.setattr(bench.door.jobs, "_fresh", job_routes._Fresh(lambda: asked.append(1) or []))

    async def many(client: Any) -> None:
        import asyncio

        await asyncio.gather(*(client.get("/v1/jobs") for _ in range(8)))

    bench.run(many)
    assert len(asked) == 1


@pytest.mark.parametrize("query", ["kind=cron", "limit=0", "limit=201", "limit=x"])
def test_a_query_that_makes_no_sense_is_a_400(query: str, bench: Bench):
    assert bench.get(f"/v1/jobs?{query}").status_code == 400


def test_without_ray_in_this_process_the_reason_is_told():
    with pytest.raises(Unavailable, match="dashboard does not answer"):
        job_routes.submitted_jobs()
