"""What comes with the package, by its cards, without torch: the reasoning module in force and the experts."""

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.registry import RegistryClient
from metasepia.errors import CorruptArtefact, UnknownName
from metasepia.experts.lora import facts_of, read_adapter
from metasepia.experts.shipped import CARD, EXPERTS, FILE
from metasepia.registry.entries import SHARED, Artefact

ASSETS = Path(__file__).parents[1] / "metasepia" / "assets"


@dataclass(frozen=True)
class ModuleCard:
    """A trained reasoning module by name and digest."""

    name: str
    digest: str


def module_card(name: str, folder: Path = ASSETS / "modules") -> ModuleCard:
    """The card of `default`, of a shipped module, or of one by its path. Raises UnknownName, CorruptArtefact."""
    if name == "default":
        name = json.loads((folder / "default.json").read_text())["module"]
    path = folder / name if (folder / name / "card.json").is_file() else Path(name)
    path = path.parent if path.suffix == ".safetensors" else path
    try:
        card = json.loads((path / "card.json").read_text())
    except FileNotFoundError:
        known = tuple(sorted(one.parent.name for one in folder.glob("*/card.json")))
        raise UnknownName("reasoning module", name, known) from None
    if not isinstance(card.get("digest"), str):
        raise CorruptArtefact(str(path / "card.json"), "it names no digest")
    return ModuleCard(path.name, card["digest"])


def module_cards(names: Sequence[str]) -> tuple[ModuleCard, ...]:
    """`module_card` of each, in order, those of one digest once."""
    return tuple({one.digest: one for one in map(module_card, names)}.values())


async def import_all(registry: RegistryClient) -> None:
    """`import_experts` and `import_modules`; several parts may do it at once."""
    await import_experts(registry)
    await import_modules(registry)


async def import_experts(registry: RegistryClient, folder: Path = EXPERTS) -> list[Artefact]:
    """Puts the shipped experts into the registry under their names, owner `shared`. Again: nothing changes.

    An expert is a folder of `expert.safetensors` and `card.json`. Raises CorruptArtefact.
    """
    imported: list[Artefact] = []
    for path in sorted(folder.glob(f"*/{FILE}")):
        blob, name = path.read_bytes(), path.parent.name
        expert = read_adapter(blob, name)
        card = json.loads((path.parent / CARD).read_text()) | facts_of(expert)
        imported.append(await registry.put("expert", blob, digest=expert.digest, name=name, owner=SHARED, card=card))
    return imported


async def import_modules(registry: RegistryClient, folder: Path = ASSETS / "modules") -> list[Artefact]:
    """Puts the shipped reasoning modules into the registry, owner `shared`, so that receipts lead to their weights.

    The blob is a tar of the module's safetensors files and its card, the same bytes for the same files.
    """
    imported: list[Artefact] = []
    for path in sorted(folder.glob("*/card.json")):
        card = json.loads(path.read_text())
        blob = _tar([*sorted(path.parent.glob("model*.safetensors")), path])
        imported.append(
            await registry.put("module", blob, digest=card["digest"], name=path.parent.name, owner=SHARED, card=card)
        )
    return imported


def _tar(files: list[Path]) -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for file in files:
            entry, content = tarfile.TarInfo(file.name), file.read_bytes()
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return whole.getvalue()
