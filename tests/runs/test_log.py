"""A log has every iteration that it was told of once, and its figures are those of the images."""

import csv
import io
import resource
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import pytest
import torch
from inversion_cases import small_model
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from smi_fast import Inverter, RebirthSchedule, deep_inversion
from smi_fast.inversion.until import Until
from smi_fast.runs.log import Logger, open_log

KEPT = {0: 16, 4: 8, 7: 4}  # patches from an iteration on


def told(log, *lines: tuple[int, int]) -> None:
    for number, iteration in lines:
        log.write(number, iteration, {"loss": number + iteration / 1000, "speed": 7.0})


def table(folder, name: str = "log/log.csv") -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / name).read_text())))


def places(folder, name: str = "log/log.csv") -> list[tuple[int, int]]:
    return [(int(row["batch"]), int(row["iteration"])) for row in table(folder, name)]


def events(folder) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def steps(folder, tag: str = "loss") -> list[int]:
    return [event.step for event in events(folder).Scalars(tag)]


def inverter(**options) -> Inverter:
    options = {"stopping": {4: 0.5, 7: 0.5}, "iterations": 10, "backend": "torch"} | options
    return Inverter(small_model(), progress=False, dtype=torch.float32, **options)


@torch.no_grad()
def confidence(model, images: torch.Tensor, keep: torch.Tensor, targets: list[int]) -> float:
    """The mean probability of the targets, by timm's own layers on the tokens of the kept patches."""
    found, mean, std = [], *(torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    for image, kept, target in zip((images - mean) / std, keep, targets, strict=True):
        tokens = (model.patch_embed(image[None]) + model.pos_embed[:, 1:])[:, kept]
        tokens = torch.cat((model.cls_token + model.pos_embed[:, :1], tokens), 1)
        found.append(model.forward_head(model.norm(model.blocks(tokens))).softmax(1)[0, target].item())
    return sum(found) / len(found)


@contextmanager
def files_of_at_most(size: int):
    """No file can grow beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_line_is_in_the_table_when_write_returns(tmp_path):
    with open_log("csv", tmp_path, iterations=100) as log:
        for iteration in (50, 100):
            log.write(3, iteration, {"loss": 1 / iteration, "confidence": float("nan")})
            assert table(tmp_path)[-1]["loss"] == f"{1 / iteration:.6g}"
    assert (tmp_path / "log" / "log.csv").read_text().splitlines()[0] == "batch,iteration,seconds,loss,confidence"
    assert places(tmp_path) == [(3, 50), (3, 100)]
    assert [row["confidence"] for row in table(tmp_path)] == ["nan", "nan"]


@pytest.mark.parametrize("lost", range(1, 52, 5))
def test_a_line_that_a_kill_has_cut_is_removed_and_written_again(tmp_path, lost):
    with open_log("csv", tmp_path, iterations=100) as log:
        told(log, (0, 50))
    path, whole = tmp_path / "log" / "log.csv", (tmp_path / "log" / "log.csv").read_bytes()
    path.write_bytes(whole[: len(whole) - lost])
    with open_log("csv", tmp_path, iterations=100) as log:
        assert path.read_bytes() in (b"", whole.splitlines(True)[0])
        told(log, (0, 50), (0, 100))
    assert path.read_text().startswith("batch,iteration,seconds,loss,speed\n0,50,")
    assert places(tmp_path) == [(0, 50), (0, 100)]


def test_a_batch_that_goes_on_from_an_earlier_iteration_replaces_its_lines_from_there_on(tmp_path):
    with open_log("csv", tmp_path, iterations=200) as log:
        told(log, (0, 150), (0, 200), (2, 50), (2, 100), (2, 150), (1, 50))
    with open_log("csv", tmp_path, iterations=200) as log:
        log.write(2, 100, {"loss": -1.0, "speed": 7.0})
        told(log, (2, 150), (2, 200))
    assert places(tmp_path) == [(0, 150), (0, 200), (2, 50), (1, 50), (2, 100), (2, 150), (2, 200)]
    assert [row["loss"] for row in table(tmp_path) if row["iteration"] == "100"] == ["-1"]


def test_seconds_go_on_over_processes(tmp_path, monkeypatch):
    now = [5000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    for _ in range(2):
        with open_log("csv", tmp_path, iterations=100) as log:
            for iteration in (50, 100):
                now[0] += 30
                told(log, (len(places(tmp_path)) if (tmp_path / "log" / "log.csv").exists() else 0, iteration))
        now[0] = 100.0  # another machine's clock
    assert [row["seconds"] for row in table(tmp_path)] == ["30.0", "60.0", "90.0", "120.0"]


def test_the_first_line_decides_the_columns(tmp_path):
    with open_log("csv", tmp_path, iterations=100) as log:
        told(log, (0, 50))
    with open_log("csv", tmp_path, iterations=100) as log:
        log.write(0, 100, {"new": 1.0, "speed": 2.0})
    assert table(tmp_path)[1] == table(tmp_path)[1] | {"speed": "2", "loss": "nan"}
    assert "new" not in table(tmp_path)[1]


@pytest.mark.parametrize(
    "text",
    [
        "hello",
        "a,b,c\n1,2,3\n",
        "batch,iteration,seconds,loss\n0,50,1.0\n",
        "batch,iteration,seconds,loss\n0,50,1.0,2,3\n",
        "batch,iteration,seconds,loss\n0,5O,1.0,2\n0,1",
        "batch,iteration,seconds,loss\n0,50,1.0,\0\0\n",
        "batch,iteration,seconds,loss\n\n",
    ],
)
def test_another_file_or_a_damaged_one_is_refused_and_left_alone(tmp_path, text):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "log.csv").write_text(text)
    with pytest.raises(ValueError, match=r"log\.csv is no log of a run, or damaged: "):
        open_log("csv", tmp_path, iterations=100)
    assert (tmp_path / "log" / "log.csv").read_text() == text


def test_each_process_has_files_of_its_own(tmp_path):
    for rank in (0, 1, 12):
        for kind in ("csv", "tensorboard"):
            with open_log(kind, tmp_path, iterations=100, rank=rank) as log:
                told(log, (rank, 50))
    tables = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.csv")]
    assert {name: places(tmp_path, name) for name in tables} == {
        "log/log.csv": [(0, 50)],
        "log/log-1.csv": [(1, 50)],
        "log/log-12.csv": [(12, 50)],
    }
    assert {path: steps(tmp_path / path) for path in ("log", "log/1", "log/12")} == {
        "log": [50],
        "log/1": [150],
        "log/12": [1250],
    }


def test_a_full_disk_is_an_error_that_names_the_table(tmp_path):
    with open_log("csv", tmp_path, iterations=100) as log:
        told(log, (0, 50))
        with files_of_at_most(60), pytest.raises(OSError, match=r"too large.*log\.csv"):
            told(log, (0, 100), (1, 50))
    with open_log("csv", tmp_path, iterations=100) as log:
        told(log, (0, 100))
    assert places(tmp_path) == [(0, 50), (0, 100)]


@pytest.fixture
def each_file_has_a_second_of_its_own(monkeypatch):
    """TensorBoard reads files in the order of their names, which begin with the second in which they were opened."""
    seconds = count(2_000_000_000)
    monkeypatch.setattr(time, "time", lambda: next(seconds))


def test_tensorboard_counts_the_iterations_of_all_batches(tmp_path):
    with open_log("tensorboard", tmp_path, iterations=100) as log:
        told(log, (0, 50), (0, 100), (1, 50))
        seen = events(tmp_path / "log")  # before the log is closed
    assert [(event.step, event.value) for event in seen.Scalars("loss")] == [
        (50, pytest.approx(0.05)),
        (100, pytest.approx(0.1)),
        (150, pytest.approx(1.05)),
    ]
    assert seen.Tags()["scalars"] == ["loss", "speed"]


def test_tensorboard_shows_each_step_once_after_a_run_has_gone_on(tmp_path, each_file_has_a_second_of_its_own):
    with open_log("tensorboard", tmp_path, iterations=100) as log:
        told(log, (0, 50), (0, 100), (1, 50), (1, 100))
    with open_log("tensorboard", tmp_path, iterations=100) as log:
        log.write(1, 50, {"loss": -1.0})
    assert [(event.step, event.value) for event in events(tmp_path / "log").Scalars("loss")][2:] == [(150, -1.0)]


def test_tensorboard_hides_no_later_batches_that_are_finished(tmp_path, each_file_has_a_second_of_its_own):
    """A process that goes on may take over an earlier batch than those that it has finished."""
    with open_log("tensorboard", tmp_path, iterations=100) as log:
        told(log, (1, 50), (1, 100), (3, 50), (3, 100))
    with open_log("tensorboard", tmp_path, iterations=100) as log:
        told(log, (2, 100))
    assert sorted(steps(tmp_path / "log")) == [150, 200, 300, 350, 400]


def test_a_picture_holds_the_images_pixel_by_pixel(tmp_path, seed):
    images = torch.rand(5, 3, 8, 6)
    with open_log("tensorboard", tmp_path, iterations=100) as log:
        log.picture(0, 50, images)
    [event] = events(tmp_path / "log").Images("images")
    assert event.step == 50
    picture = torch.tensor(list(Image.open(io.BytesIO(event.encoded_image_string)).tobytes()))
    picture = picture.view(2 * 10 + 2, 4 * 8 + 2, 3).permute(2, 0, 1)
    for number, image in enumerate(images):
        row, column = 2 + number // 4 * 10, 2 + number % 4 * 8
        tile = picture[:, row : row + 8, column : column + 6]
        torch.testing.assert_close(tile / 255, image, atol=1 / 255, rtol=0)


def test_without_tensorboard_one_sentence_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.delitem(sys.modules, "smi_fast.runs.tensorboard", raising=False)
    with pytest.raises(ValueError, match=r'pip install "\.\[tensorboard\]"'):
        open_log("tensorboard", tmp_path, iterations=100)
    assert not list(tmp_path.iterdir())


def test_another_kind_and_counts_below_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be one of csv, tensorboard, got 'wandb'"):
        open_log("wandb", tmp_path, iterations=100)
    for options in ({"every": 0}, {"pictures": -1}):
        [(name, value)] = options.items()
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
            Logger(None, inverter(), **options)


def test_without_a_log_nothing_is_written(tmp_path, seed):
    with open_log(None, tmp_path, iterations=10) as log:
        inverter().run([0, 1], seed, Logger(log, inverter(), every=1))
    assert not list(tmp_path.iterdir())


def test_figures_are_those_of_the_images_and_logging_changes_no_bit(tmp_path, seed):
    ours, targets = inverter(), [1, 3, 0]
    plain = ours.run(targets, seed)
    with open_log("csv", tmp_path, iterations=10) as log:
        logger = Logger(log, ours, every=3)
        logger.begin(7)
        result = ours.run(targets, seed, logger)
    assert torch.equal(result.images, plain.images)
    rows = table(tmp_path)
    assert ",".join(rows[0]) == "batch,iteration,seconds,loss,confidence,patches,images_per_second"
    assert places(tmp_path) == [(7, 3), (7, 6), (7, 9), (7, 10)]
    for row in rows:
        iteration = int(row["iteration"])
        assert float(row["loss"]) == pytest.approx(result.losses[iteration - 1].item(), rel=1e-5)
        assert float(row["patches"]) == [kept for start, kept in KEPT.items() if start < iteration][-1]
    expected = confidence(ours.backbone.model, result.images, result.keep, targets)
    assert float(rows[-1]["confidence"]) == pytest.approx(expected, rel=1e-4)


def test_images_per_second_count_the_iterations_since_the_last_line(tmp_path, seed, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    ours = inverter(stopping="dense")
    with open_log("csv", tmp_path, iterations=10) as log:
        logger = Logger(log, ours, every=4)

        def callback(step):
            now[0] += 1 if step.iteration < 8 else 5
            logger(step)

        ours.run([0, 1, 2], seed, callback)
    # 3 images take 10 iterations: 4 and 4 of a second each, and 2 of five seconds
    assert [float(row["images_per_second"]) for row in table(tmp_path)] == pytest.approx([0.3, 0.3, 0.06])


def test_iterations_without_a_line_look_at_nothing_but_their_number(tmp_path):
    @dataclass
    class Blind:
        iteration: int

    with open_log("csv", tmp_path, iterations=100) as log:
        logger = Logger(log, inverter(iterations=100), every=50)
        for iteration in range(49):
            logger(Blind(iteration))
        with pytest.raises(AttributeError, match="targets"):
            logger(Blind(49))


def test_a_run_that_goes_on_has_the_lines_of_one_that_was_not_interrupted(tmp_path, seed):
    ours, states = inverter(), {}
    for folder in ("whole", "parts"):
        (tmp_path / folder / "log").mkdir(parents=True)
    with open_log("csv", tmp_path / "whole", iterations=10) as log:
        logger = Logger(log, ours, every=2)
        ours.run([0, 1], seed, lambda step: [logger(step), states.update({step.iteration: step.state_dict()})])
    (tmp_path / "parts" / "log" / "log.csv").write_text((tmp_path / "whole" / "log" / "log.csv").read_text()[:-30])
    with open_log("csv", tmp_path / "parts", iterations=10) as log:
        ours.run([0, 1], seed, Logger(log, ours, every=2), state=states[4])
    whole, parts = (
        [{name: row[name] for name in ("batch", "iteration", "loss", "confidence", "patches")} for row in table(folder)]
        for folder in (tmp_path / "whole", tmp_path / "parts")
    )
    assert whole == parts
    assert len(whole) == 5


def test_a_stream_has_each_of_its_iterations_once(tmp_path, seed):
    ours = inverter(objective=deep_inversion(norm="image"), until=Until(0.99, every=2), stopping={2: 0.5}, iterations=6)
    seen = []
    with open_log("csv", tmp_path, iterations=6) as log:
        logger = Logger(log, ours, every=1)
        ours.stream([0, 1, 2, 3, 4], 2, seed, lambda step: [logger(step), seen.append(step.stage.patches)])
    assert [iteration for _, iteration in places(tmp_path)] == [*range(1, len(seen) + 1)]
    assert [float(row["patches"]) for row in table(tmp_path)] == seen
    assert len(seen) > 6


def test_a_stream_that_goes_on_is_told_how_many_iterations_are_done(tmp_path, seed):
    ours = inverter(objective=deep_inversion(norm="image"), until=Until(0.99, every=2), stopping={2: 0.5}, iterations=6)
    states = []
    with open_log("csv", tmp_path, iterations=6) as log:
        logger = Logger(log, ours, every=1)
        ours.stream([0, 1, 2], 2, seed, lambda step: [logger(step), states.append(step.state_dict())])
    whole = [(row["iteration"], row["loss"], row["confidence"]) for row in table(tmp_path)]
    with open_log("csv", tmp_path, iterations=6) as log:
        logger = Logger(log, ours, every=1)
        logger.begin(0, done=9)
        ours.stream([0, 1, 2], 2, seed, logger, state=states[8])
    assert [(row["iteration"], row["loss"], row["confidence"]) for row in table(tmp_path)] == whole
    assert len(whole) == len(states) > 9


def test_images_that_were_released_are_not_measured_again_and_targets_may_be_soft(tmp_path, seed):
    hard = torch.tensor([2, 4])
    ours = inverter(stopping=RebirthSchedule(2))
    for name, targets in (("hard", hard), ("soft", torch.eye(5)[hard])):
        (tmp_path / name).mkdir()
        with open_log("csv", tmp_path / name, iterations=10) as log:
            result = ours.run(targets, seed, Logger(log, ours))
        expected = confidence(ours.backbone.model, result.images[-2:], result.keep[-2:], hard.tolist())
        assert float(table(tmp_path / name)[0]["confidence"]) == pytest.approx(expected, rel=1e-4)


def test_every_so_often_there_is_a_picture_of_up_to_16_images(tmp_path, seed):
    ours, targets = inverter(), [0, 1, 2, 3] * 5
    with open_log("tensorboard", tmp_path, iterations=10) as log:
        result = ours.run(targets, seed, Logger(log, ours, every=2, pictures=2))
    pictures = events(tmp_path / "log").Images("images")
    assert [event.step for event in pictures] == [4, 8, 10]
    picture = Image.open(io.BytesIO(pictures[-1].encoded_image_string))
    assert picture.size == (4 * 10 + 2, 4 * 10 + 2)
    corner = torch.tensor(list(picture.crop((2, 2, 10, 10)).tobytes())).view(8, 8, 3).permute(2, 0, 1)
    torch.testing.assert_close(corner / 255, result.images[0], atol=1 / 255, rtol=0)
