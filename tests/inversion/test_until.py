"""An inversion ends as soon as the model is sure of its images, and a finished image makes room for the next one."""

import copy
from itertools import pairwise

import pytest
import torch
from cnn_cases import small_cnn
from inversion_cases import SureOfEven, small_model

from smi_fast import Inverter, Mass, NonFiniteError, deep_inversion
from smi_fast.inversion.meter import confidences
from smi_fast.inversion.schedule import RebirthSchedule, WarmupCosine
from smi_fast.inversion.until import Until
from smi_fast.inversion.views import random_views
from smi_fast.models import cifar10_vit
from smi_fast.seeds import batch_seed, seeded_generator

OPTIONS = {
    "stopping": {3: 0.3, 6: 0.5}, "iterations": 90, "lr": 0.1, "lr_schedule": WarmupCosine(4),
    "objective": deep_inversion(1e-3, norm="image"), "progress": False,
}  # fmt: skip


@pytest.fixture
def model(seed):
    return small_model()


@pytest.fixture(scope="module")
def trained():
    return cifar10_vit()


def test_an_image_is_sure_after_checks_in_a_row():
    logits = torch.tensor([[0.8, 0.2], [0.2, 0.8], [0.8, 0.2], [0.7, 0.3]]).log()
    until = Until(0.75, checks=3)
    assert until.count([2, 2, 0, 5], logits, torch.tensor([0, 0, 0, 0])) == [3, 0, 1, 0]
    soft = torch.tensor([[0.6, 0.4], [0.6, 0.4], [1.0, 0.0], [0.9, 0.1]])  # they share 0.8, 0.4, 0.8 and 0.8
    assert until.count([2, 2, 0, 5], logits, soft) == [3, 0, 1, 6]


def test_a_run_ends_when_the_model_is_sure_of_all_images(trained, seed):
    """The confidence is measured here from each iteration's images by the model itself."""
    targets, until, sure = [4, 0, 2], Until(0.6, checks=2, every=3), []
    inverter = Inverter(trained, until=until, **OPTIONS)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (inverter.mean, inverter.std))

    def watch(step):
        images = step.state_dict()["images"] * std + mean
        found, _ = confidences(inverter.backbone, images, step.keep, torch.tensor(targets), inverter.mean, inverter.std)
        sure.append((found >= until.confidence).tolist())

    result = inverter.run(targets, seed, watch)
    checks = [sure[iteration - 1] for iteration in range(9, len(sure) + 1, 3)]
    ends = [12 + 3 * n for n, pair in enumerate(pairwise(checks)) if all(map(all, pair))]
    assert ends == [len(result.losses)]
    assert result.iterations.tolist() == ends * 3
    assert result.history[-1].end == ends[0]


def test_a_run_that_goes_on_from_a_state_ends_where_it_would_have(trained, seed):
    """Also from a state that was saved in an iteration after which the model was checked, or after the last one."""
    targets, states = [4, 0, 2], []
    inverter = Inverter(trained, until=Until(0.6, checks=2, every=3), **OPTIONS)
    whole = inverter.run(targets, seed, lambda step: states.append(step.state_dict()))
    assert 12 <= len(states) < 90
    for state in states[8:]:
        result = inverter.run(targets, seed, state=state)
        assert torch.equal(result.images, whole.images)
        assert len(result.losses) == len(states)


def test_streamed_images_are_those_of_runs_of_their_own(trained, seed):
    targets, until = [4, 9, 2, 0, 6], SureOfEven(checks=2, every=3)
    result = Inverter(trained, until=until, **OPTIONS).stream(targets, 2, seed)
    assert result.targets.tolist() == targets
    assert result.iterations.tolist() == [12, 90, 12, 12, 12]
    for number, target in enumerate(targets):
        generator = seeded_generator(batch_seed(seed, number))
        views = random_views(90, (32, 32), jitter=1 / 8, generator=generator)
        noise = torch.randn(1, 3, 32, 32, generator=generator)
        alone = Inverter(trained, until=until, views=lambda *_, views=views: views, **OPTIONS)
        expected = alone.run([target], start=noise)
        assert result.iterations[number] == len(expected.losses)
        assert torch.equal(result.keep[number], expected.keep[0])
        # Where a gradient is all but zero, rounding decides Adam's step.
        assert ((result.images[number] - expected.images[0]).abs() > 1e-3).float().mean() < 0.02


def test_images_of_a_cnn_go_through_a_stream_as_through_runs_of_their_own(seed):
    """Each begins at half resolution, and Adam and the learning rate begin anew at the full one."""
    options = OPTIONS | {"stopping": "dense", "pooling": {0: 2, 4: 1}, "until": Until(1e-9, 1, 3)}
    model = small_cnn(torch.float32)
    inverter = Inverter(model, **options)
    result = inverter.stream([4, 0, 2], 2, seed)
    assert result.iterations.tolist() == [7, 7, 7]
    for number, target in enumerate([4, 0, 2]):
        generator = seeded_generator(batch_seed(seed, number))
        views = inverter.draw_views(1, generator)
        noise = torch.randn(1, 3, 32, 32, generator=generator)
        alone = Inverter(model, views=lambda *_, views=views: views, **options).run([target], start=noise)
        assert ((result.images[number] - alone.images[0]).abs() > 1e-3).float().mean() < 0.05


