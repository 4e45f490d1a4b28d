"""What a sweep has computed, as write-once objects at a `pyarrow.fs` URI: JSON, Parquet and safetensors, no pickle.

    URI/manifest.json                                   the plan and its digest
    URI/packs/00007/rows-00001000-<stamp>.parquet       figures of one pack at one step
    URI/packs/00007/state-00001000-<stamp>.safetensors  what the pack goes on from; only the latest is kept
    URI/packs/00007/done.json                           which rows a finished pack has
    URI/packs/00007/stopped.json                        at which step a scheduler gave the pack up (ASHA alone)
    URI/table.parquet                                   all rows, sorted; made from the others, so never read back

A stamp is the first 16 digits of the sha256 of the object's bytes, so a torn object is told from a whole one on any
filesystem, and no object names a machine, a device or a time. Each also says which sweep it is of.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from torch import Tensor

from metasepia.digests import canonical_json, short
from metasepia.errors import CorruptArtefact, InvalidSettings, NotSupported
from metasepia.sweeps.files import Files, stamp_of
from metasepia.sweeps.plan import SweepPlan

ROWS = pa.schema(
    [
        pa.field("trial", pa.int32(), nullable=False),  # in `measure` the place in the pack, in the table the index
        pa.field("step", pa.int64(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),  # -1: all positions together
        pa.field("split", pa.string(), nullable=False),  # "pretraining", "new" or ""
        pa.field("value", pa.float64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),  # "ok", or what happened, as "diverged"
    ]
)
KEY = ("trial", "step", "metric", "split", "position")
"""The table's order; no two rows have the same."""
FORMAT = 1
MANIFEST, TABLE = "manifest.json", "table.parquet"
Kind = Literal["rows", "state"]
SUFFIX: dict[str, str] = {"rows": "parquet", "state": "safetensors"}
_OBJECT = re.compile(r"(rows|state)-(\d{8,})-([0-9a-f]{16})\.(?:parquet|safetensors)")


@dataclass(frozen=True)
class Stored:
    """One object of a pack, as its name tells."""

    kind: str
    step: int
    stamp: str
    name: str


