"""What is checked before anything a client sent becomes an expert: format, dtype, shapes, finiteness, digests, card.

numpy only. The checks read the whole file and hash it, so they run off the event loop.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from cluster.settings import BackboneSettings
from metasepia.digests import is_digest, short
from metasepia.dispatch.centroid import TaskCentroid
from metasepia.dispatch.dispatcher import Dispatcher
from metasepia.errors import CorruptArtefact, InvalidRequest, UnknownName
from metasepia.experts.lora import LoraAdapter, Shapes, facts_of, linear_shapes, read_adapter
from metasepia.experts.mixing import BASE
from metasepia.experts.peft_files import read_peft
from metasepia.experts.vectors import ExpertVectors, FactorIndex, found_factors
from metasepia.models.prepared import PreparedBackbone
from metasepia.registry.entries import check_name
from serve.requests import bodies
from serve.requests.uploads import Upload

FIELDS = ("name", "backbone", "file", "config", "card")
MAX_CARD_DEPTH = 32
MAX_DESCRIPTION_CHARS = 400
"""`auto` may read it in a prompt beside others'."""
MAX_GAIN = 1e4
"""A multiplier beyond this is taken for a mistake: logits overflow long before."""


@dataclass(frozen=True, kw_only=True)
class Fits:
    """What experts of one backbone must fit."""

    id: str
    prepared: PreparedBackbone
    shapes: Shapes
    """Linear layers, which a LoRA may act on."""
    index: FactorIndex | None = None
    """Factored layers; None where the backbone has none, and takes no expert vectors."""
    s: Mapping[str, np.ndarray] | None = None
    """Singular values of each factored layer."""
    rank: int = 0
    """Leading singular vectors that are served, of each layer; 0: all of them."""

    @classmethod
    def of(cls, settings: BackboneSettings, prepared: PreparedBackbone, home: Path) -> "Fits":
        """From the headers of weights and factors on disk; a few kilobytes a layer are read."""
        shapes = linear_shapes(Path(prepared.path))
        index = find_index(prepared.digest, settings.expert_layers, home, settings.expert_rank)
        path = None if index is None else found_factors(index.digest, home, settings.expert_rank)
        if index is None or path is None:
            return cls(id=settings.id, prepared=prepared, shapes=shapes)
        digest = index.digest
        try:
            with safe_open(path, "np") as file:
                s = {name: file.get_tensor(f"{name}/s") for name in index.lengths}
        except (OSError, SafetensorError) as error:
            raise CorruptArtefact(
                f"factors {short(digest)}", f"their singular values cannot be read: {error}"
            ) from error
        return cls(id=settings.id, prepared=prepared, shapes=shapes, index=index, s=s, rank=settings.expert_rank)


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """An expert that may be registered."""

    name: str
    backbone: str
    """Id of the backbone."""
    digest: str
    blob: bytes
    card: dict[str, object]


def accept(upload: Upload, name: str | None, served: Mapping[str, Fits]) -> Accepted:
    """The expert in an upload. `name` None: the upload says it; `served` by backbone id.

    Raises InvalidRequest and UnknownName naming the field, NotSupported for adapters that are served in no way.
    """
    given = upload.text("name")
    if name is not None and given not in (None, name):
        raise InvalidRequest("name", f"{given!r:.80} and the path says {name!r:.80}; leave it out")
    chosen = check_expert_name(name or given)
    blob = upload.parts.get("file")
    if not blob:
        raise InvalidRequest("file", "this field is required: expert.safetensors, or PEFT's adapter_model.safetensors")
    # A safetensors file may begin with 0x80 too, the length of its header; its ninth byte opens that header.
    if blob[:4] == b"PK\x03\x04" or (blob[:1] == b"\x80" and blob[8:9] != b"{"):
        raise InvalidRequest(
            "file", "a pickle (adapter_model.bin or a .pt file); only safetensors are read: save it so"
        )
    fits = _backbone(upload.text("backbone"), served)
    try:
        adapter = _read(upload, blob, fits, served)
        fits = fits or _owner(adapter.backbone, served)
        _check(adapter, fits)
    except CorruptArtefact as error:
        raise InvalidRequest("file", str(error)) from None
    facts = facts_of(adapter)
    card = _card(upload.parts.get("card"), fits.prepared) | facts
    # Written anew, so that equal digests are equal bytes, whatever else a client's file holds.
    return Accepted(name=chosen, backbone=fits.id, digest=adapter.digest, blob=adapter.to_bytes(), card=card)


def check_expert_name(name: str | None) -> str:
    """Raises InvalidRequest for a name that no expert may have."""
    if name is None:
        raise InvalidRequest("name", "this field is required")
    check_name(name)
    if name == BASE:
        raise InvalidRequest("name", f"{BASE!r} is the base model's name in mixtures; choose another")
    if is_digest(name):
        raise InvalidRequest("name", "it looks like a digest; choose another")
    return name


def _backbone(id_: str | None, served: Mapping[str, Fits]) -> Fits | None:
    if id_ is None:
        return None
    if id_ not in served:
        raise UnknownName("backbone", id_[:80], tuple(served))
    return served[id_]


