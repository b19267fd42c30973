"""The loop, against a slow dense oracle that shares nothing with it but the random draws."""

import itertools
import math
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inversion_cases import grid_mask, small_model, total_variation_by_pairs
from torch import nn

import smi_fast
from smi_fast import Inverter, Mass, StoppingSchedule, deep_inversion
from smi_fast.inversion.schedule import RebirthSchedule
from smi_fast.inversion.views import apply_view, random_views

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@pytest.fixture
def model(seed) -> nn.Module:
    return small_model()


def quiet(model, **options) -> Inverter:
    return Inverter(model, progress=False, **options)


def most_important(importance: torch.Tensor, count: int) -> torch.Tensor:
    rows = [sorted(range(len(row)), key=lambda i, row=row: -row[i].item())[:count] for row in importance]
    return torch.tensor([sorted(row) for row in rows])


def outputs_of_cells(model, images: torch.Tensor, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and importance of the patches in some cells, by timm's modules."""
    tokens = model._pos_embed(model.patch_embed(images))
    kept = tokens[:, 1:].gather(1, cells[..., None].expand(-1, -1, tokens.shape[-1]))
    x = model.blocks[0](torch.cat((tokens[:, :1], kept), dim=1))
    attn = model.blocks[1].attn
    q, k, _ = attn.qkv(model.blocks[1].norm1(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    importance = (q @ k.transpose(-2, -1) * attn.scale).softmax(-1).mean(1)[:, 0, 1:]
    return model.forward_head(model.norm(model.blocks[1](x))), importance


def oracle(model, targets, stops: dict, iterations: int, lr: float, tv_l2: float, l2: float, views, noise, published):
    """Sparse model inversion written out: whole images, torch.roll, timm's modules, masks, and Adam by its formula, in
    float64. Stopped pixels stay as they are or, as in the published code, go on moving."""
    model = model.double()
    images = noise.double()
    moment, square = torch.zeros_like(images), torch.zeros_like(images)
    every = torch.arange(16).expand(len(targets), 16)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    losses, importance, keep = [], None, every
    for iteration in range(iterations):
        if iteration in stops:
            count = int(keep.shape[1] * (1 - stops[iteration]))
            keep = keep.gather(1, most_important(importance, count))
        plain = iteration in stops or iteration + 1 in stops
        dy, dx, flip = (0, 0, 0) if plain else views[iteration].tolist()
        mask = grid_mask(every if published else keep)
        leaf = images.clone().requires_grad_()
        seen = torch.roll(leaf, (dy, dx), (2, 3))
        seen = torch.flip(seen, (3,)) if flip else seen
        # where each kept patch's centre went, in whole cells
        row = (keep // 4 + (2 * dy + 2) // 4) % 4
        column = (keep % 4 + (2 * dx + 2) // 4) % 4
        logits, importance = outputs_of_cells(model, seen, row * 4 + (3 - column if flip else column))
        loss = F.cross_entropy(logits, targets) + tv_l2 * total_variation_by_pairs(leaf, mask)
        loss = loss + l2 * (leaf * mask).norm()
        losses.append(loss.item())
        grad = torch.autograd.grad(loss, leaf)[0] * mask
        moment, square = 0.5 * moment + 0.5 * grad, 0.99 * square + 0.01 * grad**2
        step = moment / (1 - 0.5 ** (iteration + 1)) / ((square / (1 - 0.99 ** (iteration + 1))).sqrt() + 1e-8)
        moved = torch.minimum(torch.maximum(images - lr * step, -mean / std), (1 - mean) / std)
        images = torch.where(mask, moved, images)
    images = images * std + mean
    if published and stops:
        count = int(17 * math.prod(1 - fraction for fraction in stops.values()))
        keep = most_important(outputs_of_cells(model, images, every)[1], count)
    return images, keep, torch.tensor(losses)


@pytest.mark.parametrize(
    ("stops", "published"),
    [({}, False), ({2: 0.3, 5: 0.3, 6: 0.3}, False), ({2: 0.3, 5: 0.3}, True), ({}, True)],
    ids=["dense", "sparse", "published", "published dense"],
)
def test_the_loop_equals_the_dense_oracle(model, seed, stops, published):
    targets, iterations = torch.tensor([4, 0, 2]), 10
    options = dict(objective=deep_inversion(1e-2, 1e-3), iterations=iterations, lr=0.05, jitter=1 / 2)
    result = quiet(model, stopping=StoppingSchedule(stops), published=published, **options).run(targets, seed)
    generator = torch.Generator().manual_seed(seed)
    views = random_views(iterations, (8, 8), jitter=1 / 2, flip=0.5, generator=generator)
    noise = torch.randn(3, 3, 8, 8, generator=generator)
    images, keep, losses = oracle(model, targets, stops, iterations, 0.05, 1e-2, 1e-3, views, noise, published)
    assert torch.equal(result.keep, keep)
    torch.testing.assert_close(result.losses.double(), losses.double(), rtol=1e-4, atol=1e-4)
    expected = images * grid_mask(keep)
    # Adam divides by the gradient's own size: where that is all but zero, rounding decides the step
    assert ((result.images - expected).abs() > 1e-3).float().mean() < 0.01
    assert [(s.start, s.patches) for s in result.history] == [(0, 16), *zip(stops, (11, 7, 4))]  # noqa: B905


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stops=st.dictionaries(st.integers(1, 7), st.sampled_from([0.2, 0.3, 0.5]), max_size=4),
    draw=st.integers(0, 2**31),
    per_image=st.booleans(),
)
def test_stopped_pixels_never_change_again_bit_for_bit(model, stops, draw, per_image):
    schedule, seen = StoppingSchedule(sorted(stops.items())), []
    inverter = quiet(model, stopping=schedule, iterations=9, jitter=1 / 2, view_per_image=per_image)
    inverter.run([0, 1, 2, 3], draw, lambda step: seen.append((step.keep, step.state_dict()["images"])))
    for (_, before), (keep, after) in itertools.pairwise(seen):
        stopped = ~grid_mask(keep).expand_as(before)
        assert torch.equal(before[stopped], after[stopped])
        assert not torch.equal(before[~stopped], after[~stopped])
    counts = schedule.patches(16)
    assert [keep.shape[1] for keep, _ in seen] == [
        min([16, *(count for stop, count in counts.items() if stop <= iteration)]) for iteration in range(9)
    ]


def test_mass_keeps_the_fewest_patches_that_hold_it(model, seed):
    """Image by image, against the importance of the whole model's last block; afterwards a fraction of what is left."""
    seen = {}

    def note(step):
        seen[step.iteration] = step.keep, step.state_dict()["images"]

    with torch.no_grad():
        model.blocks[-1].attn.qkv.weight.mul_(4)  # so that images differ in how many patches hold their attention
    schedule = StoppingSchedule({3: Mass(0.8), 5: 0.4})
    inverter = quiet(model, stopping=schedule, iterations=8)
    result = inverter.run([0, 1, 2, 3, 4] * 2, seed, note)
    _, images = seen[1]  # what iteration 2, which measures, has seen
    _, importance = inverter.backbone(images, return_attention=True)
    keep = seen[3][0]
    assert len({len(row) for row in keep}) > 1
    for row, weights in zip(keep, importance, strict=True):
        ordered = weights.sort(descending=True)
        count = int((ordered.values.cumsum(0) < 0.8 * weights.sum()).sum()) + 1
        assert row.tolist() == ordered.indices[:count].sort().values.tolist()
    for before, after in zip(keep, result.keep, strict=True):
        assert len(after) == max(1, int(len(before) * 0.6))
        assert set(after.tolist()) <= set(before.tolist())
    assert [stage.patches for stage in result.history] == [
        16, sum(map(len, keep)) / 10, sum(map(len, result.keep)) / 10,
    ]  # fmt: skip
    for iteration in range(4, 8):
        rows, after = seen[iteration]
        mask = grid_mask(rows).expand(-1, 3, -1, -1)
        before = seen[iteration - 1][1]
        assert torch.equal(before[~mask], after[~mask])
        assert not torch.equal(before[mask], after[mask])
        if iteration == 7:
            assert (result.images[~mask] == 0).all()


def test_results_are_in_range_and_black_where_stopped(model):
    result = quiet(model, stopping=StoppingSchedule({1: 0.5}), iterations=3).run([0, 1])
    mask = grid_mask(result.keep).expand_as(result.images)
    assert (result.images[~mask] == 0).all()
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    assert result.images[mask].std() > 0.1


def test_the_same_seed_gives_the_same_bits(model):
    runs = [quiet(model, stopping=StoppingSchedule({2: 0.3}), iterations=5).run([1, 2], s) for s in (7, 7, 8)]
    assert torch.equal(runs[0].images, runs[1].images)
    assert torch.equal(runs[0].losses, runs[1].losses)
    assert not torch.equal(runs[0].losses, runs[2].losses)


def test_each_image_may_be_seen_through_a_view_of_its_own(model, seed):
    inverter = quiet(model, stopping="dense", iterations=3, view_per_image=True, objective=deep_inversion(0.0), lr=0.05)
    result = inverter.run([0, 1, 2], seed)
    generator = torch.Generator().manual_seed(seed)
    views = random_views(3 * 3, (8, 8), generator=generator).view(3, 3, 3)
    noise = torch.randn(3, 3, 8, 8, generator=generator)
    seen = torch.cat([apply_view(noise[i : i + 1], views[0, i].tolist()) for i in range(3)])
    expected = F.cross_entropy(model(seen), torch.tensor([0, 1, 2]))
    torch.testing.assert_close(result.losses[0], expected.detach(), rtol=1e-4, atol=1e-4)
    assert not torch.equal(views[:, 0], views[:, 1])


def test_a_users_loss_is_minimised_on_kept_pixels_alone(model):
    def brightness(logits, images, targets):
        return images.mean() + 0 * logits.sum()

    result = quiet(model, stopping=StoppingSchedule({2: 0.5}), objective=brightness, iterations=60).run([0, 1])
    assert result.images.max() == 0  # every kept pixel went to its lower limit, the others are black
    assert (result.losses[1:3] < result.losses[0]).all()


def test_weights_and_modes_are_as_before_also_after_an_error(model):
    model.train()
    model.blocks[0].eval()
    model.head.bias.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    inverter = quiet(model, stopping=StoppingSchedule.dense(), iterations=3)

    def check(step):
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(m.training for m in inverter.backbone.modules())

    inverter.run([0], callback=check)
    assert ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]) == before

    def fail(step):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        inverter.run([0], callback=fail)
    assert ([p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]) == before
    assert all(p.grad is None for p in model.parameters())


def test_ctrl_c_ends_the_run_with_what_there_is(model):
    def interrupt(step):
        if step.iteration == 3:
            os.kill(os.getpid(), signal.SIGINT)

    result = quiet(model, stopping=StoppingSchedule({2: 0.5, 6: 0.5}), iterations=9).run([0, 1], callback=interrupt)
    assert result.interrupted
    assert 4 <= len(result.losses) < 9
    assert result.keep.shape == (2, 8)
    assert result.history[-1] == smi_fast.Stage(2, len(result.losses), 8, 9)


def test_a_published_run_that_ends_early_has_the_loops_patches(model):
    seen = []

    def interrupt(step):
        seen.append(step.keep)
        if step.iteration == 3:
            raise KeyboardInterrupt

    inverter = quiet(model, stopping={2: 0.5, 6: 0.5}, iterations=9, published=True)
    result = inverter.run([0, 1], callback=interrupt)
    assert torch.equal(result.keep, seen[3])
    assert (result.images[~grid_mask(seen[3]).expand_as(result.images)] == 0).all()


def test_steps_tell_iteration_tokens_loss_and_rising_seconds(model):
    steps, seconds = [], []
    inverter = quiet(model, stopping=StoppingSchedule({2: 0.5}), iterations=4)
    result = inverter.run([0], callback=lambda step: (steps.append(step), seconds.append(step.seconds())))
    assert [step.iteration for step in steps] == [0, 1, 2, 3]
    assert [step.tokens for step in steps] == [17, 17, 9, 9]
    assert torch.equal(torch.stack([step.loss for step in steps]), result.losses)
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"iterations": 0}, ValueError, "at least 1, got 0"),
        ({"iterations": 2.5}, TypeError, r"2\.5"),
        ({"lr": 0.0}, ValueError, "lr"),
        ({"lr": float("inf")}, ValueError, "inf"),
        ({"stopping": 5}, TypeError, "5"),
        ({"stopping": "50:0.3,"}, ValueError, "50:0.3,"),
        ({"jitter": -0.1}, ValueError, r"-0\.1"),
        ({"jitter": 9}, ValueError, "0 to 8 pixels, got 9"),
        ({"pooling": {0: 2}}, ValueError, "cannot be pooled by 2: the model takes patches of one size"),
        ({"pooling": {0: 3}}, ValueError, "8x8 pixels cannot be pooled by 3, which does not divide them"),
        ({"pooling": {5000: 1}}, ValueError, "iteration 5000"),
        ({"pooling": [(0, 1)]}, TypeError, "got .*0, 1"),
        ({"pooling": {"a": 1, 0: 1}}, ValueError, "iteration 'a'"),
        ({"lr_schedule": "cosine"}, TypeError, "lr_schedule must be a function, got 'cosine'"),
        ({"views": 5}, TypeError, "views must be a function, got 5"),
        ({"verify_every": 0}, ValueError, "verify_every must be at least 1, got 0"),
        ({"flip": 1.5}, ValueError, r"1\.5"),
        ({"image_size": (9, 8)}, ValueError, "9x8"),
        ({"mean": (0.5,)}, ValueError, "1 values"),
        ({"std": (1.0, 0.0, 1.0)}, ValueError, "positive"),
        ({"stopping": StoppingSchedule({5: 0.3}), "iterations": 5}, ValueError, "iteration 5, .* only 5 iterations"),
        ({"stopping": StoppingSchedule({1: 0.9, 2: 0.9})}, ValueError, "leaves no patch"),
        ({"published": True, "stopping": {3: Mass(0.8)}}, ValueError, "got mass=0.8 at iteration 3"),
        ({"published": True, "stopping": {3: 0.3, 4: 0.3}}, ValueError, "at both iterations 3 and 4"),
        ({"published": True, "stopping": RebirthSchedule(2)}, ValueError, "got release=2 at iteration"),
        ({"published": True, "select": "random"}, ValueError, "got select='random'"),
        ({"objective": "loss"}, TypeError, "loss"),
        ({"objective": deep_inversion}, TypeError, "an objective is .* got <class .*deep_inversion'>"),
    ],
)
def test_wrong_arguments_are_refused_with_their_value(model, options, error, message):
    with pytest.raises(error, match=message):
        Inverter(model, **options)


