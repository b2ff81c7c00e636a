"""``neuronguard bundle patch``: add a named patch to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from guard.commands import options

if TYPE_CHECKING:
    from guard.checkpoint import Checkpoint
    from guard.patch import Float32Array, Patch
    from guard.patch_card import PatchSite
    from guard.units import Units

MEAN_KEY = "mean.donor"
DIRECTION_KEY = "direction"


@click.command()
@click.argument("directory", type=options.PATH)
@options.model
@click.option("--name", required=True, help="What policies call the patch.")
@click.option("--units", type=options.PATH, help="What is patched: a located set, or a units file.")
@click.option("--zero", is_flag=True, help="Set the units to 0.")
@click.option("--scale", type=float, help="Multiply the units by this factor.")
@click.option(
    "--mean",
    type=options.PATH,
    help=f"Set neurons to {MEAN_KEY!r} of this file, the statistics that locate contrast writes.",
)
@click.option(
    "--vector",
    type=options.PATH,
    help="Take the units from the model itself under this (IA)³ vector; with --stored, multiply them by it.",
)
@click.option("--stored", is_flag=True, help="Keep the vector's factors in place of running a donor.")
@click.option("--donor", help="Take the units from this checkpoint, which the engine loads beside the model.")
@click.option("--prefix", help="Have the answer begin with these words.")
@click.option(
    "--direction",
    type=options.PATH,
    help=f"Steer: add the vector {DIRECTION_KEY!r} of this file, at --strength, to the residual stream.",
)
@click.option(
    "--layer", "layers", type=click.IntRange(min=0), multiple=True, help="Where to steer; repeatable."
)
@click.option("--strength", type=float, help="Length of what --direction adds; below zero it is taken away.")
@click.option("--out", required=True, type=options.PATH, help="Directory of the new bundle.")
def patch(
    directory: Path,
    model: str,
    name: str,
    units: Path | None,
    zero: bool,
    scale: float | None,
    mean: Path | None,
    vector: Path | None,
    stored: bool,
    donor: str | None,
    prefix: str | None,
    direction: Path | None,
    layers: tuple[int, ...],
    strength: float | None,
    out: Path,
) -> None:
    """Write a bundle that also has a patch, which a policy can have done to a flagged request.

    One of --zero, --scale, --mean, --vector, --donor, --prefix and --direction says what the patch does.
    """
    from guard.bundle import CARD_FILE, Bundle, BundleError
    from guard.patch import PatchError
    from guard.units import read_units

    asked = {"--zero": zero or None, "--scale": scale, "--mean": mean, "--vector": vector, "--donor": donor,
             "--prefix": prefix, "--direction": direction}  # fmt: skip
    given = [option for option, value in asked.items() if value is not None]
    if len(given) != 1:
        raise click.UsageError(
            f"give one of {', '.join(asked)}; there are {len(given)}: {', '.join(given) or 'none'}"
        )
    if (units is None) != (prefix is not None or direction is not None):
        raise click.UsageError("--units goes with everything but --prefix and --direction")
    if len({direction is None, strength is None, not layers}) > 1:
        raise click.UsageError("--direction, --layer and --strength go together")
    if stored and vector is None:
        raise click.UsageError("--stored goes with --vector")
    if out.exists() and not (out / CARD_FILE).is_file():
        raise click.UsageError(f"{out} exists and is not a bundle; choose another --out")
    loaded = Bundle.load(directory)
    checkpoint = options.belonging(loaded, model)
    chosen = read_units(units, checkpoint.shape, weights_sha256=checkpoint.weights_sha256) if units else ()
    try:
        if prefix is not None:
            made = _words(checkpoint, name, prefix)
        elif direction is not None:
            made = _steering(checkpoint, name, direction, layers, float(strength or 0.0))
        else:
            made = _numbers(checkpoint, name, chosen, zero, scale, mean, vector, stored, donor)
        whole = loaded.with_patch(made)
    except (PatchError, BundleError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    whole.save(out)
    columns = sum(len(site.units) for site in made.card.sites)
    said = f"{columns} units in {len(made.card.sites)} places" if columns else f"{prefix!r}"
    click.echo(f"wrote {out}: digest {whole.digest}; patch {name}, {made.card.kind}: {said}")


def _words(checkpoint: Checkpoint, name: str, words: str) -> Patch:
    from guard import patch as patches

    tokens = checkpoint.load_tokenizer()(words, add_special_tokens=False)["input_ids"]
    return patches.prefix(name, words, tokens, made={"method": "prefix"})


def _steering(
    checkpoint: Checkpoint, name: str, path: Path, layers: tuple[int, ...], strength: float
) -> Patch:
    from transformers import AutoConfig

    from guard import patch as patches

    direction = _read(path, DIRECTION_KEY, dimensions=1)
    hidden = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True).hidden_size
    if len(direction) != hidden:
        raise patches.PatchError(
            f"{path}: {DIRECTION_KEY!r} has {len(direction)} columns, but the residual stream of "
            f"{checkpoint.name} has {hidden}"
        )
    at = sorted(set(layers))
    return patches.steering(
        name, direction, at, checkpoint.shape, strength=strength, made={"method": "steering"}
    )


def _numbers(
    checkpoint: Checkpoint,
    name: str,
    chosen: Units,
    zero: bool,
    scale: float | None,
    mean: Path | None,
    vector: Path | None,
    stored: bool,
    donor: str | None,
) -> Patch:
    from guard import patch as patches
    from guard.adapters import CONFIG_FILE
    from guard.patch_card import DonorCard, PatchSite

    shape = checkpoint.shape
    sites = [PatchSite(**site.model_dump()) for site in chosen]
    if zero or scale is not None:
        factor = 0.0 if scale is None else scale
        return patches.stored(name, sites, shape, scale=factor, made={"method": "zero" if zero else "scale"})
    if mean is not None:
        values = _by_column(_read(mean, MEAN_KEY), sites)
        return patches.stored(name, sites, shape, scale=0.0, shift=values, made={"method": "mean"})
    if vector is not None:
        factors = _vector(vector, checkpoint)
        if stored:
            columns = _by_column(factors, sites)
            return patches.stored(name, sites, shape, scale=columns, made={"method": "ia3"})
        return patches.from_vector(name, sites, factors, shape, made={"method": "donor under a vector"})
    if (Path(str(donor)) / CONFIG_FILE).is_file():
        raise patches.PatchError(
            f"{donor} is a LoRA adapter, and a donor is a whole checkpoint: merge the adapter into its base "
            "model, save that, and give its directory"
        )
    other = options.open_model(str(donor))
    if other.shape != shape or other.tokenizer_sha256 != checkpoint.tokenizer_sha256:
        what = "shape" if other.shape != shape else "tokenizer or chat template"
        raise patches.PatchError(f"the donor {other.name} has another {what} than {checkpoint.name}")
    card = DonorCard(name=other.name, weights_sha256=other.weights_sha256)
    return patches.from_donor(
        name, sites, card, shape, factor=_factors(checkpoint, other, sites), made={"method": "donor"}
    )


def _by_column(table: Float32Array, sites: list[PatchSite]) -> Float32Array:
    """Values ``[columns]`` of neurons out of a table ``[layers, mlp_width]``. Raises PatchError."""
    import numpy as np

    from guard.patch import PatchError

    if any(site.kind != "mlp" for site in sites):
        raise PatchError("the values are of neurons; the units hold attention heads")
    if any(site.layer >= table.shape[0] or site.units[-1] >= table.shape[1] for site in sites):
        raise PatchError(
            f"the values are for {table.shape[0]} layers of {table.shape[1]} neurons; units lie outside"
        )
    return np.concatenate([table[site.layer, list(site.units)] for site in sites]).astype(np.float32)


def _read(path: Path, key: str, *, dimensions: int = 2) -> Float32Array:
    import numpy as np

    from guard.patch import PatchError

    arrays = _arrays(path)
    if key not in arrays or arrays[key].ndim != dimensions:
        what = "table" if dimensions == 2 else "vector"
        raise PatchError(f"{path} has no {what} {key!r}; it has: {', '.join(sorted(arrays)) or 'nothing'}")
    return np.asarray(arrays[key], dtype=np.float32)


def _arrays(path: Path) -> dict[str, Any]:
    """What a safetensors file holds. Raises PatchError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from guard.patch import PatchError

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise PatchError(f"{path} is not a readable safetensors file: {error}") from error