def test_a_stream_gives_the_same_bits_again_and_loses_no_image(model, seed):
    inverter = Inverter(model, until=Until(0.99, checks=1, every=7), **OPTIONS)
    first, second = (inverter.stream([0, 1, 2, 3], 2, seed) for _ in range(2))
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.losses, second.losses)
    assert first.iterations.max() <= 90


def test_a_stream_that_is_interrupted_has_the_images_that_have_begun(model, seed):
    def interrupt(step):
        if step.iteration == 20:
            raise KeyboardInterrupt

    result = Inverter(model, until=Until(0.999, 1, 30), **OPTIONS).stream([0, 1, 2, 3, 4], 2, seed, interrupt)
    assert result.interrupted
    assert result.targets.tolist() == [0, 1]
    assert result.images.isfinite().all()


def test_a_stream_that_is_interrupted_before_a_stopping_has_the_images_so_far(model, seed):
    """In the first batch those of the batch, in the second one those that the first one has finished."""
    for number, images in ((1, [0, 1]), (2, [0, 1])):
        begins = []

        def interrupt(step, begins=begins, number=number):
            begins.extend([step] if step.iteration == 0 else [])
            if len(begins) == number and step.iteration == 1:
                raise KeyboardInterrupt

        result = Inverter(model, until=Until(1e-9, 1, 4), **OPTIONS).stream([0, 1, 2], 2, seed, interrupt)
        assert len(begins) == number
        assert result.interrupted
        assert result.targets.tolist() == images
        assert result.keep.shape == (2, 16 if number == 1 else 5)


def test_finished_images_survive_attention_that_is_not_finite(model, seed):
    begins = []

    def spoil(step):
        begins.extend([step] if step.iteration == 0 else [])
        if len(begins) == 2:
            model.blocks[-1].attn.qkv.weight.data.fill_(float("nan"))

    with pytest.raises(NonFiniteError, match="iteration 3 no patch") as caught:
        Inverter(model, until=Until(1e-9, 1, 4), **OPTIONS).stream([0, 1, 2], 2, seed, spoil)
    assert caught.value.result.targets.tolist() == [0, 1]
    assert caught.value.result.images.isfinite().all()
    assert caught.value.result.iterations.tolist() == [10, 10]


@pytest.mark.parametrize("stage", ["before the last stopping", "after it"])
def test_a_stream_goes_on_with_a_model_that_a_callback_has_changed(model, seed, stage):
    stopping, losses = ({9: 0.3} if stage == "before the last stopping" else {2: 0.3}), []
    for graphs in (True, False):
        used = copy.deepcopy(model)

        def change(step, used=used):
            if step.iteration == 5:
                used.head = torch.nn.Linear(32, 5, bias=False)
                torch.nn.init.ones_(used.head.weight)

        options = OPTIONS | {"stopping": stopping, "iterations": 14, "graphs": graphs}
        losses.append(Inverter(used, until=Until(0.999, 1, 4), **options).stream([0, 1], 2, seed, change).losses)
    torch.testing.assert_close(*losses)


def test_a_stream_releases_images_too(model, seed):
    options = OPTIONS | {"stopping": RebirthSchedule(2), "until": Until(0.3, 1, 2)}
    result = Inverter(model, **options).stream([4, 0, 2], 2, seed)
    assert result.targets.tolist() == [4, 0, 2] * 2
    for image in range(3):
        assert sorted([*result.keep[image].tolist(), *result.keep[3 + image].tolist()]) == list(range(16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"until": None}, "until="),
        ({"published": True}, "with published=True"),
        ({"objective": deep_inversion(1e-3)}, 'norm="image"'),
        ({"prior": lambda images, kept: images.sum()}, 'norm="image"'),
        ({"stopping": {3: Mass(0.9)}}, "Mass"),
        ({"views": lambda iterations, generator: torch.zeros(iterations, 3).int()}, "views="),
    ],
)
def test_images_that_cannot_leave_one_by_one_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        Inverter(model, **OPTIONS | {"until": 0.9} | options).stream([0], 2)


@pytest.mark.parametrize(
    ("until", "error", "message"),
    [
        (1.0, ValueError, "must lie in"),
        ("0.9", TypeError, "'0.9'"),
        (True, TypeError, "True"),
        (lambda: Until(0.9, checks=0), ValueError, "checks must be at least 1, got 0"),
        (lambda: Until(0.9, every=2.5), TypeError, "2.5"),
    ],
)
def test_a_wrong_end_is_refused_with_its_value(model, until, error, message):
    with pytest.raises(error, match=message):
        Inverter(model, until=until() if callable(until) else until)
