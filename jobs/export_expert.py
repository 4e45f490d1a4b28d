"""Writes an expert, a LoRA or a mixture for other programs.

    python -m jobs.export_expert NAME_OR_FILE --format peft --rank 16 --out DIR
    python -m jobs.export_expert NAME_OR_FILE --format merged --out DIR
    python -m jobs.export_expert NAME_OR_FILE --format svf [--rank 64] --out DIR

NAME_OR_FILE is an expert.safetensors, a directory that holds one or PEFT's two files, or a name of the registry under
`--home`: `desk`, `smollm2-135m:desk`, `mix@<digest or name>`.

`peft` is a LoRA directory for PEFT and vLLM: the best approximation of that rank, and README.md says by layer what it
loses. `merged` is the backbone with changed weights, in its own dtype, for whatever reads Hugging Face directories.
`svf` is expert.safetensors, of a mixture as one expert, with a rank truncated to the leading singular values.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import settings
from metasepia.digests import short
from metasepia.errors import CorruptArtefact, InvalidSettings, MetasepiaError, UnknownName
from metasepia.experts.lora import LoraAdapter, facts_of, linear_shapes, read_adapter
from metasepia.experts.mixing import ExpertMixer, read_mixture, weight_in
from metasepia.experts.peft_files import CONFIG, WEIGHTS, read_peft, target_modules, write_peft
from metasepia.experts.shipped import CARD, EXPERTS, FILE, card_of, names
from metasepia.experts.vectors import ExpertVectors, FactorIndex
from metasepia.models.prepared import PreparedBackbone
from metasepia.registry.entries import LOCAL
from metasepia.registry.reading import read_blob, read_entry

if TYPE_CHECKING:
    from metasepia.experts.factors import FactorSet

README = "README.md"
MIXTURE = "mix@"
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What its --max-lora-rank may be."""


@dataclass(frozen=True)
class Given:
    """What is exported."""

    name: str
    parts: tuple[tuple[float | tuple[float, ...], ExpertVectors | LoraAdapter], ...]
    """One with weight 1, or those of a mixture."""
    card: dict[str, Any]

    @property
    def backbone(self) -> str:
        return self.parts[0][1].backbone


def read_given(given: str, home: Path) -> Given:
    """From a file, a directory or the registry. Raises UnknownName and CorruptArtefact."""
    path = Path(given)
    if path.is_dir() and not (path / FILE).is_file() and not (path / CONFIG).is_file():
        raise CorruptArtefact(given, f"the directory holds neither {FILE} nor {CONFIG}")
    if path.is_dir() and (path / FILE).is_file():
        path = path / FILE
    if path.is_file():
        known = card_of(path.parent)
        name = str(known.get("name") or (path.parent.name if path.name == FILE else path.stem))
        return Given(name, ((1.0, read_adapter(path.read_bytes(), given)),), known)
    root, name = home / "registry", given.rpartition(":")[2]
    if name.startswith(MIXTURE):
        entry = read_entry(root, "mixture", name.removeprefix(MIXTURE), LOCAL)
        adapter = read_mixture(read_blob(root, entry.digest), name)
        bases = {digest for digest, _ in adapter} - _in_registry(root, tuple(digest for digest, _ in adapter))
        held = [(weight, read_adapter(read_blob(root, d), d)) for d, weight in adapter if d not in bases]
        first = held[0][1]
        if bases and isinstance(first, ExpertVectors):
            base = ExpertVectors.identity(first.backbone, first.factors, first.renormalise)
            held += [(weight, base) for d, weight in adapter if d == base.digest]
        return Given(name, tuple(held), entry.card)
    try:
        entry = read_entry(root, "expert", name, LOCAL)
    except UnknownName as error:
        if name in (known := names()):
            return read_given(str(EXPERTS / name), home)
        raise UnknownName("expert or file", given, tuple(dict.fromkeys((*error.known, *known)))) from None
    return Given(entry.name, ((1.0, read_adapter(read_blob(root, entry.digest), name)),), entry.card)


def _in_registry(root: Path, digests: Sequence[str]) -> set[str]:
    found = set[str]()
    for digest in digests:
        try:
            read_blob(root, digest)
            found.add(digest)
        except UnknownName:  # the base, which is never stored
            continue
    return found


