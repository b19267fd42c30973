"""distill(): the student moves as it would without caches, on the kept patches alone; nothing else moves."""

import copy
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader, TensorDataset

import smi_fast
from smi_fast.data.sparse import InvertedDataset, RandomHorizontalFlip
from smi_fast.distillation.rounds import Pool, Reader, distill, transfer_loss
from smi_fast.models import CIFAR10_CLASSES, MODEL_DIR, cifar10_student, cifar10_vit

ROOT = Path(__file__).parents[2]
SIZE, PATCH, GRID, CLASSES = 16, 4, 4, 5
QUIET = {"progress": False}


def tiny(kind=VisionTransformer, mean=0.5, std=0.5, **overrides) -> torch.nn.Module:
    """A ViT of random weights with pronounced opinions, float32, whose normalisation is given."""
    arguments = (
        dict(img_size=SIZE, patch_size=PATCH, embed_dim=24, depth=2, num_heads=3, num_classes=CLASSES) | overrides
    )
    model = kind(**arguments)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim < 2 else 1 / parameter.shape[-1] ** 0.5)
    model.pretrained_cfg = {"input_size": (3, SIZE, SIZE), "mean": (mean,) * 3, "std": (std,) * 3}
    return model.eval()


def make_dataset(n=12, count=6, ragged=False, **kwargs) -> InvertedDataset:
    counts = torch.randint(1, GRID**2 + 1, (n,)).tolist() if ragged else [count] * n
    keep = [torch.randperm(GRID**2)[:c] for c in counts]
    return InvertedDataset.from_images(
        torch.rand(n, 3, SIZE, SIZE), keep, torch.arange(n) % CLASSES, (PATCH, PATCH), **kwargs
    )


def timm_logits(model, images, keep) -> torch.Tensor:
    """Logits of one image from its kept patches (K,), by timm's own modules; pixels in [0, 1]."""
    mean, std = model.pretrained_cfg["mean"][0], model.pretrained_cfg["std"][0]
    x = model._pos_embed(model.patch_embed((images - mean) / std))
    prefix = model.num_prefix_tokens
    x = torch.cat((x[:, :prefix], x[:, prefix:][:, keep.long()]), 1)
    return model.forward_head(model.norm(model.blocks(model.norm_pre(x))))


