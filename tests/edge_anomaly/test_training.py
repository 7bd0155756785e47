from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from edge_anomaly import training
from edge_anomaly.training import CHECKPOINT, METRICS, FitSession, StopTraining, fit_epochs, resolve_device
from edge_anomaly_runtime.errors import ArtefactError, MissingRequirementError, UsageError

Monitor = Callable[[nn.Module, int], dict[str, float]]
Losses = Callable[[nn.Module, Any], Mapping[str, torch.Tensor]]
SETTINGS = {"layers": ("a", "b"), "learning_rate": 0.1}
TIMES = ("seconds", "images_per_second")

pytestmark = pytest.mark.usefixtures("one_thread")


class Noisy(Dataset[torch.Tensor]):
    """Vectors float32 [4] with fresh noise at every reading, as an augmentation adds it."""

    def __init__(self, count: int = 22) -> None:
        self.vectors = torch.randn(count, 4, generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.vectors[index] + 0.1 * torch.randn(4)


def network(width: int = 8) -> nn.Sequential:
    """A model with a random layer and with statistics that are no parameters."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.3), nn.Linear(width, 1))


def squared_error(model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    error = (model(batch)[:, 0] - batch.sum(dim=1)).square().mean()
    return {"loss": error, "half": error / 2}


def fitted(
    session: FitSession,
    *,
    model: nn.Module | None = None,
    losses: Losses = squared_error,
    images: Dataset[torch.Tensor] | None = None,
    adam: bool = False,
    rate: float = 0.02,
    settings: Mapping[str, Any] = SETTINGS,
    epochs: int = 4,
    seed: int = 0,
    clip_norm: float | None = None,
    monitor: Monitor | None = None,
    best: str | None = None,
) -> tuple[nn.Module, list[dict[str, float]]]:
    model = model or network()
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    if adam:
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
    history = fit_epochs(
        model,
        losses,
        images or Noisy(),
        optimizer,
        scheduler,
        session,
        settings=settings,
        epochs=epochs,
        batch_size=5,
        seed=seed,
        clip_norm=clip_norm,
        monitor=monitor,
        best=best,
    )
    return model, history


def untimed(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in record.items() if name not in TIMES} for record in history]


def written(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def assert_same(first: nn.Module, second: nn.Module) -> None:
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def draws(model: nn.Module, epoch: int) -> dict[str, float]:
    """A metric that depends on the model and on the random numbers that a monitor sees."""
    return {"quality": np.float64(next(model.parameters()).sum() + torch.rand(()))}


def interrupt_at(epoch: int) -> Monitor:
    def monitor(model: nn.Module, now: int) -> dict[str, float]:
        if now == epoch:
            raise KeyboardInterrupt
        return draws(model, now)

    return monitor


# Same seed, same result


def test_two_trainings_are_bit_identical_and_another_seed_is_not(tmp_path: Path) -> None:
    first, first_history = fitted(FitSession(tmp_path), monitor=draws)
    torch.manual_seed(99)
    second, second_history = fitted(FitSession(tmp_path), monitor=draws)
    other, _ = fitted(FitSession(tmp_path), monitor=draws, seed=1)

    assert_same(first, second)
    assert untimed(first_history) == untimed(second_history)
    assert not torch.equal(first.state_dict()["0.weight"], other.state_dict()["0.weight"])


@pytest.mark.parametrize("adam", [False, True], ids=["sgd-multistep", "adamw-cosine"])
@pytest.mark.parametrize("best", [None, "quality"])
def test_training_resumed_after_an_interruption_equals_one_without(
    tmp_path: Path, adam: bool, best: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "whole").mkdir()
    whole, whole_history = fitted(FitSession(tmp_path / "whole"), adam=adam, monitor=draws, best=best)

    with pytest.raises(KeyboardInterrupt):
        fitted(FitSession(tmp_path), adam=adam, monitor=interrupt_at(3), best=best)
    assert "interrupted in epoch 3; continue with --resume" in capfd.readouterr().err
    torch.manual_seed(1234)
    resumed, history = fitted(FitSession(tmp_path, resume=True), adam=adam, monitor=draws, best=best)

    assert_same(whole, resumed)
    assert untimed(history) == untimed(whole_history)
    assert untimed(written(tmp_path)) == untimed(written(tmp_path / "whole"))
    assert "continuing after epoch 2" in capfd.readouterr().err


def test_interruption_within_an_epoch_loses_that_epoch_only(tmp_path: Path) -> None:
    steps = iter(range(100))

    def interrupted(model: nn.Module, batch: torch.Tensor) -> Mapping[str, torch.Tensor]:
        if next(steps) == 12:  # 5 batches an epoch: in the third
            raise KeyboardInterrupt
        return squared_error(model, batch)

    whole, _ = fitted(FitSession(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        fitted(FitSession(tmp_path), losses=interrupted)
    assert [record["epoch"] for record in written(tmp_path)] == [1, 2]
    resumed, _ = fitted(FitSession(tmp_path, resume=True))

    assert_same(whole, resumed)


def test_interruption_of_the_first_epoch_says_that_nothing_can_be_resumed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fitted(FitSession(tmp_path), epochs=1)  # an older training leaves its checkpoint
    with pytest.raises(KeyboardInterrupt):
        fitted(FitSession(tmp_path), monitor=interrupt_at(1))

    assert "interrupted in epoch 1; there is no checkpoint yet" in capfd.readouterr().err
    assert not (tmp_path / CHECKPOINT).exists()


def test_resuming_a_finished_training_changes_nothing(tmp_path: Path) -> None:
    whole, history = fitted(FitSession(tmp_path), monitor=draws, best="quality")
    resumed, again = fitted(FitSession(tmp_path, resume=True), monitor=interrupt_at(1), best="quality")

    assert_same(whole, resumed)
    assert again == history == written(tmp_path)


# What is computed


@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_steps_are_those_of_a_plain_torch_loop(tmp_path: Path, clip_norm: float | None) -> None:
    batches = []

    def noted(model: nn.Module, batch: torch.Tensor) -> Mapping[str, torch.Tensor]:
        batches.append(batch.clone())
        return squared_error(model, batch)

    trained, expected = nn.Linear(4, 1), nn.Linear(4, 1)
    expected.load_state_dict(trained.state_dict())
    fitted(FitSession(tmp_path), model=trained, losses=noted, clip_norm=clip_norm)

    optimizer = torch.optim.SGD(expected.parameters(), lr=0.02, momentum=0.9)
    for number, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = (0.02, 0.02, 0.002, 0.0002)[number // 5]
        optimizer.zero_grad()
        torch.autograd.backward(squared_error(expected, batch)["loss"])
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(expected.parameters(), clip_norm)
        optimizer.step()
    torch.testing.assert_close(trained.weight, expected.weight, rtol=1e-6, atol=1e-7)


def test_every_epoch_shows_every_image_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    seen: list[int] = []

    class Numbers(Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return 22

        def __getitem__(self, index: int) -> torch.Tensor:
            seen.append(index)
            return torch.full((4,), index / 22)

    fitted(FitSession(tmp_path), images=Numbers(), epochs=3)

    epochs = [seen[start : start + 22] for start in (0, 22, 44)]
    assert all(sorted(epoch) == list(range(22)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_model_trains_in_training_mode_is_judged_in_evaluation_mode_and_ends_plain_on_the_cpu(tmp_path: Path) -> None:
    seen = []

    def losses(model: nn.Module, batch: torch.Tensor) -> Mapping[str, torch.Tensor]:
        seen.append((type(model), model.training, torch.is_grad_enabled()))
        return squared_error(model, batch)

    def monitor(model: nn.Module, epoch: int) -> dict[str, float]:
        seen.append((type(model), model.training, torch.is_grad_enabled()))
        return {}

    model, _ = fitted(FitSession(tmp_path), losses=losses, monitor=monitor, epochs=1)

    assert seen == [(nn.Sequential, True, True)] * 5 + [(nn.Sequential, False, False)]
    assert not model.training
    assert next(model.parameters()).device.type == "cpu"
    assert type(model) is nn.Sequential
    assert model.forward.__func__ is nn.Sequential.forward  # type: ignore[attr-defined]


def test_bf16_runs_the_losses_under_autocast_and_keeps_weights_in_float32(tmp_path: Path) -> None:
    kinds = set()

    def losses(model: nn.Module, batch: torch.Tensor) -> Mapping[str, torch.Tensor]:
        kinds.add(model(batch).dtype)
        return squared_error(model, batch)

    model, _ = fitted(FitSession(tmp_path, precision="bf16"), losses=losses)
    assert kinds == {torch.bfloat16}
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    # The choice of one training is not that of the next one in the same process.
    kinds.clear()
    fitted(FitSession(tmp_path), losses=losses)
    assert kinds == {torch.float32}


# The record


def test_metrics_hold_a_line_per_epoch_with_means_over_the_images(tmp_path: Path) -> None:
    values: list[tuple[int, float]] = []

    def noted(model: nn.Module, batch: torch.Tensor) -> Mapping[str, torch.Tensor]:
        losses = squared_error(model, batch)
        values.append((len(batch), float(losses["loss"].detach())))
        return losses

    _, history = fitted(FitSession(tmp_path), losses=noted, monitor=lambda model, epoch: {"quality": epoch / 10})

    assert written(tmp_path) == history
    assert list(history[0]) == ["epoch", "loss", "half", "lr", *TIMES, "quality"]
    assert [record["epoch"] for record in history] == [1, 2, 3, 4]
    assert [record["lr"] for record in history] == pytest.approx([0.02, 0.02, 0.002, 0.0002])
    assert [record["quality"] for record in history] == [0.1, 0.2, 0.3, 0.4]
    assert [size for size, _ in values[:5]] == [5, 5, 5, 5, 2]
    mean = sum(size * value for size, value in values[:5]) / 22
    assert history[0]["loss"] == pytest.approx(mean)
    assert history[0]["half"] == pytest.approx(mean / 2)
    assert history[0]["images_per_second"] == pytest.approx(22 / history[0]["seconds"])


def test_metrics_have_the_rate_of_every_parameter_group_and_null_for_nan(tmp_path: Path) -> None:
    model = nn.Linear(4, 1)
    groups: list[dict[str, Any]] = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.001}]
    fit_epochs(
        model,
        squared_error,
        Noisy(),
        torch.optim.SGD(groups, lr=0.1),
        None,
        FitSession(tmp_path),
        settings={},
        epochs=1,
        batch_size=5,
        seed=0,
        monitor=lambda model, epoch: {"quality": math.nan},
    )

    (record,) = written(tmp_path)
    assert (record["lr"], record["lr_1"]) == (0.1, 0.001)
    assert record["quality"] is None


def test_tensorboard_gets_every_value_of_every_epoch(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(KeyboardInterrupt):
        fitted(FitSession(tmp_path, tensorboard=True), monitor=interrupt_at(3))
    _, history = fitted(FitSession(tmp_path, tensorboard=True, resume=True), monitor=draws)

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("loss", "half", "lr", "quality"):
        points = events.Scalars(name)
        assert [(point.step, point.value) for point in points] == [
            (record["epoch"], pytest.approx(record[name])) for record in history
        ]


def test_missing_tensorboard_is_named_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingRequirementError, match="--tensorboard needs the package tensorboard") as caught:
        fitted(FitSession(tmp_path, tensorboard=True))
    assert "edge-anomaly[tensorboard]" in caught.value.hint
    assert not (tmp_path / CHECKPOINT).exists()


# What the user sees


def test_long_trainings_say_about_twenty_lines_and_quick_ones_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "_QUIET_SECONDS", 1e9)
    fitted(FitSession(tmp_path), images=Noisy(2), epochs=40)
    first, last = capfd.readouterr().err.splitlines()
    assert first.startswith("epoch 1/40: loss ")
    assert last.startswith("epoch 40/40: loss ")

    monkeypatch.setattr(training, "_QUIET_SECONDS", 0.0)
    fitted(FitSession(tmp_path), images=Noisy(2), epochs=40)
    assert len(capfd.readouterr().err.splitlines()) == 21


def test_terminal_gets_a_bar_that_makes_room_for_the_monitors_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from edge_anomaly_runtime import progress

    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setattr(progress, "is_interactive", lambda: True)
    monkeypatch.setattr(training, "is_interactive", lambda: True)

    def monitor(model: nn.Module, epoch: int) -> dict[str, float]:
        return {"quality": float(sum(progress.track(range(3), "judging", 3)))}

    fitted(FitSession(tmp_path), monitor=monitor)

    output = capfd.readouterr()
    assert output.out == ""
    assert "epoch 4/4" in output.err
    assert "judging" in output.err


# What ends a training


def nan_in_epoch_3(name: str) -> Losses:
    steps = iter(range(100))

    def losses(model: nn.Module, batch: torch.Tensor) -> Mapping[str, torch.Tensor]:
        values = squared_error(model, batch)
        return {**values, name: values[name] * math.nan} if next(steps) == 11 else values

    return losses


@pytest.mark.parametrize("name", ["loss", "half"])
def test_loss_that_is_not_finite_stops_with_its_place_and_leaves_the_last_good_checkpoint(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "good").mkdir()
    with pytest.raises(KeyboardInterrupt):
        fitted(FitSession(tmp_path / "good"), monitor=interrupt_at(3))

    with pytest.raises(UsageError, match=f"{name!r} is nan in epoch 3, batch 2") as caught:
        fitted(FitSession(tmp_path), losses=nan_in_epoch_3(name))

    assert "smaller learning rate (it was 0.002)" in caught.value.hint
    assert f"epoch 2 is intact: {tmp_path / CHECKPOINT}" in caught.value.hint
    assert "--precision" not in caught.value.hint
    good = torch.load(tmp_path / "good" / CHECKPOINT, weights_only=True)["model"]
    kept = torch.load(tmp_path / CHECKPOINT, weights_only=True)["model"]
    assert all(torch.equal(kept[key], good[key]) for key in good)


def test_nan_in_half_precision_names_fp32_and_can_be_resumed_with_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is nan in epoch 3") as caught:
        fitted(FitSession(tmp_path, precision="bf16"), losses=nan_in_epoch_3("loss"))
    assert "--precision fp32 (it was bf16)" in caught.value.hint

    _, history = fitted(FitSession(tmp_path, resume=True, precision="fp32"))
    assert len(history) == 4


def test_weights_spoilt_by_the_last_step_of_an_epoch_never_reach_the_checkpoint(tmp_path: Path) -> None:
    steps = iter(range(100))

    def losses(model: nn.Module, batch: torch.Tensor) -> Mapping[str, torch.Tensor]:
        values = dict(squared_error(model, batch))
        if next(steps) == 4:  # the value is finite, its gradient is not
            values["loss"] = values["loss"] + (next(model.parameters()).sum() * 0).sqrt()
        return values

    with pytest.raises(UsageError, match=r"'0\.weight' are not finite after epoch 1") as caught:
        fitted(FitSession(tmp_path), losses=losses)
    assert "None is saved yet" in caught.value.hint
    assert not (tmp_path / CHECKPOINT).exists()


def states_of(states: list[dict[str, torch.Tensor]], metrics: list[float], stop: int = 0) -> Monitor:
    def monitor(model: nn.Module, epoch: int) -> dict[str, float]:
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        if epoch == stop:
            raise StopTraining("it collapsed", {"quality": metrics[epoch - 1]})
        return {"quality": metrics[epoch - 1]}

    return monitor


@pytest.mark.parametrize(
    ("metrics", "best", "stop", "kept"),
    [
        pytest.param([0.1, 0.9, 0.3, 0.2], "quality", 0, 2, id="highest"),
        pytest.param([0.9, 0.9, 0.3, 0.9], "quality", 0, 1, id="first of equals"),
        pytest.param([math.nan, 0.2, math.nan, 0.1], "quality", 0, 2, id="nan is never the best"),
        pytest.param([0.1, 0.9, 0.3, 0.2], None, 0, 4, id="last"),
        pytest.param([0.1, 0.2, 0.9, 0.2], None, 3, 2, id="last before the stop"),
        pytest.param([0.2, 0.1, 0.9, 0.2], "quality", 3, 1, id="highest before the stop"),
    ],
)
def test_state_at_the_end_is(tmp_path: Path, metrics: list[float], best: str | None, stop: int, kept: int) -> None:
    states: list[dict[str, torch.Tensor]] = []
    model, history = fitted(FitSession(tmp_path), monitor=states_of(states, metrics, stop), best=best)

    assert len(states) == len(history) == (stop or 4)
    for name, value in model.state_dict().items():
        assert torch.equal(value, states[kept - 1][name]), name


def test_stop_logs_reason_and_metrics_and_a_resumed_training_stays_stopped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stopped, history = fitted(FitSession(tmp_path), monitor=states_of([], [0.1, 0.2, 0.3], stop=3))
    assert "stopped after epoch 3: it collapsed; the state of epoch 2 is kept" in capfd.readouterr().err
    assert history[-1]["quality"] == 0.3

    resumed, again = fitted(FitSession(tmp_path, resume=True), monitor=interrupt_at(4))
    assert_same(stopped, resumed)
    assert again == history == written(tmp_path)


def test_stop_in_the_first_epoch_gives_the_model_back_as_it_came(tmp_path: Path) -> None:
    model, history = fitted(FitSession(tmp_path), monitor=states_of([], [0.1], stop=1), best="quality")

    assert_same(model, network())
    assert len(history) == 1


# What cannot be used


def test_resume_with_changed_settings_names_each_with_both_values(tmp_path: Path) -> None:
    fitted(FitSession(tmp_path), settings={"rate": 0.1, "layers": ("a",), "gone": 1, "same": [1, 2]})
    before = (tmp_path / CHECKPOINT).read_bytes()

    with pytest.raises(UsageError) as caught:
        fitted(
            FitSession(tmp_path, resume=True),
            settings={"rate": 0.2, "layers": ("a", "b"), "new": None, "same": (1, 2)},
            images=Noisy(21),
        )
    for text in (
        "rate was 0.1, is 0.2",
        "layers was ['a'], is ['a', 'b']",
        "gone was 1, is not there",
        "number of images was 22, is 21",
        "new was not there, is None",
    ):
        assert text in caught.value.what
    assert "same" not in caught.value.what
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_resume_without_a_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no checkpoint") as caught:
        fitted(FitSession(tmp_path, resume=True))
    assert "without --resume" in caught.value.hint


def test_checkpoint_of_another_model_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    fitted(FitSession(tmp_path))
    with pytest.raises(ArtefactError, match="does not fit this training"):
        fitted(FitSession(tmp_path, resume=True), model=network(width=9))

    content = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtefactError, match=CHECKPOINT):
        fitted(FitSession(tmp_path, resume=True))

    torch.save({"schema": "edge-anomaly.checkpoint/9"}, tmp_path / CHECKPOINT)
    with pytest.raises(ArtefactError, match="checkpoint/9"):
        fitted(FitSession(tmp_path, resume=True))


def test_impossible_devices_and_precisions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'fp8'"):
        FitSession(tmp_path, precision="fp8")
    with pytest.raises(UsageError, match="'gpu'"):
        resolve_device("gpu")
    with pytest.raises(UsageError, match="fp16 needs a GPU"):
        fitted(FitSession(tmp_path, precision="fp16", device="cpu"))
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_a_missing_requirement() -> None:
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(MissingRequirementError, match="sees no GPU"):
        resolve_device("cuda")


# Several processes

SCRIPT = """
import os, sys
from pathlib import Path
import torch
from torch import nn
from edge_anomaly.training import FitSession, fit_epochs
from edge_anomaly_runtime.errors import UsageError

folder, rank = Path(sys.argv[1]), int(os.environ.get("RANK", 0))
torch.set_num_threads(1)
vectors = torch.randn(24, 4, generator=torch.Generator().manual_seed(5))


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8) if norm else nn.Tanh(), nn.Linear(8, 1))
        self.unused = nn.Linear(3, 3)