def backbone_of(given: Given, wanted: str | None, profile: str | None, home: Path) -> PreparedBackbone:
    """The backbone that it was made for: `wanted`, or what its card names, or one of the profile's.

    Raises CorruptArtefact where it was made for another.
    """
    from metasepia.models import checkpoints

    named = [wanted] if wanted else [given.card["backbone_source"]] if given.card.get("backbone_source") else []
    sources = named or [one.source for one in settings.read(profile).backbones]
    found = [checkpoints.prepare(source, home) for source in sources]
    for one in found:
        if one.digest == given.backbone:
            return one
    served = ", ".join(f"{one.source} ({short(one.digest)})" for one in found)
    raise CorruptArtefact(
        given.name, f"it was made for backbone {short(given.backbone)}, not {served}; give --backbone"
    )


def factors_for(adapter: ExpertVectors, prepared: PreparedBackbone, home: Path) -> "FactorSet":
    """The factors that an expert was made for; read by layer, and made first where they are not there."""
    from metasepia.experts.factors import cut_factors, factors_of_backbone

    try:
        FactorIndex.read(adapter.factors, home)
        return cut_factors(adapter.factors, prepared.digest, home, {})
    except CorruptArtefact:
        ends = {".".join(layer.removesuffix(".weight").split(".")[-2:]) for layer in adapter.z}
        made = factors_of_backbone(prepared, sorted(ends), home)
    if made.digest != adapter.factors:
        layers = f"it was made for factors {short(adapter.factors)}, and {', '.join(sorted(ends))} have others"
        raise CorruptArtefact("the expert", f"{layers}; make them with python -m jobs.factor_backbone --layers")
    return made


def one_adapter(given: Given, index: FactorIndex | None) -> ExpertVectors | LoraAdapter:
    """A mixture as one adapter; exact."""
    from metasepia.experts.exporting import mixed_low_rank

    first = given.parts[0][1]
    if len(given.parts) == 1 and given.parts[0][0] == 1.0:
        return first
    if isinstance(first, LoraAdapter):
        loras = [(weight_in(weight, 0), one) for weight, one in given.parts if isinstance(one, LoraAdapter)]
        return mixed_low_rank(loras)
    vectors = {one.digest: one for _, one in given.parts if isinstance(one, ExpertVectors)}
    mixer = ExpertMixer(vectors, tuple(index.lengths) if index else ())
    return mixer.mix({one.digest: weight for weight, one in given.parts})


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        given = read_peft_or(options)
        _export(given, options)
    except MetasepiaError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def read_peft_or(options: argparse.Namespace) -> Given:
    """As `read_given`; PEFT's directory is read for the backbone that `--backbone` or the profile names first."""
    folder = Path(options.expert)
    if not (folder / CONFIG).is_file() or (folder / FILE).is_file():
        return read_given(options.expert, options.home)
    from metasepia.models import checkpoints

    source = options.backbone or settings.read(options.profile).backbones[0].source
    prepared = checkpoints.prepare(source, options.home)
    files = [(folder / name).read_bytes() for name in (CONFIG, WEIGHTS)]
    adapter = read_peft(files[0], files[1], prepared.digest, linear_shapes(Path(prepared.path)), options.expert)
    return Given(folder.resolve().name, ((1.0, adapter),), {"backbone_source": source})


def _export(given: Given, options: argparse.Namespace) -> None:
    import torch

    from metasepia.experts.exporting import low_rank, merge, total_loss

    torch.set_num_threads(options.threads)
    first = given.parts[0][1]
    prepared = backbone_of(given, options.backbone, options.profile, options.home)
    factors = factors_for(first, prepared, options.home) if isinstance(first, ExpertVectors) else None
    adapter = one_adapter(given, factors.index if factors is not None else None)
    out: Path = options.out
    card = {key: given.card[key] for key in ("name", "description", "task", "labels", "license") if key in given.card}
    card |= {
        "name": given.name,
        "backbone_source": prepared.source,
        "exported_from": [one.digest for _, one in given.parts],
    }
    if options.format == "svf":
        if not isinstance(adapter, ExpertVectors):
            raise InvalidSettings("--format", "svf", "peft or merged for a low-rank adapter")
        if options.rank:
            assert factors is not None  # an expert vector's were found above
            adapter = adapter.truncated(options.rank, factors.index)
        out.mkdir(parents=True, exist_ok=True)
        (out / FILE).write_bytes(adapter.to_bytes())
        _write_card(out, card | facts_of(adapter))
        print(f"{out / FILE}: digest {adapter.digest}, rank {adapter.rank}, {adapter.num_bytes // 4:,} parameters")
        return
    if options.format == "merged":
        merge(prepared, adapter, factors, out)
        (out / README).write_text(_merged_readme(card, prepared))
        print(f"{out}: {prepared.source} with {given.name} merged into {_num_layers(adapter)} layers")
        return
    cut, losses = low_rank(adapter, factors, options.rank or 16)
    config, weights = write_peft(cut, options.base_model or prepared.path)
    total = total_loss(losses)
    rows = [(layer, one.rank, one.exact_rank, one.relative) for layer, one in losses.items()]
    for layer, rank, exact, relative in rows:
        print(f"{layer}: rank {rank} of {exact}, relative error {relative:.4f}")
    out.mkdir(parents=True, exist_ok=True)
    (out / CONFIG).write_bytes(config)
    (out / WEIGHTS).write_bytes(weights)
    stated = {
        "rank": cut.rank,
        "relative_error": round(total.relative, 6),
        "error_over_weights": None if not total.weight else round((total.lost / total.weight) ** 0.5, 6),
        "layers": {layer: round(relative, 6) for layer, _, _, relative in rows},
    }
    _write_card(out, card | facts_of(cut) | {"approximation": stated})
    (out / README).write_text(_peft_readme(card, prepared, options.base_model or prepared.path, cut, stated, rows))
    print(f"all layers: relative error {total.relative:.4f} of the difference W' - W (Frobenius)")
    print(
        f"{out}: LoRA of rank {cut.rank}, {cut.num_parameters:,} parameters, modules {', '.join(target_modules(cut))}"
    )


