"""The certificate of an imported model: a JSON file beside its weights."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from .. import __version__, importers
from ..ddpm import DDPM, load
from ..importers import Checkpoint, Importer
from ..storage.atomic import replacing
from ..storage.checkpoint import FILES
from ..storage.reading import sha256
from ..utils.validation import plain_number
from .diffusers_run import run_diffusers
from .original import Original, forward_errors, inputs_of, rounding_errors, timesteps_of, trajectory_errors
from .reference_file import read_reference

FILE = "certificate.json"
FORMAT = "fused-diffusion-certificate"
FORMAT_VERSION = 1


def certify(
    folder: str | os.PathLike,
    source: str | os.PathLike,
    *,
    flags: dict[str, Any] | None = None,
    reference: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Measures the model in `folder`, imported from `source`, and writes certificate.json beside it.

    flags: those of the import. reference: a safetensors file with numbers of the original
    (docs/interoperability.md). Without one, diffusers itself runs on a folder of its own, if it is installed;
    otherwise the certificate says that no original was at hand.

    The result is the certificate: the SHA-256 of the files of the source and of the model, versions, flags,
    and the largest errors of the network at each timestep, of sampled images, and of float32 against float64.
    ValueError if the model or the source is missing or damaged, the reference is damaged or does not fit the
    model, or the file cannot be written.
    """
    certificate = measure(load(folder), source, flags=flags, reference=reference)
    write_certificate(folder, certificate)
    return certificate


def measure(
    model: DDPM,
    source: str | os.PathLike,
    *,
    flags: dict[str, Any] | None = None,
    assumed: dict[str, Any] | None = None,
    reference: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """The certificate of a model without the digests of its own files; see `certify`.

    assumed: the flags that the import assumed; read from the source again if None.
    """
    flags, path = dict(flags or {}), importers.locate(source)
    if assumed is None:
        assumed = importers.read(source, flags=flags).assumed
    importer = importers.importer_of(Checkpoint(path), flags.get("format"))
    original, notes = _original(model, path, importer, flags, reference)
    versions = {
        "fused-diffusion": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    x, labels = inputs_of(model)
    timesteps = timesteps_of(model)
    if original is not None:
        notes = notes + original.notes
        if original.forwards:
            x, labels = original.x, original.labels
            timesteps = sorted({forward.timestep for forward in original.forwards})
        if original.version is not None:
            versions["diffusers"] = original.version
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "source": {
            "name": str(source),
            "family": "this package" if importer is None else importer.NAME,
            "sha256": {name: sha256(file) for name, file in _files(path, importer).items()},
        },
        "versions": versions,
        "flags": flags,
        "assumed": dict(assumed or {}),
        "original": None if original is None else original.about,
        "reference_sha256": None if reference is None else sha256(reference),
        "forward": [] if original is None else forward_errors(model, original),
        "trajectories": [] if original is None else trajectory_errors(model, original),
        "float32_against_float64": rounding_errors(model, x, timesteps, labels),
        "notes": notes,
    }


def write_certificate(folder: str | os.PathLike, certificate: dict[str, Any]) -> None:
    """Writes certificate.json into a model's folder, with the digests of the model's files."""
    folder = Path(folder)
    certificate["model"] = {"sha256": {name: sha256(folder / name) for name in FILES}}
    with replacing(folder / FILE) as (temporary,):
        temporary.write_text(json.dumps(certificate, indent=2, default=plain_number) + "\n")


def summary(certificate: dict[str, Any]) -> str:
    """The largest errors of a certificate, in one line."""
    if certificate["original"] is None:
        return "; ".join(certificate["notes"])
    worst = []
    for key, name in (("forward", "network"), ("trajectories", "images")):
        errors = [entry["max_error"] for entry in certificate[key]]
        if errors:
            found = "not finite" if None in errors else f"{max(errors):.1e}"
            worst.append(f"largest error of the {name} {found}")
    return "; ".join([f"against {certificate['original']}: {', '.join(worst)}", *certificate["notes"]])


def _original(
    model: DDPM,
    path: Path,
    importer: Importer | None,
    flags: dict[str, Any],
    reference: str | os.PathLike | None,
) -> tuple[Original | None, list[str]]:
    """The numbers of the original, or None, and notes on what could not be had."""
    if reference is not None:
        return read_reference(reference, model), []
    original: Original | None = None
    notes: list[str] = []
    if importer is not None and importer.NAME == "diffusers":
        original, notes = run_diffusers(path, model, flags)
    if original is None:
        notes = [*notes, "no original was at hand: nothing here says that the model computes what it did"]
    return original, notes


def _files(path: Path, importer: Importer | None) -> dict[str, Path]:
    """The files of a source, by their names within it."""
    if path.is_file():
        return {path.name: path}
    patterns = FILES if importer is None else importer.HUB_FILES
    found = sorted({file for pattern in patterns for file in path.rglob(pattern) if file.is_file()})
    return {file.relative_to(path).as_posix(): file for file in found}