class SweepStore:
    """One sweep's objects. Any number of processes may hold one; each writes the packs that it runs.

    Raises StorageFailed where the filesystem refuses (disk full, no permission), CorruptArtefact for an object that is
    torn or says what it cannot, by name.
    """

    def __init__(self, files: Files, plan: SweepPlan) -> None:
        """For `open` and `read`; checks nothing."""
        self._files, self.plan = files, plan

    @classmethod
    def open(cls, uri: str, plan: SweepPlan, filesystem: pafs.FileSystem | None = None) -> "SweepStore":
        """The sweep `plan` at `uri`: begun if there is nothing, else gone on with.

        `uri`: a local path, file:///..., s3://bucket/..., or what else `pyarrow.fs` knows; with `filesystem`, a path in
        it. Raises InvalidSettings where another sweep is stored, naming both digests, and CorruptArtefact for a torn
        manifest.
        """
        files = Files.at(uri, filesystem)
        store = cls(files, plan)
        if files.read(MANIFEST) is None:
            if files.exists(TABLE):
                allowed = f"a folder without a {TABLE} of someone else's, or the folder of a sweep, with its {MANIFEST}"
                raise InvalidSettings("uri", files.uri, allowed)
            manifest = {"format": FORMAT, "digest": plan.digest, "plan": plan.to_json()}
            files.write(MANIFEST, canonical_json(manifest) + b"\n", if_absent=True)
        found = cls.read(uri, filesystem).plan.digest  # also where it was just written: someone may have been faster
        if found != plan.digest:
            mine, theirs = short(plan.digest), short(found)
            allowed = f"a new folder or that of this sweep, {mine}; this one holds the sweep {theirs}"
            raise InvalidSettings("uri", files.uri, allowed)
        return store

    @classmethod
    def read(cls, uri: str, filesystem: pafs.FileSystem | None = None) -> "SweepStore":
        """The sweep that is stored at `uri`, whichever it is. Raises InvalidSettings where there is none."""
        files = Files.at(uri, filesystem)
        content = files.read(MANIFEST)
        if content is None:
            raise InvalidSettings("uri", files.uri, f"a sweep's folder, with its {MANIFEST}, that every node can reach")
        return cls(files, _plan_of(content, files.path_of(MANIFEST)))

    @property
    def uri(self) -> str:
        """Where it is, absolute, for people."""
        return self._files.uri

    @property
    def address(self) -> str:
        """The same for programs: it may hold secrets (`Files.address`)."""
        return self._files.address

    # -- one pack

    def put_rows(self, pack: int, step: int, table: pa.Table) -> None:
        """Keeps what `PackWork.measure` gave at `step`; `trial` becomes the index in the plan.

        Raises InvalidSettings for other columns than ROWS', a trial that the pack has not, a row of another step or a
        second row of one key; CorruptArtefact where the same step was kept with other figures.
        """
        if any(column.null_count for column in table.columns):
            raise InvalidSettings("measure()", "null", "without nulls; a figure that is none is NaN with a status")
        table, members = _cast(table), self.plan.packs[pack]
        places = table["trial"].to_numpy()
        if len(places) and not (places.min() >= 0 and places.max() < len(members)):
            raise InvalidSettings("measure().trial", f"up to {places.max()}", f"a place in the pack of {len(members)}")
        steps = set(table["step"].to_pylist())
        if not steps <= {step}:
            raise InvalidSettings("measure().step", sorted(steps), f"{step}, where the work is")
        if table.group_by(list(KEY)).aggregate([]).num_rows < table.num_rows:
            raise InvalidSettings("measure()", "rows alike", f"one row for each of {', '.join(KEY)}")
        table = table.set_column(0, ROWS.field("trial"), pa.array([members[i] for i in places], pa.int32()))
        self._put(pack, "rows", step, _parquet(_sorted(table), {"sweep": self.plan.digest}))

    def put_state(self, pack: int, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Keeps what `PackWork.state` gave at `step`, then forgets the pack's earlier states."""
        from safetensors.torch import save

        held = {
            name: one.detach().to("cpu", copy=True).contiguous() for name, one in tensors.items()
        }  # none share bytes
        self._put(pack, "state", step, save(held, {"sweep": self.plan.digest}))
        for one in self._stored(pack):
            if one.kind == "state" and one.step < step:
                self._files.delete(self._path(pack, one))

    def latest(self, pack: int, stops: tuple[int, ...]) -> tuple[int, dict[str, Tensor]] | None:
        """The last step whose state is whole and before which every one of `stops` has whole rows, and that state.

        None: the pack begins at step 0. What is torn counts as not there and is written again.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        stored = self._stored(pack)
        for one in sorted((one for one in stored if one.kind == "state"), key=lambda one: -one.step):
            if not all(self._has_rows(pack, stop, stored) for stop in stops if stop < one.step):
                continue
            content = self._read(pack, one)
            if content is None:
                continue
            path = self._files.path_of(self._path(pack, one))
            try:
                tensors = load(content)
            except SafetensorError as error:
                raise CorruptArtefact(path, str(error)) from error
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            sweep = header.get("__metadata__", {}).get("sweep", "")
            if sweep != self.plan.digest:
                raise self._of_another(path, sweep)
            return one.step, tensors
        return None

    def has_rows(self, pack: int, step: int) -> bool:
        """Whole rows of this step are kept."""
        return self._has_rows(pack, step, self._stored(pack))

    def finish(self, pack: int, stops: tuple[int, ...]) -> None:
        """Writes that the pack is done, with the stamps of its rows at `stops`; clears what a killed writer left."""
        stamps = {one.step: one.stamp for one in self._stored(pack) if one.kind == "rows"}
        done = {"sweep": self.plan.digest, "rows": {str(stop): stamps[stop] for stop in stops}}
        self._files.write(f"{_folder(pack)}/done.json", canonical_json(done) + b"\n")
        self._files.clear_leftovers(_folder(pack))

    def done(self, pack: int) -> bool:
        """The pack was finished and its rows are all there. A torn `done.json` counts as none: it is written again."""
        return self._done_rows(pack) is not None

    def give_up(self, pack: int, step: int) -> None:
        """Writes that a scheduler stopped the pack at `step`; a sweep with that scheduler does not run it again."""
        self._files.write(f"{_folder(pack)}/stopped.json", canonical_json({"step": step}) + b"\n")

    def given_up(self, pack: int) -> bool:
        return self._files.exists(f"{_folder(pack)}/stopped.json")

    # -- the table

    def table(self, *, partial: bool = False) -> pa.Table:
        """All rows, sorted by KEY; with `partial` also of packs that are not done, and none of what is torn.

        Raises InvalidSettings where packs are not done, CorruptArtefact naming an object that is torn.
        """
        undone = [pack for pack in range(len(self.plan.packs)) if not self.done(pack)]
        if undone and not partial:
            allowed = f"a finished sweep; {len(undone)} of its {len(self.plan.packs)} packs are not done"
            raise InvalidSettings("uri", self.uri, allowed)
        parts = [ROWS.empty_table()]
        for pack in range(len(self.plan.packs)):
            named = self._done_rows(pack)
            for one in self._stored(pack):
                if one.kind != "rows" or (named is not None and named.get(one.step) != one.stamp):
                    continue
                content = self._read(pack, one)
                if content is not None:
                    parts.append(self._rows_of(content, self._path(pack, one)))
                elif not partial:
                    path = self._files.path_of(self._path(pack, one))
                    raise CorruptArtefact(path, "its bytes are not those it was written with; delete it and go on")
        return _sorted(pa.concat_tables(parts))

    def write_table(self, *, partial: bool = False) -> str:
        """Writes the table as Parquet, with the plan in the schema's metadata, and returns its path.

        The bytes are a function of the rows, the plan and the version of pyarrow.
        """
        rows = self.table(partial=partial)
        told = {"sweep": self.plan.digest, "plan": canonical_json(self.plan.to_json()).decode()}
        if partial:
            told["partial"] = "packs were stopped or had not finished: which ones may depend on timing"
        self._files.write(TABLE, _parquet(rows, told))
        return self._files.path_of(TABLE)

    # -- objects

    def _put(self, pack: int, kind: Kind, step: int, content: bytes) -> None:
        stamp = stamp_of(content)
        for one in self._stored(pack):
            if (one.kind, one.step) != (kind, step):
                continue
            whole = self._read(pack, one) is not None
            if whole and one.stamp == stamp:
                return
            if whole:
                raise CorruptArtefact(
                    self._files.path_of(self._path(pack, one)),
                    f"step {step} of pack {pack}, computed again, gave other bytes ({stamp}): begun on another kind of "
                    "machine or with another version? delete the pack's folder to compute all of it here",
                )
            self._files.delete(self._path(pack, one))
        self._files.write(f"{_folder(pack)}/{kind}-{step:08d}-{stamp}.{SUFFIX[kind]}", content)

    def _stored(self, pack: int) -> list[Stored]:
        """By name, so by kind and step."""
        names = sorted(self._files.names(_folder(pack)))
        matches = [(name, match) for name in names if (match := _OBJECT.fullmatch(name))]
        return [Stored(match[1], int(match[2]), match[3], name) for name, match in matches]

    def _read(self, pack: int, one: Stored) -> bytes | None:
        """Its bytes; None where they are not what its name says, or gone."""
        content = self._files.read(self._path(pack, one))
        return content if content is not None and stamp_of(content) == one.stamp else None

    def _path(self, pack: int, one: Stored) -> str:
        return f"{_folder(pack)}/{one.name}"

    def _has_rows(self, pack: int, step: int, stored: list[Stored]) -> bool:
        mine = [one for one in stored if (one.kind, one.step) == ("rows", step)]
        return any(self._read(pack, one) is not None for one in mine)

    def _done_rows(self, pack: int) -> dict[int, str] | None:
        """Step to stamp, as done.json says; None where the pack is not done or rows of it are gone."""
        content = self._files.read(f"{_folder(pack)}/done.json")
        if content is None:
            return None
        try:
            read = json.loads(content)
            sweep, rows = str(read["sweep"]), {int(step): str(stamp) for step, stamp in read["rows"].items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            return None
        if sweep != self.plan.digest:
            raise self._of_another(self._files.path_of(f"{_folder(pack)}/done.json"), sweep)
        here = {(one.step, one.stamp) for one in self._stored(pack) if one.kind == "rows"}
        return rows if rows.items() <= here else None

    def _rows_of(self, content: bytes, path: str) -> pa.Table:
        read = pq.read_table(pa.BufferReader(content))
        sweep = (read.schema.metadata or {}).get(b"sweep", b"").decode()
        if sweep != self.plan.digest:
            raise self._of_another(self._files.path_of(path), sweep)
        return read.replace_schema_metadata(None).cast(ROWS)

    def _of_another(self, path: str, sweep: str) -> CorruptArtefact:
        return CorruptArtefact(path, f"it is of the sweep {short(sweep) or 'unknown'}, not {short(self.plan.digest)}")


def _folder(pack: int) -> str:
    return f"packs/{pack:05d}"


def _plan_of(content: bytes, path: str) -> SweepPlan:
    """The plan in a manifest. Raises CorruptArtefact, with the way out, for one that is torn or edited."""
    way_out = "; delete it and start the same sweep again: its packs are kept, they say which sweep they are of"
    try:
        manifest = json.loads(content)
        version, digest, plan = (manifest[name] for name in ("format", "digest", "plan"))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptArtefact(path, f"it is half-written or no manifest ({error}){way_out}") from error
    if version != FORMAT:
        raise NotSupported(f"{path} of format {version}", f"this version reads format {FORMAT}")
    made = SweepPlan.from_json(plan)
    if made.digest != digest:
        raise CorruptArtefact(path, f"its plan has the digest {short(made.digest)}, not {short(str(digest))}{way_out}")
    return made


def _cast(table: pa.Table) -> pa.Table:
    """Columns by name, in order and type. Raises InvalidSettings naming what differs."""
    if sorted(table.column_names) != sorted(ROWS.names):
        raise InvalidSettings("measure()", table.column_names, f"a table of the columns {', '.join(ROWS.names)}")
    try:
        return table.select(ROWS.names).replace_schema_metadata(None).cast(ROWS)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        allowed = f"of the types {', '.join(f'{one.name} {one.type}' for one in ROWS)} ({error})"
        raise InvalidSettings("measure()", [str(one) for one in table.schema.types], allowed) from error


def _sorted(table: pa.Table) -> pa.Table:
    """In KEY's order, in one chunk, every NaN with the same bits."""
    table = table.sort_by([(name, "ascending") for name in KEY])
    value = table["value"].to_numpy()
    value = np.where(np.isnan(value), np.nan, value)
    return table.set_column(ROWS.get_field_index("value"), ROWS.field("value"), pa.array(value)).combine_chunks()


def _parquet(table: pa.Table, metadata: Mapping[str, Any]) -> bytes:
    """Bytes that depend on the table, the metadata and pyarrow's version alone."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata(dict(sorted(metadata.items()))),
        sink,
        row_group_size=1 << 20,
        version="2.6",
        compression="zstd",
        compression_level=3,
        use_dictionary=True,
        write_statistics=True,
    )
    return sink.getvalue().to_pybytes()
