"""A model on the hub of Hugging Face: its card, which is the README.md of its folder, and the upload."""

import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PureWindowsPath
from types import ModuleType
from typing import Any

from ..models.structure import config_of
from ..utils.errors import first_line
from ..utils.validation import shown
from ..utils.words import counted
from .reading import read_json

Result = Mapping[str, Any] | str | os.PathLike
TASK = "unconditional-image-generation"  # the hub's name of what a model of classes does, too
README = "README.md"
# A path from the root of a file system within a text, and its last part.
PATH = re.compile(r"(?<![\w.:/\\])(?:~|[A-Za-z]:)?[/\\][^\s,;:]*[/\\]([^\s,;:/\\]+)")
# Where a result of `diffusion evaluate` holds its numbers, and the names that the hub shows.
MEASURES = {
    "class_accuracy.accuracy": "class accuracy",
    "frechet.distance": "Fréchet distance in the classifier's features",
    "bits_per_dim": "bits per dimension",
}


def hub_library(use: str) -> ModuleType:
    """The module huggingface_hub; ValueError, naming the extra, where it is not installed."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(f'{use} needs huggingface_hub: pip install "fused-diffusion[hub]"') from error
    return huggingface_hub


def model_card(
    model: Any,
    name: str = "my-model",
    *,
    results: Result | Iterable[Result] = (),
    license: str | None = None,
) -> str:
    """The card of a model, Markdown with a header of metadata, as `DDPM.card` describes it."""
    hub = hub_library("a model card")
    given = [results] if isinstance(results, str | os.PathLike | Mapping) else results
    found = [_read(result) for result in given]
    scores = [(label, value, result) for result in found for label, value in _measures(result)]
    title = name.rpartition("/")[2]
    data = hub.ModelCardData(
        library_name="fused-diffusion",
        pipeline_tag=TASK,
        license=license,
        tags=["diffusion", "ddpm", "pixel-space"],
        model_name=title,
        eval_results=[
            hub.EvalResult(
                task_type=TASK,
                dataset_type=re.sub(r"\W+", "-", _reference(result).lower()).strip("-"),
                dataset_name=_reference(result),
                metric_type=label,
                metric_value=round(value, 6),
            )
            for label, value, result in scores
        ]
        or None,
    )
    parts = [f"---\n{data.to_yaml()}\n---", f"# {title}", f"`{model!r}`", _usage(model, name)]
    parts += ["## Model", _table("", "", _facts(model))]
    if found:
        parts.append("## Evaluation")
    for result in found:
        parts.append(_table("measure", "value", ((k, f"{v:.5g}") for k, v in _measures(result))))
        parts.append(_table("protocol", "", _protocol(result)))
    return "\n\n".join(parts) + "\n"


def push(
    model: Any, name: str, card: str, *, private: bool | None, token: str | None, message: str, **options: Any
) -> str:
    """Saves a model and its card into a new folder, and uploads that; returns the address of the repository.

    options: of `DDPM.save`. ValueError, in one line, for whatever the hub refuses.
    """
    hub = hub_library("push_to_hub")
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder, **options)
        Path(folder, README).write_text(card, encoding="utf-8")
        try:
            api = hub.HfApi(token=token)
            url = api.create_repo(name, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=getattr(url, "repo_id", name), folder_path=folder, commit_message=message
            )
        except Exception as error:  # its errors are of many kinds: HTTP, validation, file system
            raise ValueError(f"cannot push to hf:{name}: {first_line(error)}") from error
    return str(url)


def _read(result: Result) -> Mapping[str, Any]:
    """A result, or that of a file; ValueError unless it is one of `diffusion evaluate`."""
    found = read_json(Path(result)) if isinstance(result, str | os.PathLike) else result
    if not isinstance(found, Mapping) or not list(_measures(found)):
        where = result if isinstance(result, str | os.PathLike) else shown(result)
        raise ValueError(f"{where} is no result of diffusion evaluate, a .json file that --out names")
    return found


def _of(result: Mapping[str, Any], path: str) -> Any:
    """The value at a path such as "frechet.distance", or None."""
    value: Any = result
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _reference(result: Mapping[str, Any]) -> str:
    """The images with which a result compares a model's."""
    places = ("protocol.reference", "reference", "frechet.reference")
    name = next((name for name in (_of(result, place) for place in places) if name), "images")
    return _without_folders(str(name)).partition(":")[0]