def _num_layers(adapter: ExpertVectors | LoraAdapter) -> int:
    return len(adapter.z if isinstance(adapter, ExpertVectors) else adapter.a)


def _write_card(out: Path, card: dict[str, Any]) -> None:
    (out / CARD).write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n")


def _peft_readme(
    card: dict[str, Any],
    prepared: PreparedBackbone,
    base_model: str,
    cut: LoraAdapter,
    stated: dict[str, Any],
    rows: list[tuple[str, int, int, float]],
) -> str:
    table = "\n".join(f"| `{layer}` | {rank} | {exact} | {relative:.4f} |" for layer, rank, exact, relative in rows)
    exact = all(relative < 1e-6 for *_, relative in rows)
    weights = stated["error_over_weights"]
    share = "" if weights is None else f", {weights:.2%} of the norm of the weights themselves"
    says = (
        "It is the expert exactly, up to rounding."
        if exact
        else f"What is lost has {stated['relative_error']:.2%} of the Frobenius norm of W' - W{share}. Its answers "
        "differ from the expert's; a larger `--rank` loses less."
    )
    return f"""---
base_model: {base_model}
base_model_relation: adapter
library_name: peft
tags:
- lora
- transformers
---

# `{card["name"]}` as a LoRA of rank {cut.rank}

{card.get("description", "")}

The best approximation of rank {cut.rank} (or of the layer's own, where that is less) of W' - W in each layer, for
`{prepared.source}`, {len(rows)} layers, {cut.num_parameters:,} parameters. {says}

```python
model = AutoModelForCausalLM.from_pretrained({base_model!r})
model = PeftModel.from_pretrained(model, "this directory")
```

{_vllm(card["name"].removeprefix(MIXTURE), cut.rank)}

| layer | rank | of | relative error |
| --- | ---: | ---: | ---: |
{table}
"""


def _vllm(name: str, rank: int) -> str:
    room = next((one for one in VLLM_RANKS if one >= rank), None)
    if room is None:
        return f"vLLM takes ranks up to {VLLM_RANKS[-1]}: export a smaller one for it."
    return f"vLLM: `--enable-lora --max-lora-rank {room} --lora-modules {name}=<this directory>`."


def _merged_readme(card: dict[str, Any], prepared: PreparedBackbone) -> str:
    return f"""---
base_model: {prepared.path}
base_model_relation: merge
library_name: transformers
---

# `{prepared.source}` with `{card["name"]}` merged in

{card.get("description", "")}

Made of backbone `{prepared.digest}` and {", ".join(f"`{one}`" for one in card["exported_from"])}; every other weight is
the backbone's, and the changed ones are rounded to its dtype.
"""


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("expert", metavar="NAME_OR_FILE")
    parser.add_argument("--format", choices=("peft", "merged", "svf"), required=True)
    parser.add_argument("--rank", type=int, help="of a LoRA (16 where it is not given), or of a truncated expert")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backbone", metavar="SOURCE", help="package:<name>, a Hugging Face directory or a .gguf file")
    parser.add_argument("--base-model", metavar="NAME", help="what adapter_config.json calls the backbone")
    parser.add_argument("--profile", help="settings whose home and backbones are looked through")
    parser.add_argument("--home", type=Path, help="the profile's, where it is not given")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.rank is not None and options.rank < 1:
        parser.error(f"--rank {options.rank} must be at least 1")
    if options.home is None:
        options.home = settings.read(options.profile).home
    return options


if __name__ == "__main__":
    sys.exit(main())
