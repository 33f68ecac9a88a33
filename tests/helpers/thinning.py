"""Chooses which parametrisations of a test run by default; .ci/run and `pytest -m ""` run all of them.

A test marked `thinned` runs by default with a covering array of its parameters: every value of every
parameter, or with `thinned(2)` every pair of values of two parameters. The parametrisations that add nothing
are marked `exhaustive`. The choice is greedy and depends on the parameters alone, so all workers of
pytest-xdist make the same one.
"""

import zlib
from collections.abc import Container, Hashable, Iterable, Sequence
from itertools import combinations

import pytest


def covering(rows: Sequence[tuple[Hashable, ...]], strength: int) -> list[int]:
    """Indices of rows, in order, that together hold every combination of `strength` columns' values.

    rows: a value for each parameter (column). Only combinations that some row holds are asked for. Among rows
    that add as many, the one is taken that adds most combinations of one column more.
    """

    def held(size: int) -> list[set[tuple[tuple[int, Hashable], ...]]]:
        return [set(combinations(enumerate(row), min(size, len(row)))) for row in rows]

    asked, larger = held(strength), held(strength + 1)
    missing, unseen = set().union(*asked), set().union(*larger)
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda i: (len(asked[i] & missing), len(larger[i] & unseen)))
        chosen.append(best)
        missing -= asked[best]
        unseen -= larger[best]
    return sorted(chosen)


def exhaustive_but(values: Iterable, default: Container) -> list:
    """Parameters of which those in `default` run by default; for tests that take long."""
    return [pytest.param(value, marks=() if value in default else pytest.mark.exhaustive) for value in values]


def in_eighth(name: str, seed: str) -> bool:
    """Whether a test is in the eighth of all tests that the seed chooses."""
    return zlib.crc32(f"{seed} {name}".encode()) % 8 == 0


def _represents(item: pytest.Item) -> bool:
    """Whether the default run would run it: no mark skips or deselects it."""
    conditions = [condition for mark in item.iter_markers("skipif") for condition in mark.args[:1]]
    return not any(conditions) and not any(map(item.get_closest_marker, ("skip", "slow", "exhaustive")))


def _factors(item: pytest.Item) -> tuple[tuple[int, ...], ...]:
    """The identity of each factor's value: the arguments of one `parametrize` together, or a fixture's."""
    values = dict(item.callspec.params)
    factors = []
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        factors.append(tuple(id(values.pop(name.strip())) for name in names))
    return *factors, *((id(value),) for value in values.values())


def mark_exhaustive(items: list[pytest.Item]) -> None:
    """Marks as exhaustive the parametrisations of thinned tests that add nothing to the default run."""
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("thinned") and hasattr(item, "callspec") and _represents(item):
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for group in functions.values():
        strength = group[0].get_closest_marker("thinned").args or (1,)
        rows = [_factors(item) for item in group]
        for i in set(range(len(group))) - set(covering(rows, *strength)):
            group[i].add_marker("exhaustive")
