"""Verifier: another network's accuracy on the images during a run."""

import pytest
import torch
from cnn_cases import at_random, small_cnn
from torchvision import models as torchvisions

from smi_fast import CNN, Inverter, NonFiniteError, Verifier, deep_inversion_cnn
from smi_fast.inversion.until import Until
from smi_fast.models import cifar10_vit


def run(verifier, seed, **options) -> list[torch.Tensor]:
    """The images after each iteration of an inversion with the verifier."""
    images = []

    def callback(step):
        verifier(step)
        images.append(step.images())

    options = {"objective": deep_inversion_cnn(), "stopping": "dense", "iterations": 7, "lr": 1.0} | options
    Inverter(small_cnn(torch.float32), progress=False, **options).run([3, 1, 7, 7, 2, 0], seed, callback)
    return images


def test_records_are_the_accuracies_on_the_plain_images(seed):
    """The verifier has another mean and std than the inverted network. It was in training mode, and still is."""
    model = at_random(lambda: torchvisions.mobilenet_v2(num_classes=10), torch.float32).train()
    for module in model.modules():
        if hasattr(module, "running_mean"):
            module.running_mean.zero_()  # so that the classes differ from image to image
    verifier = Verifier(CNN(model, image_size=(32, 32)), every=3)
    images = run(verifier, seed)
    assert model.training
    assert [iteration for iteration, _ in verifier.records] == [3, 6, 7]
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    model.eval()
    for iteration, accuracy in verifier.records:
        with torch.no_grad():
            predicted = model((images[iteration - 1] - mean) / std).argmax(1)
        right = sum(int(p) == t for p, t in zip(predicted, (3, 1, 7, 7, 2, 0), strict=True))
        assert accuracy == pytest.approx(right / 6)


def test_accuracy_counts_the_targets_that_are_predicted(seed):
    for model in (small_cnn(torch.float32), small_cnn(torch.float64), cifar10_vit(False, depth=1)):
        images = torch.rand(8, 3, 32, 32)
        mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
        with torch.no_grad():
            predicted = model(((images - mean) / std).to(next(model.parameters()).dtype)).argmax(1)
        targets = predicted.clone()
        targets[:2] = (targets[:2] + 1) % 10
        verifier = Verifier(model)
        assert verifier.accuracy(images, targets) == pytest.approx(6 / 8)
        assert verifier.accuracy(images, torch.eye(10)[targets] * 0.9 + 0.01) == pytest.approx(6 / 8)


def test_images_that_were_released_earlier_have_the_same_targets(seed):
    model, images = small_cnn(torch.float32), torch.rand(6, 3, 32, 32)
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        predicted = model((images - mean) / std).argmax(1)
    verifier = Verifier(model)
    verifier.record(5, images, predicted[:2])
    right = (predicted == predicted[[0, 1, 0, 1, 0, 1]]).sum().item()
    assert verifier.records == [(5, pytest.approx(right / 6))]


@pytest.mark.parametrize(
    ("options", "every"),
    [({"published": True}, 3), ({"until": Until(1e-9, checks=1, every=2)}, 4)],
    ids=["published", "until"],
)
def test_the_last_record_is_that_of_the_result_once(seed, options, every):
    """A published run chooses its patches anew at its end; the other run ends where an accuracy is due anyway."""
    inverter = Inverter(
        cifar10_vit(), stopping={2: 0.9}, iterations=6, verifier=cifar10_vit(), verify_every=every, lr=1.0,
        progress=False, **options,
    )  # fmt: skip
    targets = torch.arange(10)
    result = inverter.run(targets, seed)
    ends = [3, 6] if "published" in options else [4]
    assert [iteration for iteration, _ in result.verified] == ends
    assert result.verified[-1][1] == Verifier(cifar10_vit()).accuracy(result.images, targets)


