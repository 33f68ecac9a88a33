"""Folders of shards."""

from functools import cache

from helpers.models import make_model

model_of = cache(make_model)  # with the plans of the tests before


def shards_of(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("shard-*"))}