def test_an_accelerated_model_is_taken_as_it_is(model):
    fast = smi_fast.accelerate(model, dtype=torch.bfloat16)
    assert quiet(fast).backbone is fast
    with pytest.raises(ValueError, match="accelerated already"):
        quiet(fast, dtype=torch.float32)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([0, 5], r"target 5 \(number 1\)"),
        ([-1], "target -1"),
        ([], r"\(0,\)"),
        ([[1]], r"\(1, 1\)"),
        ([0.5], "float"),
        ([[0.5, 0.5]], r"\(1, 2\), expected \(B, 5\)"),
        ([[0.2] * 5, [0.5, 0.5, 0.5, 0, 0]], "soft label 1 is no distribution: .* sum 1.5"),
        ([[1.5, -0.5, 0, 0, 0]], "soft label 0 is no distribution: its least element is -0.5"),
        ([[float("nan")] * 5], "soft label 0 is no distribution"),
    ],
)
def test_targets_that_are_no_classes_are_refused(model, targets, message):
    with pytest.raises(ValueError, match=message):
        quiet(model, stopping=StoppingSchedule.dense(), iterations=1).run(targets)


def test_weights_that_are_not_finite_are_refused_by_name(model):
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"weight blocks.1.mlp.fc1.weight holds 1 value"):
        quiet(model, stopping=StoppingSchedule.dense(), iterations=1).run([0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_loss_that_reads_nothing_of_the_model_is_refused(model, dtype):
    other = torch.ones((), requires_grad=True)
    inverter = quiet(
        model, stopping="dense", iterations=2, dtype=dtype, objective=lambda logits, images, targets: other * 2
    )
    with pytest.raises(ValueError, match="neither the model's outputs nor the images"):
        inverter.run([0])


def test_a_loss_that_is_not_finite_is_reported(model):
    def loss(logits, images, targets):
        return images.sum() * float("nan")

    inverter = quiet(model, stopping=StoppingSchedule.dense(), iterations=3, objective=loss)
    with pytest.warns(UserWarning, match="nan from iteration 0"):
        inverter.run([0])


def test_infinite_attention_ends_the_run_and_keeps_the_images(model):
    calls = itertools.count()

    def loss(logits, images, targets):
        return logits.float().mean() * (float("nan") if next(calls) == 5 else 1)

    seen = []
    inverter = quiet(model, stopping={3: 0.3, 8: 0.3}, iterations=12, objective=loss)
    with pytest.raises(smi_fast.NonFiniteError, match=r"at iteration 8 .* nan from iteration 5") as caught:
        inverter.run([0, 1], callback=lambda step: seen.append(step.images()))
    result = caught.value.result
    assert caught.value.iteration == 8
    assert (len(result.losses), result.keep.shape, [stage.end for stage in result.history]) == (8, (2, 11), [3, 8])
    mask = grid_mask(result.keep)
    assert torch.equal(result.images, (seen[2] * mask))  # pixels are NaN from iteration 5 on
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("weight", [1e-5, 1.0, 1e7], ids="loss times {:g}".format)
@pytest.mark.parametrize("reads_images", [False, True], ids=["logits", "images"])
def test_float16_inverts_as_float32_does(model, seed, weight, reads_images):
    """Gradients of the light loss vanish in float16 and those of the heavy one overflow, unless the loss is scaled."""

    def weighted(logits, images, targets):
        loss = F.cross_entropy(logits.float(), targets)
        return weight * (loss + 1e-3 * images.abs().mean() if reads_images else loss)

    options = dict(stopping={10: 0.3}, iterations=40, lr=0.01, objective=weighted)
    half, single = (quiet(model, dtype=dtype, **options).run([0, 3], seed) for dtype in (torch.float16, torch.float32))
    start = quiet(model, **options | {"iterations": 11}).run([0, 3], seed)  # a step before, to compare with
    assert half.images.isfinite().all()
    assert (half.images - single.images).abs().mean() < 0.2 * (start.images - single.images).abs().mean()


def test_pixels_that_are_lost_in_the_last_iteration_are_said(model):
    """Their loss was still finite."""

    def loss(logits, images, targets):
        return images.square().sum().clamp(min=0).sqrt() + (images * 0).sum().sqrt()  # the gradient of sqrt at 0 is NaN

    inverter = quiet(model, stopping="dense", iterations=1, objective=loss)
    with pytest.warns(UserWarning, match="384 pixels are NaN or infinite"):
        result = inverter.run([0, 1])
    assert result.losses.isfinite().all()
    assert result.images.isfinite().all()


def test_a_schedule_may_be_a_text_or_the_stops_alone(model):
    assert quiet(model, stopping={50: 0.3}, iterations=60).stopping == StoppingSchedule({50: 0.3})
    assert quiet(model, stopping="50:0.3", iterations=60).stopping == StoppingSchedule({50: 0.3})
    assert quiet(model, stopping="paper", iterations=400).stopping == StoppingSchedule.paper(400)
    assert quiet(model, stopping="dense", iterations=60).stopping == StoppingSchedule.dense()


@pytest.mark.cuda
def test_cuda_inverts_as_the_cpu_does(model):
    options = dict(stopping=StoppingSchedule({3: 0.3}), iterations=6, lr=0.02, dtype=torch.float32)
    cpu = quiet(model, **options).run([0, 1, 2])
    cuda = quiet(model.cuda(), **options).run([0, 1, 2])
    assert torch.equal(cpu.keep, cuda.keep)
    torch.testing.assert_close(cpu.losses, cuda.losses, rtol=1e-3, atol=1e-3)


def test_a_model_that_prunes_stops_nothing(model):
    """The patches that it has pruned have importance 0, which says nothing about them."""
    pruning = smi_fast.accelerate(model, prune={1: 0.5})
    with pytest.raises(ValueError, match="the model prunes"):
        quiet(pruning, stopping=StoppingSchedule({2: 0.3}), iterations=4)
    assert quiet(pruning, stopping="dense", iterations=2).run([0]).losses.isfinite().all()


def test_soft_labels_are_minimised_as_torch_defines_them(model, seed):
    """One-hot labels give what classes give; the loss of others is torch's cross-entropy of probabilities."""
    classes, options = torch.tensor([4, 0, 2]), {"stopping": {3: 0.3}, "iterations": 6, "lr": 0.05}
    hard = quiet(model, **options).run(classes, seed)
    one_hot = quiet(model, **options).run(F.one_hot(classes, 5).float(), seed)
    torch.testing.assert_close(one_hot.losses, hard.losses, rtol=1e-4, atol=1e-4)
    assert torch.equal(one_hot.keep, hard.keep)
    soft = torch.rand(3, 5).softmax(1)

    def torchs(logits, images, targets):
        return F.cross_entropy(logits, targets)

    for norm in ("batch", "image"):
        found = quiet(model, objective=deep_inversion(0.0, norm=norm), **options).run(soft, seed)
        expected = quiet(model, objective=torchs, **options).run(soft, seed)
        scale = 3 if norm == "image" else 1
        torch.testing.assert_close(found.losses[:1], scale * expected.losses[:1])
        assert torch.equal(found.targets, soft)


def test_a_schedule_changes_the_learning_rate_of_each_step(model, seed):
    """Compared with a loop of torch's own optimiser and scheduler."""
    factors = [0.1, 1.0, 0.5, 0.0, 0.25]
    options = {"stopping": "dense", "iterations": 5, "lr": 0.05, "jitter": 0, "flip": 0, "clamp": False}
    result = quiet(
        model, lr_schedule=lambda step, steps: factors[step % steps], objective=deep_inversion(0.0), **options
    ).run([1, 3], seed)
    generator = torch.Generator().manual_seed(seed)
    random_views(5, (8, 8), jitter=0, flip=0, generator=generator)
    images = torch.randn(2, 3, 8, 8, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.05, betas=(0.5, 0.99))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors[min(step, 4)])
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(model.eval()(images), torch.tensor([1, 3]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    torch.testing.assert_close(result.losses, torch.tensor(losses), rtol=1e-4, atol=1e-4)


def test_a_schedule_that_gives_no_rate_is_refused(model):
    with pytest.raises(ValueError, match=r"lr_schedule gives -1\.0 in step 2"):
        quiet(model, stopping="dense", iterations=4, lr_schedule=lambda step, steps: 1 - step).run([0])


def test_a_run_starts_from_given_images_and_sees_given_views(model, seed):
    noise, views = torch.randn(2, 3, 8, 8), torch.tensor([[1, 3, 1], [0, 0, 0], [7, 2, 0]])
    seen = []

    class OfSeen(deep_inversion):
        def loss(self, outputs, targets):
            seen.append(outputs.seen()[0].detach())
            return super().loss(outputs, targets)

    options = {"stopping": "dense", "iterations": 3, "lr": 1e-6, "objective": OfSeen(0.0), "clamp": False}
    quiet(model, views=lambda iterations, generator: views, **options).run([0, 1], start=noise)
    for found, view in zip(seen, views.tolist(), strict=True):
        torch.testing.assert_close(found, apply_view(noise, view), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"start is \(1, 3, 8, 8\)"):
        quiet(model, stopping="dense", iterations=1).run([0, 1], start=noise[:1])
    with pytest.raises(ValueError, match=r"views returned \(2, 3\)"):
        quiet(model, stopping="dense", iterations=3, views=lambda *_: views[:2]).run([0])


def test_shifts_in_pixels_are_whole_multiples(seed):
    generator = torch.Generator().manual_seed(seed)
    views = random_views(500, (32, 64), jitter=5, generator=generator, multiple=2)
    assert views[:, :2].unique().tolist() == [-4, -2, 0, 2, 4]
    with_share = random_views(500, (32, 64), jitter=1 / 8, generator=generator)
    assert (with_share[:, 0].max(), with_share[:, 1].max()) == (4, 8)


def test_patches_stop_at_the_papers_shares_of_the_iterations_if_nothing_else_is_said(model):
    for iterations in (1, 2, 80, 4000):
        assert quiet(model, iterations=iterations).stopping == StoppingSchedule.parse("paper", iterations)
