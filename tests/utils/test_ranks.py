"""The environment variables that torchrun sets."""

import pytest

from diffusion.utils.ranks import Ranks, current_ranks


def set_environment(monkeypatch, **values):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_alone(monkeypatch):
    set_environment(monkeypatch)
    assert current_ranks() == Ranks(rank=0, world_size=1, local_rank=0)


def test_one_of_several(monkeypatch):
    set_environment(monkeypatch, RANK="9", WORLD_SIZE="16", LOCAL_RANK="1")
    assert current_ranks() == Ranks(rank=9, world_size=16, local_rank=1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK must be a whole number, not 'one'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK must be a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "rank 0 of 0"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": ""}, "LOCAL_RANK"),
        ({"RANK": "0"}, "only one is set"),
        ({"WORLD_SIZE": "2"}, "only one is set"),
    ],
)
def test_nonsense(values, expected, monkeypatch):
    set_environment(monkeypatch, **values)
    with pytest.raises(ValueError, match=expected):
        current_ranks()
