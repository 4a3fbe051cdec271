"""How many examples fit in memory, and what is said when they do not."""

import json
import time
from pathlib import Path

import pytest
import torch
from test_train import Model, finish, same, train

from utils import memory
from utils.errors import RunError, UserError
from utils.flags import Flag, coerce
from utils.memory import MIB, examples_that_fit, free_memory
from utils.run_files import CONFIG, TYPES

CPU = torch.device("cpu")


def touch(examples: int) -> None:
    held = torch.empty(examples * 4 * MIB, dtype=torch.uint8).fill_(1)
    time.sleep(0.02)  # as long as a step takes at least
    del held


def fails_above(limit: int):
    def step(examples: int) -> None:
        if examples > limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    return step


@pytest.mark.parametrize(
    ("step", "most", "free", "expected"),
    [
        (touch, 64, 10_000, 64),
        (touch, 50, 10_000, 50),  # no power of two
        (touch, 64, 100, 16),  # 16 take 64 MiB of the 80 that may be taken, 32 would take 128
        (touch, 64, 165, 32),
        (fails_above(10), 64, 10_000, 8),
        (fails_above(1), 64, 10_000, 1),
    ],
)
def test_as_many_examples_as_fit(step, most, free, expected, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: (free + 7) * MIB)
    size, need, left = examples_that_fit(step, most, CPU, reserved=7 * MIB)
    assert size == expected and left == free * MIB
    assert step is not touch or need == pytest.approx(size * 4 * MIB, rel=0.2)


def test_no_attempt_is_made_that_is_known_to_fail(monkeypatch):
    """A process that asks for too much is killed, on most systems: nothing could be said then."""
    tried = []
    monkeypatch.setattr(memory, "free_memory", lambda device: 100 * MIB)
    examples_that_fit(lambda n: (tried.append(n), touch(n)), 64, CPU)
    assert tried == [1, 2, 4, 8, 16]


@pytest.mark.parametrize(("step", "free"), [(fails_above(0), 100), (touch, 1)])
def test_that_not_one_example_fits_is_told(step, free, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: free * MIB)
    with pytest.raises(RunError, match=f"not one example fits in {free} MiB"):
        examples_that_fit(step, 64, CPU)


def test_other_errors_are_not_taken_for_too_little_memory():
    with pytest.raises(ZeroDivisionError):
        examples_that_fit(lambda n: n / 0, 64, CPU)


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        (
            "0::/a\n",
            {"a/memory.max": "1000", "a/memory.current": "700", "a/memory.stat": "anon 3\ninactive_file 50"},
            350,
        ),
        ("0::/a\n", {"a/memory.max": "max", "a/memory.current": "700", "a/memory.stat": "inactive_file 50"}, None),
        ("0::/a\n", {"a/memory.max": "1000", "a/memory.current": "2000", "a/memory.stat": "inactive_file 0"}, 0),
        (
            "9:memory:/x\n",
            {"memory/x/memory.limit_in_bytes": "10", "memory/x/memory.usage_in_bytes": "4", "memory/x/memory.stat": ""},
            6,
        ),
    ],
)
def test_a_container_may_have_less_than_its_machine(group, files, expected, tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(group)
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = free_memory(CPU, tmp_path)
    assert found == expected if expected is not None else found > MIB


@pytest.mark.parametrize(("fits", "same_as"), [(16, None), (5, 5)])
def test_auto_trains_exactly_as_the_number_it_finds(fits, same_as, tmp_path, monkeypatch, capsys):
    """Dropout included: what is tried before leaves no trace in weights, moments or random numbers."""
    _, wanted, _ = train(tmp_path / "given", micro_batch_size=same_as)

    def found(step, most, device, reserved):
        assert most == 16 and reserved == 2 * sum(p.nbytes for p in wanted.parameters())
        step(fits)
        return fits, 3 * MIB, 9 * MIB

    monkeypatch.setattr("utils.train.examples_that_fit", found)
    run, model, state = train(tmp_path / "auto", micro_batch_size="auto")
    assert same(model, wanted)
    assert f"auto: {fits} of 16 examples at once, which take about 3 of the 9 MiB" in capsys.readouterr().out
    finish(run, model, state)
    start = json.loads((Path(run.folder) / "metrics.json").read_text())["starts"][0]
    assert start["micro_batch_size"] == fits


def test_auto_on_this_machine(tmp_path):
    _, wanted, _ = train(tmp_path / "given")
    assert same(train(tmp_path / "auto", micro_batch_size="auto")[1], wanted)


def test_too_little_memory_in_training_says_how_much_an_example_takes(tmp_path, monkeypatch):
    forward = Model.forward

    def short_of_memory(self, batch):
        fails_above(6)(len(batch["histories"]))
        return forward(self, batch)

    monkeypatch.setattr(Model, "forward", short_of_memory)
    words = (
        r"out of memory with 16 examples at once; 4 take \d+ of [\d,]+ MiB, about \d+\.\d each; --micro_batch_size 4,"
    )
    with pytest.raises(RunError, match=words):
        train(tmp_path / "a")
    train(tmp_path / "a", micro_batch_size=4, resume="auto")


def test_the_flag_is_a_number_or_auto():
    flag = Flag(int | None, None, "", ">= 1")

    auto = Flag(TYPES["micro_batch_size"], None, "", ">= 1")
    assert [coerce("--n", text, auto) for text in ("auto", "8", "None")] == ["auto", 8, None]
    for text in ("Auto", "0", "1.5", "all"):
        with pytest.raises(UserError, match="--n"):
            coerce("--n", text, auto)
    with pytest.raises(UserError, match=r"expected a whole number$"):
        coerce("--n", "auto", flag)
    words, fits = CONFIG["micro_batch_size"]
    assert "auto" in words and all(map(fits, ("auto", 8, None))) and not any(map(fits, ("all", 0, 1.5, True, [])))
