"""How many examples fit in memory, and what is said when they do not."""

import json
import time
from pathlib import Path

import pytest
import torch
from conftest import control_groups
from test_train import Interrupted, Model, finish, same, train

from utils import memory
from utils.errors import RunError, UserError
from utils.flags import Flag, coerce
from utils.memory import MIB, check_measured, examples_that_fit, free_memory
from utils.run_files import CONFIG, TYPES

CPU = torch.device("cpu")


def fails_above(limit: int):
    def step(examples: int) -> int:
        if examples > limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return examples

    return step


def takes(fixed: float, each: float):
    return lambda examples: fixed + each * examples


@pytest.fixture
def measured(monkeypatch) -> list:
    """A step returns the MiB that it takes: (what was measured, in order)."""
    found = []

    def peak(work, device):
        found.append(work())
        return int(found[-1] * MIB)

    monkeypatch.setattr(memory, "peak_extra_bytes", peak)
    return found


@pytest.mark.parametrize(
    ("step", "most", "free", "expected"),
    [
        (takes(0, 4), 64, 10_000, 64),
        (takes(0, 4), 50, 10_000, 50),  # no power of two
        (takes(0, 4), 64, 100, 16),  # 16 take 64 MiB of the 80 that may be taken, 32 would take 128
        (takes(0, 4), 64, 161, 32),
        (takes(45, 0.1), 350, 99, 256),  # what does not grow with the examples is not doubled; 350 take 80 MiB
        (takes(45, 0.1), 350, 100, 350),
        (fails_above(10), 64, 10_000, 8),
        (fails_above(1), 64, 10_000, 1),
    ],
)
def test_as_many_examples_as_fit(step, most, free, expected, measured, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: (free + 7) * MIB)
    size, need, left = examples_that_fit(step, most, CPU, reserved=7 * MIB)
    assert (size, left) == (expected, free * MIB) and need == int(step(size) * MIB)
    assert all(taken <= free for taken in measured)  # nothing was tried that is known to fail


def test_what_a_piece_of_work_takes_is_measured():
    def work() -> None:
        held = torch.empty(256 * MIB, dtype=torch.uint8).fill_(1)
        time.sleep(0.2)
        del held

    assert 200 * MIB < memory.peak_extra_bytes(work, CPU) < 400 * MIB


@pytest.mark.parametrize(("step", "free"), [(fails_above(0), 100), (takes(1, 0), 1)])
def test_that_not_one_example_fits_is_told(step, free, measured, monkeypatch):
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
def test_a_container_may_have_less_than_its_machine(group, files, expected, tmp_path, monkeypatch):
    control_groups(tmp_path, group, files)
    found = free_memory(CPU, tmp_path)
    assert found == expected if expected is not None else found > MIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # torchrun's: as many look at the same memory
    assert free_memory(CPU, tmp_path) == pytest.approx(found / 2, rel=0.2, abs=1)


def test_memory_that_cannot_be_measured_is_told():
    with pytest.raises(UserError, match="cannot measure the memory of mps: give a number"):
        check_measured(torch.device("mps"))


def test_it_is_told_before_an_earlier_run_is_replaced(tmp_path, monkeypatch):
    train(tmp_path / "run")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(memory, "MEASURED", ("cuda",))
    with pytest.raises(UserError, match="cannot measure the memory of cpu: give a number"):
        train(tmp_path / "run", micro_batch_size="auto")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("fits", "same_as"), [(16, None), (5, 5)])
def test_auto_trains_exactly_as_the_number_it_finds(fits, same_as, tmp_path, monkeypatch, capsys):
    """Dropout included: what is tried before leaves no trace in weights, moments or random numbers."""
    _, wanted, _ = train(tmp_path / "given", micro_batch_size=same_as)

    def found(step, most, device, reserved):
        assert most == 16 and reserved == 4 * sum(p.nbytes for p in wanted.parameters())
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


def test_a_run_that_goes_on_keeps_the_number(tmp_path, monkeypatch):
    """With less memory free meanwhile, another number would change the noise of dropout."""
    _, wanted, _ = train(tmp_path / "given", micro_batch_size=5)
    numbers = iter([5])
    monkeypatch.setattr("utils.train.examples_that_fit", lambda *a: (next(numbers), MIB, MIB))
    with pytest.raises(Interrupted):
        train(tmp_path / "auto", {"raise_at": 30}, micro_batch_size="auto")
    _, model, state = train(tmp_path / "auto", micro_batch_size="auto", resume="auto")
    assert same(model, wanted) and [start["micro_batch_size"] for start in state["starts"]] == [5, 5]


def test_an_attempt_that_fails_in_the_backward_pass_leaves_no_gradient(tmp_path, monkeypatch):
    _, wanted, _ = train(tmp_path / "given", micro_batch_size=4)
    backward = torch.Tensor.backward

    def tried(step, most, device, reserved):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "backward", lambda self: (backward(self), fails_above(0)(1)))
            with pytest.raises(RuntimeError, match="can't allocate"):
                step(8)
        return 4, MIB, MIB

    monkeypatch.setattr("utils.train.examples_that_fit", tried)
    assert same(train(tmp_path / "auto", micro_batch_size="auto")[1], wanted)


@pytest.mark.parametrize(("given", "now", "less"), [(None, 16, 4), (1000, 16, 4), (5, 5, 2)])
def test_too_little_memory_in_training_says_how_much_an_example_takes(given, now, less, tmp_path, monkeypatch):
    forward = Model.forward

    def short_of_memory(self, batch):
        fails_above(4)(len(batch["histories"]))
        return forward(self, batch)

    monkeypatch.setattr(Model, "forward", short_of_memory)
    words = rf"{now} examples at once; 4 take \d+ of [\d,]+ MiB, about \d+\.\d each; --micro_batch_size {less} makes"
    with pytest.raises(RunError, match=words):
        train(tmp_path / "a", micro_batch_size=given)
    train(tmp_path / "a", micro_batch_size=less, resume="auto")


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
