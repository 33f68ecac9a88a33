"""The default run keeps a representative of every value, and the two runs together leave nothing out."""

from itertools import product

import pytest

from helpers.thinning import covering, mark_exhaustive


def test_every_value_is_covered_by_as_few_rows_as_the_longest_parameter():
    rows = list(product(range(3), range(2), range(5)))
    chosen = [rows[i] for i in covering(rows, 1)]
    assert [len(set(column)) for column in zip(*chosen, strict=True)] == [3, 2, 5]
    assert len(chosen) == 5
    assert len(set(row[:2] for row in chosen)) == 5  # the others are not all combined with one value


def test_every_pair_is_covered_by_few_rows():
    rows = list(product(range(4), range(3), range(5)))
    chosen = [rows[i] for i in covering(rows, 2)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert {(row[i], row[j]) for row in chosen} == {(row[i], row[j]) for row in rows}
    assert 20 <= len(chosen) < 30  # 60 in all


def test_combinations_that_do_not_exist_are_not_asked_for():
    rows = [(0, 0), (1, 1), (1, 0)]
    assert covering(rows, 1) == [0, 1]
    assert covering(rows, 2) == [0, 1, 2]
    assert covering([], 2) == []


TESTS = """
import pytest
@pytest.mark.thinned
@pytest.mark.parametrize("a", range(4))
@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (1, 1), pytest.param(2, 2, marks=pytest.mark.skip)])
def test_thinned(a, b, c): pass
@pytest.mark.parametrize("a", range(4))
def test_whole(a): pass
"""


class Marked:
    """Marks as tests/conftest.py does, and keeps what became of each test."""

    def __init__(self):
        self.outcomes = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items):
        mark_exhaustive(items)

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome == "skipped":
            self.outcomes[report.nodeid] = report.outcome


def test_both_runs_together_run_everything(tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    thinned\n    exhaustive\n")

    def run(selection):
        plugin = Marked()
        words = ["-q", "-p", "no:cacheprovider", "-m", selection, "-c", str(tmp_path / "pytest.ini")]
        assert pytest.main([*words, str(tmp_path)], plugins=[plugin]) == 0
        return plugin.outcomes

    default, exhaustive, everything = map(run, ("not exhaustive", "exhaustive", ""))
    assert list(everything.values()).count("passed") == 16
    assert list(exhaustive.values()) == ["passed"] * 8  # of 12: 4 hold each a and each (b, c)
    assert default.keys().isdisjoint(exhaustive)
    assert default | exhaustive == everything