def _vector(path: Path, checkpoint: Checkpoint) -> Float32Array:
    """An (IA)³ vector as one table ``[layers, mlp_width]``, 1 where the file names no layer."""
    import numpy as np

    from guard.ia3 import VECTOR_NAME
    from guard.patch import PatchError

    shape = checkpoint.shape
    arrays, table = _arrays(path), np.ones((shape.layers, shape.mlp_width), dtype=np.float32)
    names = {VECTOR_NAME.format(layer=layer): layer for layer in range(shape.layers)}
    if unknown := arrays.keys() - names.keys():
        raise PatchError(f"{path}: {min(unknown)} is no vector of a layer of {checkpoint.name}")
    for name, array in arrays.items():
        if array.shape != (shape.mlp_width,):
            raise PatchError(f"{path}: {name} has shape {list(array.shape)}, expected [{shape.mlp_width}]")
        table[names[name]] = array
    return table


def _factors(served: Checkpoint, donor: Checkpoint, sites: list[PatchSite]) -> Float32Array:
    """What brings the donor's activations into the basis of the served model's value vectors."""
    import numpy as np

    from guard.locate.twins import folded_twins

    _, twin = folded_twins(served.load_model(), donor.load_model())
    parts = []
    for site in sites:
        columns = site.columns(served.shape)
        whole = twin.folded.get(site.layer) if site.kind == "mlp" else None
        parts.append(np.ones(len(columns)) if whole is None else whole[columns].numpy())
    return np.concatenate(parts, dtype=np.float32)
