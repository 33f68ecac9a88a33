"""Samples many images into a folder of shards, with any number of processes that do not talk to each other.

Image i is a function of (seed, i, label), so shard k, which holds the images from k * shard_size on, has the
same bytes whichever process makes it. A shard is written whole or not at all. Each rank first makes every
world_size-th shard, then the shards of slow or dead ranks: those that are neither finished nor being made. A
run that was stopped continues where it was, with as many ranks as there are now.
"""

import contextlib
import hashlib
import json
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..ddpm import DDPM
from ..models.registry import config_to_dict
from ..process.value_range import SIGNED
from ..storage.atomic import check_writable, replacing
from ..storage.images import to_uint8
from ..storage.locks import locked
from ..storage.reading import add_tensors, read_json
from ..storage.shard_files import run_digest, what_is_wrong, write_shard
from ..utils.errors import one_line
from ..utils.ranks import Ranks
from ..utils.validation import plain_number, whole_number, whole_numbers
from ..utils.words import counted

FORMAT = "fused-diffusion-shards"
FORMAT_VERSION = 2  # 1: shards without a digest
MAX_NAMED = 5  # shards named in a message


def sample_shards(
    model: DDPM,
    folder: str | os.PathLike,
    num: int,
    labels: Sequence[int] | None = None,
    *,
    shard_size: int = 500,
    seed: int = 0,
    ranks: Ranks | None = None,
    progress: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Samples images 0..num-1 of a seed into `folder`/shard-00000.npz and so on, by `images.save_npz`.

    labels: taken in turn, or None to sample without labels.
    shard_size: images in each shard, the last one excepted.
    ranks: which of several processes this is; by default the only one.
    options: further arguments of `DDPM.sample`.

    Each shard also holds `sample_ids` int64 [N] and its `sha256`. `folder`/run.json holds all that decides
    the bytes of the shards; other settings than those are refused. Shards that exist are read to the last
    byte: those that this run wrote are kept, all others are made again. On the CPU the bytes do not depend on
    batch_size or on the number of threads or ranks. On a GPU they may, because its libraries choose kernels
    by shape.

    Returns the work of this rank: `images`, `seconds`, `kept` (number of shards that existed), `remade`
    (names of shards that existed and were damaged, and how) and `started` (time.time()). ValueError for a
    folder that cannot be written or holds another run.
    """
    ranks, folder = ranks or Ranks(), Path(folder)
    num, shard_size = whole_number("num", num, 1), whole_number("shard_size", shard_size, 1)
    labels = None if labels is None else whole_numbers("labels", labels).tolist()
    seed = whole_number("seed", seed, 0, 2**64 - 1)
    check_writable(folder / "run.json")
    if model.sampler is not None:  # run.json holds what the model's own sampler stands for
        name, steps, _ = model.chosen_sampler(options.get("sampler"), options.get("steps"))
        own = {key: value for key, value in model.sampler.items() if key not in ("name", "steps")}
        options = (own if name == model.sampler["name"] else {}) | options | {"sampler": name, "steps": steps}
    if labels is not None and options.get("guidance_scale") is None and model.guidance_scale != 1:
        options["guidance_scale"] = model.guidance_scale
    same = {key: value for key, value in options.items() if key not in ("batch_size", "device")}
    run = _join_run(
        folder,
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": model_digest(model),
            "num": num,
            "labels": labels,
            "shard_size": shard_size,
            "seed": seed,
            "device": next(model.unet.parameters()).device.type,
            "options": same,
        },
    )
    shape = (model.unet.config.in_channels, *model.unet.config.image_shape)
    shards = range(-(-num // shard_size))
    mine = [k for k in shards if k % ranks.world_size == ranks.rank]
    others = [k for k in reversed(shards) if k % ranks.world_size != ranks.rank]
    done: dict[str, Any] = {"images": 0, "seconds": 0.0, "kept": 0, "remade": [], "started": time.time()}
    bar = tqdm(total=num, unit=" images", disable=not (progress and ranks.rank == 0))
    with bar:
        for k in (*mine, *others):
            ids = range(k * shard_size, min(num, (k + 1) * shard_size))
            chosen = None if labels is None else [labels[i % len(labels)] for i in ids]
            path = folder / f"shard-{k:05d}.npz"
            with locked(path.with_name(f".{path.stem}.lock")) as free:
                there = free and os.path.lexists(path)
                wrong = what_is_wrong(path, shape, ids, chosen, run) if there else None
                if there and wrong is None:
                    done["kept"] += k in mine
                elif free:
                    start = time.perf_counter()
                    x = model.sample(chosen, num_samples=len(ids), sample_ids=list(ids), seed=seed, **options)
                    write_shard(path, to_uint8(x, model.value_range), ids, chosen, run)
                    done["images"] += len(ids)
                    done["seconds"] += time.perf_counter() - start
                    done["remade"] += [f"{path.name}, {wrong}"] if there else []
            finished = len(list(folder.glob("shard-*.npz"))) * shard_size
            bar.update(min(num, finished) - bar.n)
    return done


def model_digest(model: DDPM) -> str:
    """SHA-256, in hexadecimal, of a model's weights and of the configuration that decides its samples."""
    config: dict[str, Any] = {
        "unet": config_to_dict(model.unet.config),
        "schedule": model.schedule.to_config(),
        "prediction_type": model.prediction_type,
        "clip": model.clip,
        "variance": model.variance,
        "sampler_options": model.sampler_options,
    }
    if (model.value_range, model.normalize, model.clip_output) != (SIGNED, True, False):
        config["values"] = [*model.value_range, model.normalize, model.clip_output]
    if (model.guidance_rescale, model.guidance_parallel) != (0, 1):
        config["guidance"] = [model.guidance_rescale, model.guidance_parallel]
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    add_tensors(digest, model.unet.state_dict())
    return digest.hexdigest()


def _join_run(folder: Path, settings: dict[str, Any]) -> str:
    """Writes run.json unless it exists, and returns its digest; ValueError if it holds other settings."""
    path = folder / "run.json"
    settings = json.loads(json.dumps(settings, default=_as_json))
    if not path.exists():
        mine = folder / f".run.{uuid.uuid4().hex}.json"  # process numbers are not unique across machines
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mine.write_text(json.dumps(settings, indent=1) + "\n")
            with contextlib.suppress(FileExistsError):  # of ranks that start together, the first wins
                os.link(mine, path)
        except OSError as error:
            raise ValueError(f"cannot write {path}: {one_line(error)}") from error
        finally:
            with contextlib.suppress(OSError):
                mine.unlink()
    try:
        found = read_json(path)
        if not isinstance(found.get("options"), dict):
            raise ValueError("its options are no JSON object")
        digest = run_digest(found)  # not of the settings: 1 and 1.0 are equal, but differ in JSON
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; remove the folder, or choose another") from error
    if key := _differing(found, settings):
        pair: tuple[Any, Any] = found.get(key), settings.get(key)
        if key == "options":
            key = _differing(*pair)
            pair = pair[0].get(key), pair[1].get(key)
        # Equal values differ if one is None and the other was not given.
        hidden = key in ("model", "labels") or pair[0] == pair[1]
        shown = "" if hidden else f" ({pair[0]}, not {pair[1]})"
        raise ValueError(f"{folder} holds images of another {key}{shown}; choose another folder")
    return digest


def _differing(found: dict[str, Any], asked: dict[str, Any]) -> str | None:
    """The first setting that differs, or that only one of the two has; None if there is none."""
    every = {**asked, **found}
    return next((k for k in every if k not in asked or k not in found or asked[k] != found[k]), None)


def _as_json(value: object) -> object:
    """An option that JSON has no type for: a number of NumPy or torch as Python's, anything else as text."""
    try:
        return plain_number(value)
    except TypeError:
        return str(value)


def report(folder: str | os.PathLike, done: dict[str, Any], ranks: Ranks) -> list[str]:
    """Lines about the work of this rank and, from the last rank of a run to finish, about all ranks.

    done: from `sample_shards`. The efficiency of N ranks is their images per second from the first start to
    the last end, divided by the sum of each rank's images per second while it was sampling. A rank that ended
    before this one began counts as one of a former run.
    """
    rate = done["images"] / done["seconds"] if done["images"] else 0.0
    lines = [
        f"rank {ranks.rank} of {ranks.world_size}: {counted(done['images'], 'image')}, {rate:.2f} images/s, "
        f"{counted(done['kept'], 'shard')} kept"
    ]
    if remade := done["remade"]:
        more = f"; and {len(remade) - MAX_NAMED} more" if len(remade) > MAX_NAMED else ""
        lines.append(f"made again: {'; '.join(remade[:MAX_NAMED])}{more}")
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    launch = "/".join(os.environ.get(name, "") for name in names)
    mine = {**done, "launch": launch, "ended": time.time()}
    every = []
    # The lock lets the last of several ranks that end together see the files of all.
    with locked(Path(folder) / ".report.lock", wait=True):
        with replacing(Path(folder) / f".rank-{ranks.rank}.json") as (temporary,):
            temporary.write_text(json.dumps(mine))
        for rank in range(ranks.world_size):
            with contextlib.suppress(OSError, ValueError):
                entry = read_json(Path(folder) / f".rank-{rank}.json")
                every += [entry] if entry["launch"] == launch and entry["ended"] >= done["started"] else []
    if len(every) == ranks.world_size and (total := sum(entry["images"] for entry in every)):
        wall = max(entry["ended"] for entry in every) - min(entry["started"] for entry in every)
        busy = sum(entry["images"] / entry["seconds"] for entry in every if entry["images"])
        lines.append(
            f"{ranks.world_size} ranks: {counted(total, 'image')} in {wall:.1f} s, "
            f"{total / wall:.2f} images/s, "
            f"efficiency {total / wall / busy:.0%}"
        )
    return lines