@pytest.mark.parametrize(
    "options",
    [{"iterations": 7}, {"published": True}, {"until": Until(1e-9, checks=2, every=2)}],
    ids=["plain", "published", "until"],
)
def test_a_run_that_goes_on_has_all_records_from_the_beginning(seed, options):
    """Also if the last iteration was over when it was saved, after which a published run chooses its patches anew."""
    options = {"stopping": {2: 0.9}, "iterations": 6, "verify_every": 3, "lr": 1.0, "progress": False} | options
    inverter, targets, states = Inverter(cifar10_vit(), verifier=cifar10_vit(), **options), torch.arange(10), []
    expected = inverter.run(targets, seed, lambda step: states.append(step.state_dict())).verified
    assert [iteration for iteration, _ in expected] == sorted({3, 6, len(states)})
    for state in states:
        assert inverter.run(targets, seed, state=state).verified == expected


def test_a_run_without_the_verifier_of_a_state_does_not_go_on_from_it(seed):
    states, options = [], {"stopping": "dense", "iterations": 2, "progress": False}
    model, verifier = cifar10_vit(False, depth=1), cifar10_vit(False, depth=1)
    Inverter(model, verifier=verifier, verify_every=2, **options).run(
        [3], seed, lambda step: states.append(step.state_dict())
    )
    with pytest.raises(ValueError, match="verify_every is 2, not None"):
        Inverter(model, **options).run([3], seed, state=states[0])
    with pytest.raises(ValueError, match="verify_every is 2, not 1"):
        Inverter(model, verifier=verifier, verify_every=1, **options).run([3], seed, state=states[0])


@pytest.mark.parametrize(("done", "records"), [(3, [2, 3]), (4, [2, 4])])
def test_the_last_record_of_an_interrupted_run_is_that_of_its_images(seed, done, records):
    def interrupt(step):
        if step.iteration + 1 == done:
            raise KeyboardInterrupt

    options = {"stopping": {2: 0.9}, "iterations": 6, "verify_every": 2, "lr": 1.0, "progress": False}
    result = Inverter(cifar10_vit(), verifier=cifar10_vit(), **options).run(torch.arange(10), seed, interrupt)
    assert result.interrupted
    assert [iteration for iteration, _ in result.verified] == records
    assert result.verified[-1][1] == Verifier(cifar10_vit()).accuracy(result.images, result.targets)


def test_records_survive_attention_that_is_not_finite(seed):
    model = cifar10_vit(False, depth=1)

    def spoil(step):
        if step.iteration == 2:
            model.blocks[-1].attn.qkv.weight.data.fill_(float("nan"))

    options = {"stopping": {4: 0.3}, "iterations": 6, "verify_every": 2, "progress": False}
    with pytest.raises(NonFiniteError) as caught:
        Inverter(model, verifier=cifar10_vit(False, depth=1), **options).run([3, 1], seed, spoil)
    assert [iteration for iteration, _ in caught.value.result.verified] == [2, 4]


def test_an_unfit_verifier_is_refused_with_the_value(seed):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Verifier(small_cnn(), every=0)
    with pytest.raises(ValueError, match="target 7 is no class of the verifier's 5"):
        run(Verifier(small_cnn(torch.float32, num_classes=5), every=1), seed)
    with pytest.raises(ValueError, match="32x32 pixels"):
        run(Verifier(cifar10_vit(False, img_size=64, depth=1), every=1), seed)


@pytest.mark.parametrize(
    ("verifier", "message"),
    [
        (
            lambda: small_cnn(torch.float32, num_classes=5),
            "the verifier's num_classes is 5, the inverted model's is 10",
        ),
        (lambda: small_cnn(torch.float32).to("meta"), "the verifier's device is meta"),
        (lambda: cifar10_vit(False, img_size=64, depth=1), "32x32 pixels"),
    ],
)
def test_an_inverter_refuses_an_unfit_verifier_before_it_runs(verifier, message, seed):
    with pytest.raises(ValueError, match=message):
        Inverter(cifar10_vit(False, depth=1), verifier=verifier(), progress=False)
