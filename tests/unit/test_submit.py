"""What a submission does with a job of the same id: attach, tell, start again, refuse."""

import zipfile
from collections.abc import AsyncIterator
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any

import pytest
from ray._private.runtime_env import packaging
from ray.job_submission import JobStatus

from jobs import submit, submitted
from metasepia.sweeps.files import Files

ARGUMENTS = ["--profile", "laptop", "--out", "/data/x"]
DIGEST = submit.specification("sweep_tasks", ARGUMENTS, None)
ID = submit.id_of("sweep_tasks", DIGEST)


class Cluster:
    """Ray's client, with one job or none."""

    def __init__(self, status: JobStatus | None, specification: str = DIGEST) -> None:
        self.jobs: dict[str, Any] = {}
        if status is not None:
            self.jobs[ID] = self._job(status, {submit.SPECIFICATION: specification})
        self.submitted: list[dict[str, Any]] = []
        self.breaks = 1

    @staticmethod
    def _job(status: JobStatus, metadata: dict[str, str]) -> Any:
        return SimpleNamespace(status=status, metadata=metadata, driver_exit_code=None, message="")

    def get_job_info(self, id_: str) -> Any:
        if id_ not in self.jobs:
            raise RuntimeError("Request failed with status code 404: Job does not exist")
        return self.jobs[id_]

    def submit_job(self, **given: Any) -> None:
        assert given["submission_id"] not in self.jobs  # Ray refuses an id that it knows
        self.submitted.append(given)
        self.jobs[given["submission_id"]] = self._job(JobStatus.RUNNING, given["metadata"])

    def stop_job(self, id_: str) -> None:
        self.jobs[id_].status = JobStatus.STOPPED

    async def tail_job_logs(self, id_: str) -> AsyncIterator[str]:
        yield "step 1\n"
        if self.breaks:
            self.breaks -= 1
            raise ConnectionError("the head went away")
        yield "step 2 [of 2]\n"
        self.jobs[id_].status = JobStatus.SUCCEEDED


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Any:
    def open_(cluster: Cluster) -> Cluster:
        monkeypatch.setattr(submit, "_client", lambda _: cluster)
        return cluster

    return open_


def run(*options: str, arguments: list[str] = ARGUMENTS) -> int:
    return submit.main(["sweep_tasks", *options, "--", *arguments])


def test_a_new_job_is_submitted_and_followed_to_its_end_over_a_broken_connection(
    ray: Any, capsys: pytest.CaptureFixture[str]
):
    cluster = ray(Cluster(None))
    assert run() == 0
    (given,) = cluster.submitted
    assert given["submission_id"] == ID
    assert given["entrypoint"].endswith("sweep_tasks -- --profile laptop --out /data/x")
    assert given["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "30"}
    said = capsys.readouterr().out
    assert said.count("step 1\n") == said.count("step 2 [of 2]\n") == 1


@pytest.mark.parametrize(
    ("status", "again", "words"),
    [
        (JobStatus.RUNNING, 0, "is running already; following it"),
        (JobStatus.PENDING, 0, "is pending already"),
        (JobStatus.SUCCEEDED, 0, "has succeeded already"),
        (JobStatus.FAILED, 1, "was failed; it is started again"),
        (JobStatus.STOPPED, 1, "was stopped; it is started again"),
    ],
)
def test_the_same_specification_is_run_once(
    status: JobStatus, again: int, words: str, ray: Any, capsys: pytest.CaptureFixture[str]
):
    cluster = ray(Cluster(status))
    assert run() == 0
    assert [one["submission_id"] for one in cluster.submitted] == [f"{ID}-try2"][:again]
    assert words in capsys.readouterr().out


def test_an_id_of_another_specification_is_refused_and_stays(ray: Any, capsys: pytest.CaptureFixture[str]):
    cluster = ray(Cluster(JobStatus.FAILED, "another"))
    assert run("--id", ID, arguments=["--profile", "paper"]) == 2
    assert "a job of another specification has this one" in capsys.readouterr().err
    assert cluster.jobs[ID].status == JobStatus.FAILED


def test_stopping_ends_it_and_the_same_command_goes_on(ray: Any, capsys: pytest.CaptureFixture[str]):
    cluster = ray(Cluster(JobStatus.RUNNING))
    assert run("--stop") == 0
    assert run("--stop") == 0  # again: nothing to do
    for attempt in (2, 3):
        assert run("--no-wait") == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"{ID}-try{attempt}"
        assert run("--stop") == 0
    assert len(cluster.submitted) == 2


def test_results_have_a_folder_of_their_own(ray: Any, capsys: pytest.CaptureFixture[str]):
    cluster = ray(Cluster(None))
    assert run("--results", "s3://b/runs/", "--no-wait", arguments=["--out", "{results}/x"]) == 0
    id_ = submit.id_of("sweep_tasks", submit.specification("sweep_tasks", ["--out", "{results}/x"], "s3://b/runs/"))
    assert f"--results s3://b/runs/{id_}" in cluster.submitted[0]["entrypoint"]
    assert f"--out s3://b/runs/{id_}/x" in cluster.submitted[0]["entrypoint"]
    assert run(arguments=["--out", "{results}"]) == 2
    assert "given, where an argument has {results}" in capsys.readouterr().err


def test_what_cannot_be_submitted_is_told_in_words(capsys: pytest.CaptureFixture[str]):
    assert submit.main(["sweep", "--address", "http://127.0.0.1:9"]) == 2
    assert "one of batch, " in capsys.readouterr().err
    assert submit.main(["batch", "--address", "http://127.0.0.1:9"]) == 2
    assert "dashboard" in capsys.readouterr().err


def test_what_goes_along_is_code_and_not_much(tmp_path: Path):
    packaging.create_package(str(submit.ROOT), tmp_path / "sent.zip", include_gitignore=True, excludes=submit.EXCLUDES)
    with zipfile.ZipFile(tmp_path / "sent.zip") as sent:
        names = {PurePath(name).parts for name in sent.namelist() if not name.endswith("/")}
    assert {("jobs", "submitted.py"), ("metasepia", "errors.py"), ("cluster", "profiles", "laptop.toml")} <= names
    assert {parts[0] for parts in names} == {name[2:] for name in submit.EXCLUDES if name.startswith("!/")}
    assert not any(parts[-1].endswith(".pyc") for parts in names)
    assert {"batch", "sweep_tasks", "embed_tasks", "train_experts"} <= set(submit.names())
    assert 1 < submit._upload_mib() < submit.MAX_UPLOAD_MIB


@pytest.mark.filterwarnings("ignore:.*jobs.batch.*found in sys.modules")
def test_the_end_of_a_job_is_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--results", str(tmp_path), "--id", "x", "batch", "--", "--input", "/nowhere"]
    assert submitted.main([*words, "--output", "o", "--task", "embed", "--model", "m"]) == 2
    index = Files.at(str(tmp_path)).read(submitted.INDEX)
    assert index is not None
    assert b'"exit": 2' in index
    assert b'"ended": null' not in index
