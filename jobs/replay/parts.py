"""What an answer was made by, found again by digest on this machine."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tokenizers import Tokenizer

from cluster.settings import BackboneSettings, Settings
from metasepia import encoders
from metasepia.backbone import ReferenceBackbone
from metasepia.digests import short
from metasepia.errors import UnknownName
from metasepia.experts.factors import factors_of
from metasepia.experts.lora import LoraAdapter, read_adapter
from metasepia.experts.mixing import base_of
from metasepia.experts.svf import linear_shapes
from metasepia.experts.vectors import ExpertVectors
from metasepia.modalities import loading
from metasepia.models import checkpoints
from metasepia.models.prepared import PreparedBackbone
from metasepia.reasoning import shipped
from metasepia.reasoning.named import EmbeddedContext
from metasepia.reasoning.shipped import LoadedModule
from metasepia.registry.reading import read_blob
from metasepia.rows import Adapter


class Embeds(Protocol):
    """An encoder of texts, pictures or sounds."""

    @property
    def digest(self) -> str: ...
    def embed(self, items: Sequence[Any], /) -> np.ndarray: ...


class Parts:
    """Everything that the settings name, loaded when asked for by digest. Raises UnknownName for what is not here."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def blob(self, digest: str) -> bytes:
        return read_blob(self._settings.home / "registry", digest)

    def context(self, digest: str) -> EmbeddedContext:
        return EmbeddedContext.from_bytes(self.blob(digest), digest)

    def expert(self, digest: str) -> ExpertVectors | LoraAdapter:
        expert = read_adapter(self.blob(digest), f"expert {short(digest)}")
        if expert.digest != digest:
            raise UnknownName("expert", digest, (expert.digest,))
        return expert

    def module(self, digest: str) -> LoadedModule:
        found = {}
        for name in dict.fromkeys((*self._settings.reasoning.modules, *shipped.names())):
            loaded = shipped.load(name)
            if loaded.digest == digest:
                return loaded
            found[loaded.name] = loaded.digest
        raise UnknownName("reasoning module", digest, _named(found))

    def encoder(self, digest: str) -> Embeds:
        found = {}
        for name, encoder in self._encoders:
            if encoder.digest == digest:
                return encoder
            found[name] = encoder.digest
        raise UnknownName("encoder", digest, _named(found))

    def backbone(self, digest: str) -> PreparedBackbone:
        return self._of(digest)[1]

    def reference(self, digest: str, adapter: Adapter = ()) -> ReferenceBackbone:
        """In float32, with the factors and experts that the adapter needs; factors that are missing are made."""
        settings, prepared = self._of(digest)
        model = checkpoints.load(prepared, torch.float32, "cpu")
        if not adapter:
            return ReferenceBackbone(model, digest)
        experts = self.experts(adapter)
        low_rank = [expert for expert in experts.values() if isinstance(expert, LoraAdapter)]
        for expert in low_rank:
            expert.check_fits(linear_shapes(model, {}))
        if len(low_rank) == len(experts):
            return ReferenceBackbone(model, digest, experts=experts)
        factors = factors_of(model, settings.expert_layers, digest, self._settings.home)
        for expert in experts.values():
            if isinstance(expert, ExpertVectors):
                expert.check_fits(factors.index)
        return ReferenceBackbone(model, digest, factors=factors, experts=experts)

    def experts(self, adapter: Adapter) -> dict[str, ExpertVectors | LoraAdapter]:
        """Those of an adapter by digest, without the base, which is stored nowhere."""
        found: dict[str, ExpertVectors | LoraAdapter] = {}
        missing: list[UnknownName] = []
        for digest, _ in adapter:
            try:
                found[digest] = self.expert(digest)
            except UnknownName as error:
                missing.append(error)
        bases = {base_of(one).digest for one in found.values() if isinstance(one, ExpertVectors)}
        for error in missing:
            if error.name not in bases:
                raise error
        return found

    @cached_property
    def _backbones(self) -> dict[str, tuple[BackboneSettings, PreparedBackbone]]:
        prepared = [(one, checkpoints.prepare(one.source, self._settings.home)) for one in self._settings.backbones]
        return {one.digest: (settings, one) for settings, one in prepared}

    def _of(self, digest: str) -> tuple[BackboneSettings, PreparedBackbone]:
        if digest not in self._backbones:
            here = {settings.id: one for one, (settings, _) in self._backbones.items()}
            raise UnknownName("backbone", digest, _named(here))
        return self._backbones[digest]

    @property
    def _encoders(self) -> Iterator[tuple[str, Embeds]]:
        for one in self._settings.encoders:
            if one.modality == "text":
                yield one.id, encoders.load(one.source)
            else:
                yield one.id, loading.load(one.modality, one.source)


def plain(prepared: PreparedBackbone, text: str) -> tuple[int, ...]:
    """The tokens of a text with the special ones that its tokenizer adds, as the door reads it."""
    return tuple(tokenizer_of(prepared).encode(text).ids)


def tokenizer_of(prepared: PreparedBackbone) -> Tokenizer:
    return Tokenizer.from_file(str(Path(prepared.tokenizer_dir) / "tokenizer.json"))


def _named(found: dict[str, str]) -> tuple[str, ...]:
    return tuple(f"{name} ({short(digest)})" for name, digest in found.items())
