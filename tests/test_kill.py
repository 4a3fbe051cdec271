"""A kill before every file-system event of a small run: the next start ends as if nothing had happened.

`benchmarks/kills.py` goes further: resumed runs, both ways to start again, and kills at random moments.
"""

from pathlib import Path

import pytest
from conftest import tiny_sources
from kills import STEPS, contents, outcome, prepare, restore, snapshots, start

from utils.errors import UserError


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    return tiny_sources(tmp_path_factory.mktemp("kill"))


@pytest.mark.parametrize("name", STEPS)
def test_a_kill_at_any_moment_of_a_fresh_run_is_survived(name, sources, tmp_path):
    place = tmp_path / "place"
    prepare(name, sources, place)
    copies = snapshots(place, tmp_path / "copies", lambda: start(name, sources, place, 2, "auto"))
    wanted, files = outcome(place / "run"), set(contents(place))
    assert len(copies) > 25
    for copy in copies:
        restore(copy, place)
        start(name, sources, place, 2, "auto")
        assert outcome(place / "run") == wanted, copy
        assert set(contents(place)) == files, copy


@pytest.mark.parametrize("name", STEPS)
def test_a_kill_at_any_moment_of_a_replacement_is_survived(name, sources, tmp_path):
    place = tmp_path / "place"
    prepare(name, sources, place)
    start(name, sources, place, 2, "never")
    wanted = outcome(place / "run")
    start(name, sources, place, 1, "never")
    earlier, earlier_files = outcome(place / "run"), contents(place)
    copies = snapshots(place, tmp_path / "copies", lambda: start(name, sources, place, 2, "never"))
    files = set(contents(place))
    assert outcome(place / "run") == wanted != earlier and len(copies) > 30
    untouched = 0
    for number, copy in enumerate(copies):
        restore(copy, place)
        try:
            start(name, sources, place, 2, "never" if number % 8 == 7 else "auto")
        except UserError as error:  # not replaced yet: the earlier run is there, whole, and says how to go on
            assert "--resume never to replace it" in str(error)
            assert earlier_files.items() <= contents(place).items()
            untouched += 1
            start(name, sources, place, 2, "never")
        assert outcome(place / "run") == wanted, copy
        assert set(contents(place)) == files, copy
    assert 1 <= untouched <= 3