def reference(teacher, student, dataset, steps, linear_probing, temperature=20.0, lr=0.1, momentum=0.9, decay=1e-4):
    """Whole-batch transfer, everything computed anew in each step: timm's forward, Eq. 6 and SGD written out."""
    parameters = list((student.head if linear_probing else student).parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    images, keeps = dataset.images(), [dataset[i][1] for i in range(len(dataset))]
    for _ in range(steps):
        loss = 0
        for image, keep in zip(images.split(1), keeps, strict=True):
            with torch.no_grad():
                p = (timm_logits(teacher, image, keep) / temperature).softmax(1)
            q = (timm_logits(student, image, keep) / temperature).softmax(1)
            loss = loss + temperature**2 * (p * (p.log() - q.log())).sum() / len(images)
        for parameter, v, grad in zip(parameters, velocity, torch.autograd.grad(loss, parameters), strict=True):
            v.mul_(momentum).add_(grad + decay * parameter.detach())
            parameter.data -= lr * v


def test_the_loss_is_that_of_equation_6(seed):
    s, t = np.random.default_rng(seed).normal(size=(2, 7, 5)) * 4
    p, q = (np.exp(x / 20) / np.exp(x / 20).sum(1, keepdims=True) for x in (t, s))
    expected = 400 * (p * np.log(p / q)).sum(1).mean()
    student = torch.from_numpy(s).requires_grad_()
    loss = transfer_loss(student, torch.from_numpy(t), 20)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    (grad,) = torch.autograd.grad(loss, student)
    np.testing.assert_allclose(grad.numpy(), 20 * (q - p) / 7, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("linear_probing", [True, False])
def test_training_equals_a_plain_loop_without_caches(seed, linear_probing, ragged):
    """Teacher and student differ in normalisation, width and depth. All images in each step: order means nothing."""
    teacher, student = tiny(), tiny(mean=0.4, std=0.3, embed_dim=48, depth=1)
    expected, dataset = copy.deepcopy(student), make_dataset(ragged=ragged)
    distill(
        teacher,
        student,
        dataset=dataset,
        rounds=2,
        steps=2,
        flip=False,
        linear_probing=linear_probing,
        lr=0.05,
        **QUIET,
    )
    reference(teacher, expected, dataset, 4, linear_probing, lr=0.05)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=1e-3, atol=2e-5, msg=name)


def test_linear_probing_moves_the_head_and_no_other_bit(seed):
    teacher, student = tiny(), tiny()
    before = copy.deepcopy((teacher.state_dict(), student.state_dict()))
    student.train()
    student.blocks[0].eval()
    student.cls_token.requires_grad_(False)
    modes = [m.training for model in (teacher, student) for m in model.modules()]
    asks = [p.requires_grad for model in (teacher, student) for p in model.parameters()]
    distill(teacher, student, dataset=make_dataset(), rounds=1, steps=3, **QUIET)
    assert [m.training for model in (teacher, student) for m in model.modules()] == modes
    assert [p.requires_grad for model in (teacher, student) for p in model.parameters()] == asks
    assert all(p.grad is None for model in (teacher, student) for p in model.parameters())
    for model, state in zip((teacher, student), before, strict=True):
        for name, value in model.state_dict().items():
            moves = model is student and name.startswith("head.")
            assert torch.equal(value, state[name]) != moves, name


def test_both_views_of_an_image_are_read_as_timm_reads_whole_images(seed):
    """Logits and features of the pool, plain and mirrored, against mirrored pixels at mirrored positions."""
    teacher, student, dataset = tiny(), tiny(mean=0.3), make_dataset(ragged=True)
    mirror = RandomHorizontalFlip(dataset.image_size, dataset.patch_size, p=1)
    pool = Pool(Reader(teacher, (SIZE, SIZE)), Reader(student, (SIZE, SIZE)), mirror, True, batch_size=5)
    pool.add(dataset)
    cells = torch.arange(GRID**2).view(GRID, GRID)
    for number in range(len(dataset)):
        plain, kept = dataset.images([number]), dataset[number][1].long()
        for view, (image, keep) in enumerate([(plain, kept), (plain.flip(-1), cells.flip(1).flatten()[kept])]):
            with torch.no_grad():
                expected = timm_logits(teacher, image, keep), timm_logits(student, image, keep)
            found = pool.logits[view, [number]], pool.student_logits(torch.tensor([number]), torch.tensor([view]))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_passes_over_the_pool_are_shuffled_and_complete(seed):
    model = tiny()
    pool = Pool(Reader(model, (SIZE, SIZE)), Reader(model, (SIZE, SIZE)), lambda sample: sample, True, batch_size=5)
    pool.add(make_dataset(n=12))
    draws = list(pool.draw(7, torch.Generator().manual_seed(seed)))
    assert [len(index) for index, _ in draws] == [5] * 7
    index, view = (torch.cat(parts) for parts in zip(*draws, strict=True))
    assert sorted(index[:12].tolist()) == sorted(index[12:24].tolist()) == list(range(12))
    assert index[:12].tolist() != index[12:24].tolist()
    assert set(view.tolist()) == {0, 1}


def test_a_distilled_student_is_probed_at_both_its_heads(seed):
    student, dataset = tiny(VisionTransformerDistilled), make_dataset()
    reader, tokens = Reader(student, (SIZE, SIZE)), InvertedDataset.collate([dataset[i] for i in range(12)])[0]
    reader.fast.eval()
    found = reader.logits(reader.features(lambda: reader(tokens)))
    images = list(zip(dataset.images().split(1), [dataset[i][1] for i in range(12)], strict=True))
    torch.testing.assert_close(
        found, torch.cat([timm_logits(student, *image) for image in images]), rtol=1e-4, atol=1e-4
    )
    before = copy.deepcopy(student.state_dict())
    distill(tiny(), student, dataset=dataset, rounds=1, steps=2, **QUIET)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


def test_a_student_with_the_teachers_trunk_learns_the_teachers_answers(seed):
    teacher = tiny()
    student = copy.deepcopy(teacher)
    torch.nn.init.zeros_(student.head.weight)
    torch.nn.init.zeros_(student.head.bias)
    dataset = make_dataset(n=64)
    result = distill(teacher, student, dataset=dataset, rounds=4, steps=250, **QUIET)
    losses = [round.loss for round in result.history]
    assert losses == sorted(losses, reverse=True)
    images = [(dataset.images([i]), dataset[i][1]) for i in range(64)]
    with torch.no_grad():
        taught, learnt = (torch.cat([timm_logits(m, *image) for image in images]) for m in (teacher, student))
    taught, learnt = (logits - logits.mean(1, keepdim=True) for logits in (taught, learnt))
    assert (taught - learnt).square().sum() < 0.1 * taught.square().sum()  # 1 before the transfer, 0.013 at worst after


def inverter_of(teacher, seed=0, **overrides):
    arguments = dict(iterations=4, stopping=smi_fast.StoppingSchedule({2: 0.5}), seed=seed, progress=False) | overrides
    return smi_fast.Inverter(teacher, **arguments)


def test_inversion_and_transfer_alternate_over_a_growing_pool(seed):
    teacher, student, told = tiny(), tiny(), []
    inverter = inverter_of(teacher)
    labels = torch.randint(CLASSES, (40,))
    data = [(images, labels[:20]) for images in torch.randn(1, 20, 3, SIZE, SIZE)]
    result = distill(
        teacher, student, inverter=inverter, rounds=3, samples=7, steps=5, evaluate=data,
        callback=lambda *args: told.append(args), **QUIET,
    )  # fmt: skip
    assert [(r.number, r.samples, r.iterations, r.steps) for r in result.history] == [
        (1, 7, 4, 5),
        (2, 14, 8, 10),
        (3, 21, 12, 15),
    ]
    assert told == list(zip(result.history, result.batches, strict=True))
    assert torch.cat([batch.targets for batch in result.batches]).tolist() == [i % CLASSES for i in range(21)]
    first, second, third = (batch.images() for batch in result.batches)
    assert not any(torch.equal(a, b) for a, b in ((first, second), (second, third)))
    assert all(len(batch[0][1]) == 8 for batch in result.batches)  # half of 16 patches
    assert inverter.seed == 0
    assert all(r.inversion_seconds > 0 and r.transfer_seconds > 0 for r in result.history)


def test_accuracy_is_the_students_after_each_round(seed):
    """As timm counts it, for a loader with cached features, a loader without, and a function."""
    teacher, start, dataset = tiny(), tiny(), make_dataset(n=20)
    images, labels = torch.randn(40, 3, SIZE, SIZE), torch.randint(CLASSES, (40,))
    loader = DataLoader(TensorDataset(images, labels), batch_size=16)

    def by_timm(student):
        assert not student.training
        return (student(images).argmax(1) == labels).float().mean().item()

    for linear_probing in (True, False):
        students = copy.deepcopy(start), copy.deepcopy(start)
        a, b = (
            distill(
                teacher, student, dataset=dataset, rounds=3, samples=5, steps=5, linear_probing=linear_probing,
                evaluate=evaluate, lr=0.05, **QUIET,
            )
            for student, evaluate in zip(students, (loader, by_timm), strict=True)
        )  # fmt: skip
        assert [r.samples for r in a.history] == [5, 10, 15]
        assert [r.accuracy for r in a.history] == pytest.approx([r.accuracy for r in b.history])
        assert b.history[-1].accuracy == by_timm(students[1])
        reached = a.history[1].accuracy
        assert a.reaching(reached) == next(r for r in a.history if r.accuracy >= reached)
        assert a.reaching(1.1) is None


def test_a_stored_dataset_enters_the_pool_without_replacement(seed):
    dataset = make_dataset(n=10)
    result = distill(tiny(), tiny(), dataset=dataset, rounds=4, samples=4, steps=1, **QUIET)
    assert [r.samples for r in result.history] == [4, 8, 10, 10]
    assert [r.iterations for r in result.history] == [0] * 4
    drawn = [sample[0] for batch in result.batches for sample in batch]
    assert sorted(patches.sum().item() for patches in drawn) == sorted(sample[0].sum().item() for sample in dataset)


@pytest.mark.parametrize("linear_probing", [True, False])
def test_the_same_seed_gives_the_same_bits_and_leaves_torchs_own_draws_alone(seed, linear_probing):
    teacher, start = tiny(), tiny(proj_drop_rate=0.1)
    heads = []
    for of in (0, 0, 1):
        student = copy.deepcopy(start)
        state = torch.get_rng_state()
        distill(
            teacher, student, inverter=inverter_of(teacher), rounds=2, samples=6, steps=3, batch_size=4, seed=of,
            linear_probing=linear_probing, **QUIET,
        )  # fmt: skip
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(1)  # so that the next run starts from another state
        heads.append(student.head.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("linear_probing", [True, False])
@pytest.mark.parametrize("where", ["inverting", "evaluating"])
def test_an_interrupt_leaves_the_rounds_that_were_finished(seed, linear_probing, where, monkeypatch):
    teacher, student, states = tiny(), tiny(), []
    inversions = 0

    def evaluate(_):
        if where == "evaluating" and len(states) == 2:
            raise KeyboardInterrupt
        states.append(copy.deepcopy(student.state_dict()))
        return 0.0

    def draw(self, *args, draw=smi_fast.Inverter._draw_views):
        nonlocal inversions
        inversions += 1
        if where == "inverting" and inversions == 3:
            monkeypatch.setattr(self, "_iterate", interrupted)
        return draw(self, *args)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(smi_fast.Inverter, "_draw_views", draw)
    inverter = inverter_of(teacher, cuda_graphs=False)
    result = distill(
        teacher, student, inverter=inverter, rounds=5, samples=4, steps=3, evaluate=evaluate,
        linear_probing=linear_probing, **QUIET,
    )  # fmt: skip
    assert result.interrupted
    assert len(result.history) == len(result.batches) == len(states) == 2
    assert all(torch.equal(value, states[-1][name]) for name, value in student.state_dict().items())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_an_error_in_a_callback_leaves_modes_and_gradients_as_they_were(seed):
    teacher, student = tiny(), tiny().train()
    with pytest.raises(ZeroDivisionError):
        distill(teacher, student, dataset=make_dataset(), steps=1, callback=lambda *_: 1 / 0, **QUIET)
    assert all(module.training for module in student.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in student.parameters())


def test_models_that_do_not_fit_are_refused_by_name(seed):
    teacher, dataset = tiny(), make_dataset()

    def refused(match, student=None, teacher=teacher, error=ValueError, **arguments):
        arguments = {"dataset": dataset, **QUIET} | arguments
        with pytest.raises(error, match=match):
            distill(teacher, student or tiny(), **arguments)

    refused("the teacher has classes 5, the student 7", tiny(num_classes=7))
    refused("the teacher has patches of 4x4, the student 8x8", tiny(patch_size=8))
    refused("images have 16x16 pixels, the model takes 32x32", tiny(img_size=32))
    refused("the same model", teacher)
    refused("the same model", smi_fast.accelerate(teacher))
    refused("no classes", tiny(num_classes=0), tiny(num_classes=0))
    refused("either an inverter or a dataset", dataset=None)
    refused("either an inverter or a dataset", inverter=inverter_of(teacher))
    refused("another model than the teacher", dataset=None, inverter=inverter_of(tiny()))
    refused("mean", dataset=make_dataset(metadata={"mean": [0.4] * 3, "std": [0.5] * 3}))
    refused("std", dataset=make_dataset(metadata={"mean": [0.5] * 3, "std": [0.6] * 3}))
    coarse = InvertedDataset.from_images(torch.rand(1, 3, SIZE, SIZE), torch.tensor([[0]]), torch.tensor([0]), (8, 8))
    refused("the dataset has patches of 8x8, the teacher 4x4", dataset=coarse)
    grey = InvertedDataset.from_images(torch.rand(1, 1, SIZE, SIZE), torch.tensor([[0]]), torch.tensor([0]), (4, 4))
    refused("the dataset has channels 1, the teacher 3", dataset=grey)
    for name in ("rounds", "samples", "steps", "batch_size"):
        refused(f"{name} must be at least 1, got 0", **{name: 0})
        refused(f"{name} must be an integer, got 2.0", error=TypeError, **{name: 2.0})
    for name, value in (("temperature", 0), ("lr", -1), ("momentum", 1), ("weight_decay", -0.1)):
        refused(f"{name}.*{value}", **{name: value})


def test_a_dataset_of_the_teachers_normalisation_is_welcome(seed):
    dataset = make_dataset(metadata={"mean": [0.5] * 3, "std": [0.5] * 3})
    assert distill(tiny(), tiny(mean=0.1), dataset=dataset, rounds=1, steps=1, **QUIET).history


def test_a_loss_that_is_not_finite_is_told(seed):
    with pytest.warns(UserWarning, match=r"the loss is (nan|inf) in round 1; lr 1e\+30 is too high"):
        distill(tiny(), tiny(), dataset=make_dataset(), rounds=1, steps=9, lr=1e30, **QUIET)


def test_the_student_inside_knows_no_class_and_is_not_the_teacher():
    """Its head is zero, and its card holds the figures of the run."""
    student, teacher = cifar10_student(), cifar10_vit()
    assert not student.training
    assert not any(parameter.any() for parameter in student.head.parameters())
    assert student.pretrained_cfg["mean"] == teacher.pretrained_cfg["mean"]
    for name, value in student.state_dict().items():
        assert value.isfinite().all()
        assert value.shape == teacher.state_dict()[name].shape
        assert not torch.equal(value, teacher.state_dict()[name]), name
    figures = json.loads((MODEL_DIR / "cifar10_student.json").read_text())
    assert (
        f"**{figures['test_accuracy_of_a_linear_probe']:.2%}".replace("%", " %**")
        in (MODEL_DIR / "README.md").read_text()
    )


def test_the_students_recipe_gives_the_same_bits_when_it_was_stopped_and_ignores_labels(seed, tmp_path, monkeypatch):
    """Three runs on random images: one as it is, one that goes on after an interruption, one with classes permuted."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    recipe = importlib.import_module("pretrain_student")
    images = np.random.default_rng(seed).integers(0, 256, (70, 32, 32, 3), dtype=np.uint8)
    for number, name in enumerate(name for name in CIFAR10_CLASSES for _ in range(7)):
        for split in ("train", "test") if number % 7 == 0 else ("train",):
            (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[number]).save(tmp_path / split / name / f"{number}.png")
    options = ["--words=8", "--components=4", "--epochs=2", "--batch-size=35", "--device=cpu"]

    def run(name):
        monkeypatch.setattr(sys, "argv", ["recipe", "--data", str(tmp_path), "--out", str(tmp_path / name), *options])
        recipe.main()

    def weights(name):
        return torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"]

    run("whole")
    crop_flip, calls = recipe.crop_flip, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return crop_flip(*args)

    with monkeypatch.context() as patched:
        patched.setattr(recipe, "crop_flip", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    assert any(not torch.equal(value, weights("whole")[name]) for name, value in weights("stopped").items())
    run("stopped")
    read_split = recipe.read_split
    monkeypatch.setattr(recipe, "read_split", lambda folder: (read_split(folder)[0], read_split(folder)[1].flip(0)))
    run("other labels")
    for name, value in weights("whole").items():
        assert torch.equal(value, weights("stopped")[name])
        assert torch.equal(value, weights("other labels")[name])