def train(name, *, norm=False, count=24, broken=False, monitor=None, best=None, resume=False):
    torch.manual_seed(1)
    model, steps = Net(norm), iter(range(1000))

    def losses(model, batch):
        # Through a part of the model, not its forward: gradients must be averaged all the same.
        loss = (model.body(batch)[:, 0] - batch.sum(dim=1)).square().mean()
        return {"loss": loss * float("nan") if broken and rank == 1 and next(steps) == 7 else loss}

    (folder / name).mkdir(exist_ok=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    session = FitSession(folder / name, resume=resume, device="cpu")
    history = fit_epochs(model, losses, list(vectors[:count]), optimizer, None, session, settings={}, epochs=3,
                         batch_size=6, seed=0, clip_norm=1.0, monitor=monitor, best=best)
    result = model.state_dict(), [record["loss"] for record in history]
    torch.save(result, folder / f"{name}{'-resumed' if resume else ''}-{rank}.pt")


train("plain")
if "RANK" in os.environ:
    train("plain", resume=True)
    # Shares of unequal size and statistics that differ between the processes, which also disagree about the best epoch.
    train("norm", norm=True, count=23, monitor=lambda model, epoch: {"quality": epoch * (1 - 2 * rank)}, best="quality")
    try:
        train("broken", broken=True)
    except UsageError as error:
        (folder / f"broken-{rank}.txt").write_text(error.what)
"""


def test_two_processes_agree_and_average_their_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, single, double = tmp_path / "script.py", tmp_path / "single", tmp_path / "double"
    script.write_text(SCRIPT)
    single.mkdir()
    double.mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

    two = subprocess.run([*launcher, str(script), str(double)], capture_output=True, text=True, timeout=300)
    assert two.returncode == 0, two.stderr
    monkeypatch.setattr(sys, "argv", [str(script), str(single)])
    runpy.run_path(str(script))

    for name in ("plain", "plain-resumed", "norm"):
        (first, first_losses), (second, second_losses) = (
            torch.load(double / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)
        )
        assert first_losses == second_losses
        for key in first:
            assert torch.equal(first[key], second[key]), (name, key)
    expected, expected_losses = torch.load(single / "plain-0.pt", weights_only=True)
    trained, losses = torch.load(double / "plain-0.pt", weights_only=True)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    for key in expected:
        torch.testing.assert_close(trained[key], expected[key], rtol=1e-5, atol=1e-6)
    # One writes and speaks, and a loss that is not finite in one process stops both at the same place.
    assert len(written(double / "plain")) == 3
    assert two.stderr.count("epoch 3/3") == 2
    assert {(double / f"broken-{rank}.txt").read_text() for rank in (0, 1)} == {
        "The loss 'loss' is nan in epoch 2, batch 4; training stopped."
    }