def _owner(digest: str, served: Mapping[str, Fits]) -> Fits:
    """The backbone that an expert names by digest; the first one of several with equal weights."""
    for fits in served.values():
        if fits.prepared.digest == digest:
            return fits
    known = ", ".join(f"{one.id} ({short(one.prepared.digest)})" for one in served.values())
    raise CorruptArtefact("the expert", f"it was made for backbone {short(digest)}, and this server has {known}")


def _read(upload: Upload, blob: bytes, fits: Fits | None, served: Mapping[str, Fits]) -> ExpertVectors | LoraAdapter:
    config = upload.parts.get("config")
    if config is None:
        return read_adapter(blob, "the expert")
    if fits is None:
        if len(served) > 1:
            raise InvalidRequest("backbone", f"a PEFT adapter names none by digest; one of {', '.join(served)}")
        fits = next(iter(served.values()))
    return read_peft(config, blob, fits.prepared.digest, fits.shapes)


def _check(adapter: ExpertVectors | LoraAdapter, fits: Fits) -> None:
    """Raises CorruptArtefact unless the expert fits the backbone and leaves its weights finite."""
    if adapter.backbone != fits.prepared.digest:
        made_for = f"it was made for backbone {short(adapter.backbone)} and {fits.id} is {short(fits.prepared.digest)}"
        raise CorruptArtefact("the expert", made_for)
    if isinstance(adapter, LoraAdapter):
        adapter.check_fits(fits.shapes, "the adapter")
        for layer, a in adapter.a.items():
            # A bound on the largest element of b a: no product of theirs may overflow.
            bound = float(np.linalg.norm(adapter.b[layer], axis=1).max()) * float(np.linalg.norm(a, axis=0).max())
            if not bound < MAX_GAIN:
                raise CorruptArtefact("the adapter", f"{layer}: its product has elements of up to {bound:.3g}")
        return
    if fits.index is None or fits.s is None:
        raise CorruptArtefact("the expert", f"{fits.id} has no factored layers (expert_layers), so it takes LoRA only")
    adapter.check_fits(fits.index, "the expert")
    if fits.rank and adapter.rank > fits.rank:
        kept = f"{fits.id} keeps the leading {fits.rank} (expert_rank)"
        raise CorruptArtefact("the expert", f"it has {adapter.rank} multipliers a layer and {kept}; truncate it")
    for layer, z in adapter.z.items():
        gain = float(np.abs(z).max())
        if adapter.renormalise:
            s = fits.s[layer]
            total = float((s[: len(z)] * z.astype(np.float64)).sum() + s[len(z) :].sum(dtype=np.float64))
            if not total > 0:
                raise CorruptArtefact("the expert", f"{layer}: sum(s z) is {total:g}, and renormalising divides by it")
            gain *= float(s.sum(dtype=np.float64)) / total
        if not gain <= MAX_GAIN:
            raise CorruptArtefact(
                "the expert", f"{layer} multiplies by up to {gain:.3g}; at most {MAX_GAIN:g} is taken"
            )


def _card(card: bytes | None, prepared: PreparedBackbone) -> dict[str, Any]:
    """A client's card, in which `auto` can use whatever is meant for it. Raises InvalidRequest naming the field."""
    if card is None:
        return {}
    try:
        tree = bodies.parse(card, MAX_CARD_DEPTH)
    except InvalidRequest as error:
        where = "card" if error.param in (None, "", "body") else f"card.{error.param}"
        raise InvalidRequest(where, error.message) from None
    description = tree.get("description", "")
    if not isinstance(description, str) or len(description) > MAX_DESCRIPTION_CHARS:
        raise InvalidRequest("card.description", f"must be a text of at most {MAX_DESCRIPTION_CHARS} characters")
    try:
        Dispatcher.of_card(tree, "0" * 64)
    except CorruptArtefact as error:
        raise InvalidRequest("card.dispatcher", error.problem) from None
    try:
        centroid = TaskCentroid.of_card(tree)
    except CorruptArtefact as error:
        raise InvalidRequest("card.dispatch", error.problem) from None
    if centroid is not None and centroid.backbone == prepared.digest:
        layers = prepared.num_layers
        if len(centroid.centre) != prepared.hidden_size or not -layers - 1 <= centroid.layer <= layers:
            wanted = f"{prepared.hidden_size} numbers of a layer from {-layers - 1} to {layers}"
            raise InvalidRequest("card.dispatch", f"a centroid of this backbone has {wanted}")
    return tree


def find_index(backbone: str, suffixes: Sequence[str], home: Path, rank: int = 0) -> FactorIndex | None:
    """The factors on disk of a backbone's layers that end in `suffixes`, all of these and no others.

    None also where fewer than the leading `rank` singular vectors are there; 0 wants all of them.
    """
    for path in sorted((home / "factors").glob("*.json")):
        index = FactorIndex.read(path.stem, home)
        ends = [{s for s in suffixes if f".{n}".removesuffix(".weight").endswith(f".{s}")} for n in index.lengths]
        if index.backbone == backbone and all(ends) and set().union(*ends) == set(suffixes):
            return index if found_factors(index.digest, home, rank) is not None else None
    return None