def _without_folders(text: str) -> str:
    """A text whose paths are their last parts, because a card is public and folders of a machine are not."""
    whole = text.rstrip("/\\")
    absolute = text.startswith(("/", "~")) or PureWindowsPath(text).is_absolute()
    if ("\n" not in text and absolute and not re.search(r"[,;:]\s", text)) or _exists(text):
        return re.split(r"[/\\]", whole)[-1] or text
    return PATH.sub(r"\1", text)


def _exists(text: str) -> bool:
    try:
        return os.path.exists(text)
    except ValueError:  # a character that no path has
        return False


def _measures(result: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for path, label in MEASURES.items():
        value = _of(result, path)
        if isinstance(value, int | float):
            yield label, value
    metrics = result.get("metrics")
    if isinstance(metrics, Mapping):
        yield from ((name, value) for name, value in metrics.items() if isinstance(value, int | float))


def _protocol(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Everything but the measures: the protocol first, then the other values, by their paths."""
    measured = {*MEASURES, *(f"metrics.{name}" for name in result.get("metrics", ()))}
    flat = dict(_flat(dict(result)))
    for path in sorted(flat, key=lambda path: not path.startswith("protocol.")):
        if path not in measured and flat[path] not in (None, ""):
            yield path.removeprefix("protocol."), str(flat[path])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The numbers, words and switches of nested dictionaries, by their paths; lists are left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            yield f"{prefix}{key}", value


def _usage(model: Any, name: str) -> str:
    classes = model.num_classes
    how = "num_samples=4" if classes is None else f"labels=range({min(4, classes)})"
    lines = [
        "```python",
        'import diffusion  # pip install "fused-diffusion[hub]"',
        "",
        f'model = diffusion.load("hf:{name}")',
        f"images = model.sample({how}, seed=0)",
        'diffusion.save_grid(images, "samples.png")',
        "```",
    ]
    return "\n".join(lines)


def _facts(model: Any) -> Iterator[tuple[str, str]]:
    config, sampler = config_of(model.unet), model.sampler or {"name": "ddpm"}
    height, width = config.image_shape
    channels = counted(config.in_channels, "channel")
    yield "images", f"{width} x {height}, {channels}, values {list(model.value_range)}"
    names = getattr(model, "class_names", None)
    if model.num_classes is not None:
        yield "classes", ", ".join([str(model.num_classes), *(names or ())])
    yield "network", f"{type(model.unet).__name__}, {config.num_parameters:,} parameters"
    yield "noise schedule", repr(model.schedule)
    yield "prediction", model.prediction_type
    yield "sampler", ", ".join(f"{key} {value}" for key, value in sampler.items())
    yield "guidance scale", f"{model.guidance_scale:g}"
    training = model.metadata.get("training")
    hidden = ("unet", "schedule", "prediction_type")
    for key, value in training.items() if isinstance(training, Mapping) else ():
        if key == "seconds" and isinstance(value, float):
            value = round(value)
        if key not in hidden and not isinstance(value, Mapping | list):
            yield f"training: {key}", str(value)
    for key, value in model.metadata.items():
        if isinstance(value, str | int | float):
            yield key, str(value)


def _table(first: str, second: str, rows: Iterable[tuple[str, str]]) -> str:
    texts = [[_without_folders(cell) for cell in row] for row in rows]
    cells = [[" ".join(text.replace("|", "\\|").split()) for text in row] for row in texts]
    return "\n".join([f"| {first} | {second} |", "|---|---|", *(f"| {k} | {v} |" for k, v in cells)])
