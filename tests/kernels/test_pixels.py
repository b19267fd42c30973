"""One optimiser step on kept pixels, compared with torch.optim.Adam and autograd of the prior, on both backends."""

import copy
import decimal
import math

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DeviceWork, assert_within_twice, canaries, cu_seqlens_of, poisoned_memory
from smi_fast.kernels import pixels as pixels_module
from smi_fast.kernels.patches import gather_patches_op
from smi_fast.kernels.pixels import (
    launch_pixel_step,
    patch_sites,
    pixel_step,
    pixel_step_op,
    prior_reference,
    zero_unless,
)

BACKENDS = ["torch", "triton", "auto"]
ADAM = {"lr": 0.25, "betas": (0.5, 0.99)}
# So small that no gradient comes near zero, where a step of Adam divides rounding errors by rounding errors.
PRIOR = {"tv_l2": 0.2, "l2": 0.2}
STATE = ("images", "exp_avg", "exp_avg_sq")


@pytest.fixture
def few_programs(monkeypatch):
    """Let each program have several patches, as on a GPU with a large batch."""
    monkeypatch.setattr(pixels_module, "_multiprocessors", lambda device: 1)


def random_keep(grid, lengths, device="cpu"):
    return torch.cat([torch.randperm(grid[0] * grid[1])[:n] for n in lengths]).int().to(device)


def kept_mask(positions, lengths, grid, patch):
    """(B, 1, H, W) bool, image by image."""
    masks = torch.zeros(len(lengths), grid[0] * grid[1], dtype=torch.bool)
    for mask, own in zip(masks, positions.cpu().split(lengths), strict=True):
        mask[own.long()] = True
    return masks.view(-1, 1, *grid).repeat_interleave(patch[0], 2).repeat_interleave(patch[1], 3).to(positions.device)


def plain_prior(images, mask, tv_l2, l2):
    """The formula on whole images, for autograd: every pair of neighbours of which both are kept."""
    height, width = images.shape[2:]
    total = images.new_zeros(())
    for dy, dx in ((0, 1), (1, 0), (1, -1), (1, 1)):
        first = ..., slice(0, height - dy), slice(max(0, -dx), width - max(0, dx))
        second = ..., slice(dy, height), slice(max(0, dx), width + min(0, dx))
        difference = torch.where(mask[first] & mask[second], images[first] - images[second], 0)
        if difference.any():
            total = total + tv_l2 * difference.square().sum().sqrt()
    kept = torch.where(mask, images, 0)
    return total + l2 * kept.square().sum().sqrt() if kept.any() else total


def cut(images, positions, lengths, patch):
    """The patches (T, C, ph, pw) at some positions, image by image."""
    tiles = F.unfold(images, patch, stride=patch).mT.split(1)
    parts = [tile[0][own.long()] for tile, own in zip(tiles, positions.split(lengths), strict=True)]
    return torch.cat(parts).view(len(positions), images.shape[1], *patch)


def put(images, patches, positions, lengths, patch):
    """Images with patches put in, differentiable."""
    columns = F.unfold(images, patch, stride=patch).mT.clone()
    for image, (own, part) in enumerate(zip(positions.split(lengths), patches.split(lengths), strict=True)):
        columns[image, own.long()] = part.flatten(1)
    return F.fold(columns.mT, images.shape[2:], patch, stride=patch)


def viewed_patches(images, cells, lengths, views, patch):
    """Patches at some cells of images that are really rolled and mirrored, differentiable."""
    viewed = []
    for image, (dy, dx, flip) in zip(images, views, strict=True):
        image = torch.roll(image, (dy, dx), (1, 2))
        viewed.append(torch.flip(image, (2,)) if flip else image)
    return cut(torch.stack(viewed), cells, lengths, patch)


class Case:
    """Images, what is kept of them, and gradients for each step, of either sign and bounded away from zero.

    `counts` are the steps that the images have taken before, one for all images or one for each.
    """

    def __init__(self, channels, grid, patch, lengths, device, steps=1, views=None, dtype=torch.float32, counts=(0,),
                 pixel_grad=False):  # fmt: skip
        self.channels, self.grid, self.patch, self.lengths = channels, grid, patch, lengths
        self.size = len(lengths), channels, grid[0] * patch[0], grid[1] * patch[1]
        self.images = torch.randn(self.size, device=device)
        self.positions = random_keep(grid, lengths, device)
        self.cu_seqlens = cu_seqlens_of(lengths, device)
        self.sites = patch_sites(self.positions, self.cu_seqlens, grid)
        self.lowest = torch.linspace(-2.1, -1.5, channels, device=device)
        self.highest = torch.linspace(1.6, 2.2, channels, device=device)
        self.views = views or [None] * steps
        self.counts = torch.tensor(counts, device=device)
        shape = len(self.views), len(self.positions), channels * math.prod(patch)
        sign = torch.randint(0, 2, shape, device=device) * 2 - 1
        self.grads = ((0.5 + torch.rand(shape, device=device)) * sign).to(dtype)
        # In a tenth of the size of the other gradient, so that the sum stays away from zero.
        self.pixel_grads = 0.1 * torch.rand(shape, device=device) if pixel_grad else [None] * len(self.views)

    def state(self):
        moments = torch.zeros(len(self.sites), self.channels * math.prod(self.patch), device=self.images.device)
        return {
            "images": self.images.clone(),
            "exp_avg": moments,
            "exp_avg_sq": moments.clone(),
            "step": self.counts.clone(),
        }

    def gathered(self, images, view):
        ph, pw = self.patch
        return gather_patches_op(images, self.positions, self.cu_seqlens, view, ph, pw, torch.float32)[1:]

    def alone(self, image):
        """The case of one of the images, without the others."""
        part, kept = copy.copy(self), slice(self.cu_seqlens[image], self.cu_seqlens[image + 1])
        part.lengths, part.size = [self.lengths[image]], (1, *self.size[1:])
        part.images, part.positions = self.images[image : image + 1], self.positions[kept]
        part.cu_seqlens = cu_seqlens_of(part.lengths, self.images.device)
        part.sites = patch_sites(part.positions, part.cu_seqlens, self.grid)
        part.views = [view[image : image + 1] if isinstance(view, list) else view for view in self.views]
        part.counts = self.counts[image : image + 1]
        part.grads, part.pixel_grads = self.grads[:, kept], self.pixel_grads[:, kept]
        return part

    def run(self, backend, **settings):
        """The state after all steps, and the prior of each."""
        state, priors = self.state(), []
        images, other = state["images"], state["images"].clone()
        for view, grad, pixel_grad in zip(self.views, self.grads, self.pixel_grads, strict=True):
            inverse = None
            if view is not None:
                view = torch.tensor(view, device=images.device)
                inverse = self.gathered(images, view)[1]
            prior = pixel_step(
                other, state["exp_avg"], state["exp_avg_sq"], state["step"], images, grad, self.sites, self.lowest,
                self.highest, inverse, view, pixel_grad, patch_size=self.patch, backend=backend, **settings,
            )  # fmt: skip
            images, other = other, images
            priors.append(prior)
        return {**state, "images": images, "priors": torch.stack(priors)}

    def run_plain(self, dtype, *, lr, betas, tv_l2=0.0, l2=0.0, eps=1e-8, norm="batch"):
        """The same by a torch.optim.Adam for each image, with the gradient that autograd finds on whole images."""
        canvas, priors, batch = self.images.to(dtype), [], len(self.lengths)
        mask = kept_mask(self.positions, self.lengths, self.grid, self.patch)
        sets = [slice(None)] if norm == "batch" else [slice(image, image + 1) for image in range(batch)]
        patches = cut(canvas, self.positions, self.lengths, self.patch).split(self.lengths)
        patches = [torch.nn.Parameter(part.clone()) for part in patches]
        rates = lr.tolist() if isinstance(lr, torch.Tensor) else [lr]
        optimizers = [torch.optim.Adam([part], lr=rates[0], betas=betas, eps=eps) for part in patches]
        for optimizer, part, count in zip(optimizers, patches, self.counts.expand(batch).tolist(), strict=True):
            moments = {name: torch.zeros_like(part) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[part] = {"step": torch.tensor(float(count)), **moments}
        for view, grad, pixel_grad in zip(self.views, self.grads, self.pixel_grads, strict=True):
            images = put(canvas, torch.cat(patches), self.positions, self.lengths, self.patch)
            prior = sum(plain_prior(images[own], mask[own], tv_l2, l2) for own in sets)
            each = [(0, 0, 0)] * batch if view is None else view
            each = [each] * batch if isinstance(each, tuple) else each
            cells = (
                self.positions if view is None else self.gathered(self.images, torch.tensor(view).to(mask.device))[0]
            )
            seen = viewed_patches(images, cells, self.lengths, each, self.patch)
            loss = prior + (seen.flatten(1) * grad.to(dtype)).sum()
            if pixel_grad is not None:
                loss = loss + (torch.cat(patches).flatten(1) * pixel_grad.to(dtype)).sum()
            for optimizer, part, part_grad in zip(optimizers, patches, torch.autograd.grad(loss, patches), strict=True):
                part.grad = part_grad
                taken = int(optimizer.state[part]["step"])
                optimizer.param_groups[0]["lr"] = rates[min(taken, len(rates) - 1)]
                optimizer.step()
            with torch.no_grad():
                for part in patches:
                    part.clamp_(self.lowest.to(dtype).view(-1, 1, 1), self.highest.to(dtype).view(-1, 1, 1))
            priors.append(prior.detach())
        states = [optimizer.state[part] for optimizer, part in zip(optimizers, patches, strict=True)]
        return {
            "images": put(canvas, torch.cat(patches), self.positions, self.lengths, self.patch).detach(),
            "exp_avg": torch.cat([state["exp_avg"].flatten(1) for state in states]),
            "exp_avg_sq": torch.cat([state["exp_avg_sq"].flatten(1) for state in states]),
            "priors": torch.stack(priors),
        }

    def assert_matches(self, backend, **settings):
        with poisoned_memory():
            ours = self.run(backend, **settings)
        assert torch.equal(ours.pop("step"), self.counts + len(self.views))
        plain, exact = (self.run_plain(dtype, **settings) for dtype in (torch.float32, torch.float64))
        # A norm is as large as the batch, and so is its rounding error.
        largest = exact["priors"].max().clamp(min=1)
        for results in (ours, plain, exact):
            results["priors"] = results["priors"] / largest
        # Adam divides a gradient by its own size. Where a gradient all but cancels, rounding decides the step of that
        # pixel: the three pixels that err most are only required to be near.
        pixels, nearest = ours["images"].clone(), exact["images"].to(ours["images"].dtype)
        odd = (pixels - nearest).abs().flatten().topk(min(3, pixels.numel())).indices
        torch.testing.assert_close(pixels.flatten()[odd], nearest.flatten()[odd], rtol=0, atol=1e-3)
        pixels.view(-1)[odd] = nearest.flatten()[odd]
        assert_within_twice(ours | {"images": pixels}, [plain], exact)
        stopped = ~kept_mask(self.positions, self.lengths, self.grid, self.patch).expand(self.size)
        assert torch.equal(ours["images"][stopped], self.images[stopped])


def drawn_views(steps, batch=None):
    """Views for each step: one for all images, or one for each image; every fourth step has none."""
    draw = lambda: (*torch.randint(-40, 40, (2,)).tolist(), int(torch.randint(0, 2, ())))  # noqa: E731
    return [None if step % 4 == 3 else [draw() for _ in range(batch)] if batch else draw() for step in range(steps)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["batch", "image"])
@pytest.mark.parametrize(("lengths", "per_image"), [([5, 5, 5], False), ([1, 12, 6], True)], ids=["uniform", "ragged"])
def test_many_steps_equal_adam_with_autograd(lengths, per_image, norm, backend, device, seed, few_programs):
    steps = 52 if device.type == "cuda" else 8 if backend == "torch" else 5  # the interpreter takes its time
    views = drawn_views(steps, len(lengths) if per_image else None)
    counts = [0, 7, 300] if per_image else [0]
    case = Case(3, (3, 4), (4, 4), lengths, device, views=views, counts=counts, pixel_grad=per_image)
    case.assert_matches(backend, **ADAM, **PRIOR, norm=norm)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["batch", "image"])
@pytest.mark.parametrize(
    ("channels", "grid", "patch", "lengths"),
    [
        (3, (2, 3), (16, 16), [4, 3]),
        (3, (3, 2), (14, 14), [3, 6]),
        (1, (5, 2), (4, 7), [10, 10]),
        (3, (1, 1), (4, 4), [1, 1, 1]),
        (2, (4, 5), (1, 1), [9, 13]),
        (2, (1, 4), (3, 2), [2, 0, 4, 0]),
        (5, (2, 2), (6, 5), [4, 4]),
    ],
    ids=str,
)
def test_every_shape_of_patch_and_grid(channels, grid, patch, lengths, norm, backend, device, seed, few_programs):
    views = [(-17, 0, 0), (2, 30, 1)] if norm == "image" else [None, (5, -3, 1)]
    case = Case(channels, grid, patch, lengths, device, views=views, pixel_grad=norm == "image")
    case.assert_matches(backend, **ADAM, **PRIOR, norm=norm)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("patch", [(4, 4), (5, 9)], ids=str)
def test_with_norms_of_images_a_batch_equals_its_images_one_by_one(patch, backend, device, seed, few_programs):
    lengths, steps = [3, 12, 0, 1, 7], 2
    case = Case(
        3, (3, 4), patch, lengths, device, views=drawn_views(steps, len(lengths)), counts=[0, 50, 2, 999, 7],
        pixel_grad=True,
    )  # fmt: skip
    together = case.run(backend, **ADAM, **PRIOR, norm="image")
    alone = [case.alone(image).run(backend, **ADAM, **PRIOR, norm="image") for image in range(len(lengths))]
    for name in (*STATE, "step"):
        assert torch.equal(together[name], torch.cat([one[name] for one in alone])), name
    torch.testing.assert_close(together["priors"], sum(one["priors"] for one in alone))


@pytest.mark.parametrize("backend", BACKENDS)
def test_patches_that_the_model_did_not_see_step_as_if_its_gradient_were_zero(backend, device, seed, few_programs):
    case = Case(3, (3, 4), (4, 4), [12, 12], device, views=[(5, -3, 1)])
    rows = torch.tensor([1, 4, 7, 12, 20], device=device)
    few = copy.copy(case)
    few.positions, few.cu_seqlens, few.grads = case.positions[rows], cu_seqlens_of([3, 2], device), case.grads[:, rows]
    case.grads = torch.zeros_like(case.grads).index_copy(1, rows, few.grads)
    expected, found = (each.run(backend, **ADAM, **PRIOR) for each in (case, few))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_counts_are_one_count(backend, device, seed):
    case = Case(3, (2, 2), (4, 4), [2, 4, 1], device, steps=3, counts=[5])
    shared = case.run(backend, **ADAM, **PRIOR)
    case.counts = case.counts.expand(3).clone()
    each = case.run(backend, **ADAM, **PRIOR)
    assert each.pop("step").tolist() == shared.pop("step").tolist() * 3
    for name, value in each.items():
        assert torch.equal(value, shared[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_images_than_a_block_are_counted(backend, device, seed, few_programs):
    case = Case(1, (1, 1), (1, 1), [1] * 1100, device, counts=list(range(1100)))
    case.counts = case.counts.int()
    case.assert_matches(backend, **ADAM)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["batch", "image"])
@pytest.mark.parametrize("prior", [{}, {"tv_l2": 0.2}, {"l2": 0.2}], ids=str)
def test_each_part_of_the_prior_is_optional(prior, norm, backend, device, seed):
    Case(3, (3, 3), (4, 4), [4, 6], device, steps=5).assert_matches(backend, **ADAM, **prior, norm=norm)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gradients(dtype, backend, device, seed):
    views = [None, (3, 9, 1), (1, -2, 0)]
    Case(3, (3, 3), (4, 4), [4, 6], device, views=views, dtype=dtype).assert_matches(backend, **ADAM, **PRIOR)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("betas", [(0.5, 0.99), (0.9, 0.999), (0.0, 0.0), (0.3, 1 - 1e-6)], ids=str)
def test_adams_bias_is_corrected_exactly_at_any_step(betas, backend, device):
    """Compared with Adam's formula in Python's float64, from moments of zero and pixels of zero."""
    counts = [1, 2, 3, 10, 999, 4000, 10**6 + 7]
    case = Case(1, (1, 1), (1, 1), [1] * len(counts), device, counts=[n - 1 for n in counts])
    case.images.zero_(), case.lowest.fill_(-1e9), case.highest.fill_(1e9)
    (beta1, beta2), lr, g = betas, 0.25, 3.0
    case.grads.fill_(g)
    found = case.run(backend, lr=lr, betas=betas)["images"].flatten().tolist()
    second = [math.sqrt((1 - beta2) / (1 - beta2**n)) * g for n in counts]
    expected = [-lr / (1 - beta1**n) * (1 - beta1) * g / (v + 1e-8) for n, v in zip(counts, second, strict=True)]
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_schedule_gives_each_image_the_rate_of_its_own_step(backend, device, seed):
    """Compared with torch.optim.Adam at the rate that each image has in its step."""
    rates = torch.tensor([0.25, 0.1, 0.5, 0.02], device=device)
    each = Case(3, (3, 3), (4, 4), [4, 2, 6, 3], device, views=[(1, 2, 1), None], counts=[0, 2, 3, 7])
    each.assert_matches(backend, lr=rates, betas=(0.5, 0.99), tv_l2=1e-2, norm="image")
    together = Case(3, (3, 3), (4, 4), [4, 2], device, steps=5)
    together.assert_matches(backend, lr=rates, betas=(0.5, 0.99), l2=1e-2)


@pytest.mark.parametrize(
    "betas", [(0.5, 0.99), (0.9, 0.999), (0.0, 1e-3), (0.3, 1 - 1e-6), (1 - 1e-7, 0.9999)], ids=str
)
def test_corrections_of_the_bias_err_by_the_roundings_of_float32_only(betas, device, seed, monkeypatch):
    """Compared with 60 decimal digits, for counts up to a million. The difference, its square root and the
    quotient are rounded, and a square root halves the error of its argument: at most 2.5 units of 2^-24."""
    drawn = (10 ** (6 * torch.rand(40, dtype=torch.float64))).long().tolist()
    counts, kept, allocate = [1, 2, 3, 999, 10**6, *drawn], [], pixels_module._scratch
    monkeypatch.setattr(pixels_module, "_scratch", lambda *shape: kept.append(allocate(*shape)) or kept[-1])
    case = Case(1, (1, 1), (1, 1), [1] * len(counts), device, counts=[n - 1 for n in counts])
    case.run("triton", lr=0.25, betas=betas)
    ((_, _, corrections),) = kept
    with decimal.localcontext(decimal.Context(prec=60)):
        biases = [[1 - decimal.Decimal(beta) ** n for beta in betas] for n in counts]
        exact = [(decimal.Decimal("0.25") / first, 1 / second.sqrt()) for first, second in biases]
        for found, wanted in zip(corrections.tolist(), exact, strict=True):
            errors = [abs(decimal.Decimal(x) / y - 1) * 2**24 for x, y in zip(found, wanted, strict=True)]
            assert max(errors) <= 2.5, (found, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["batch", "image"])
@pytest.mark.parametrize("direction", ["right", "down", "all"])
def test_a_norm_of_zero_has_no_gradient(direction, norm, backend, device, seed):
    case = Case(2, (2, 2), (4, 4), [4, 4], device)  # one step: the next would divide rounding by rounding
    if direction == "right":
        case.images[:] = torch.randn(2, 2, 8, 1, device=device)
    elif direction == "down":
        case.images[:] = torch.randn(2, 2, 1, 8, device=device)
    else:
        case.images.zero_()
    case.assert_matches(backend, **ADAM, **PRIOR, norm=norm)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_single_kept_pixel_has_no_neighbours(backend, device, seed):
    case = Case(1, (3, 3), (1, 1), [1], device, steps=2)
    case.assert_matches(backend, **ADAM, **PRIOR)
    assert torch.equal(case.run(backend, **ADAM, tv_l2=1.0)["priors"], torch.zeros(2, device=device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("view", "norm"), [(None, "batch"), ((3, 5, 1), "batch"), ((3, 5, 1), "image")], ids=str)
def test_stopped_pixels_are_neither_read_nor_written(view, norm, backend, device, seed):
    case = Case(3, (3, 4), (4, 4), [5, 7], device, views=[view] * 6)
    expected = case.run(backend, **ADAM, **PRIOR, norm=norm)
    stopped = ~kept_mask(case.positions, case.lengths, case.grid, case.patch).expand(case.size)
    case.images[stopped] = math.nan
    ours = case.run(backend, **ADAM, **PRIOR, norm=norm)
    assert ours["images"][stopped].isnan().all()
    for name in ("exp_avg", "exp_avg_sq", "priors"):
        assert torch.equal(ours[name], expected[name])
    assert torch.equal(ours["images"][~stopped], expected["images"][~stopped])


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_that_are_read_stay_as_they_are(backend, device, seed):
    case = Case(3, (2, 2), (4, 4), [2, 3], device)
    before, state = case.images.clone(), case.state()
    grad = case.grads[0].view(5, 3, 4, 4)
    pixel_step(
        state["images"], state["exp_avg"], state["exp_avg_sq"], state["step"], case.images, grad, case.sites,
        case.lowest, case.highest, patch_size=4, backend=backend, **ADAM, **PRIOR,
    )  # fmt: skip
    assert torch.equal(case.images, before)
    assert not torch.equal(state["images"], before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_nan(backend, device, seed):
    case = Case(1, (1, 2), (2, 2), [1], device)
    case.grads[:] = math.nan
    case.positions[:] = 0
    case.sites = patch_sites(case.positions, case.cu_seqlens, case.grid)
    assert case.run(backend, **ADAM)["images"][0, 0, :, :2].isnan().all()


@pytest.mark.parametrize("norm", ["batch", "image"])
def test_nothing_is_written_beyond_the_state(norm, device, seed, few_programs):
    """Outputs, scratch memory and what is updated in place all lie between other bytes."""
    case = Case(3, (2, 3), (5, 3), [4, 5], device, views=[(1, 2, 1)], counts=[3, 4], pixel_grad=True)
    state, margin, around = case.state(), 1024, []
    for name, tensor in state.items():
        memory = torch.full((tensor.numel() + 2 * margin,), 77, dtype=tensor.dtype, device=device)
        inner = memory[margin : margin + tensor.numel()].view(tensor.shape).copy_(tensor)
        around += [memory[:margin], memory[margin + tensor.numel() :]]
        state[name] = inner
    view = torch.tensor(case.views[0], device=device)
    inverse = case.gathered(case.images, view)[1]
    with canaries(pixels_module, "_scratch"):
        pixel_step(
            state["images"], state["exp_avg"], state["exp_avg_sq"], state["step"], case.images, case.grads[0],
            case.sites, case.lowest, case.highest, inverse, view, case.pixel_grads[0], patch_size=(5, 3), norm=norm,
            backend="triton", **ADAM, **PRIOR,
        )  # fmt: skip
    expected = case.run("triton", **ADAM, **PRIOR, norm=norm)
    for name in (*STATE, "step"):
        assert torch.equal(state[name], expected[name])
    assert all((part == 77).all() for part in around)


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_have_the_same_bits(backend, device, seed, few_programs):
    case = Case(3, (4, 4), (4, 4), [9, 16], device, views=drawn_views(4))
    results = []
    for _ in range(2):
        with poisoned_memory():
            results.append(case.run(backend, **ADAM, **PRIOR))
    for result in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(value, result[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["batch", "image"])
@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_without_patches_steps_are_counted_and_the_prior_is_zero(lengths, norm, backend, device):
    images = torch.randn(len(lengths), 3, 8, 8, device=device)
    positions, bounds = torch.empty(0, dtype=torch.int32, device=device), torch.zeros(3, device=device)
    sites, moments = patch_sites(positions, cu_seqlens_of(lengths, device), (2, 2)), torch.empty(0, 48, device=device)
    for counts in ([4], list(range(len(lengths)))):
        next_images, step = images.clone(), torch.tensor(counts, dtype=torch.int64, device=device)
        prior = pixel_step(
            next_images, moments, moments.clone(), step, images, moments, sites, bounds, bounds, patch_size=4,
            norm=norm, backend=backend, **ADAM, **PRIOR,
        )  # fmt: skip
        assert prior.item() == 0
        assert step.tolist() == [count + 1 for count in counts]
        assert torch.equal(next_images, images)


@pytest.mark.parametrize(("norm", "operators"), [("batch", []), ("image", ["sum"])])
def test_a_step_takes_two_launches(norm, operators, device, seed):
    """And one sum over the priors of the images where each image has its own."""
    case = Case(3, (2, 2), (4, 4), [2, 3], device, views=[(1, 5, 1)])
    view, state, grad = torch.tensor(case.views[0], device=device), case.state(), case.grads[0]
    inverse = case.gathered(case.images, view)[1]
    with DeviceWork(pixels_module) as work:
        launch_pixel_step(
            state["images"], state["exp_avg"], state["exp_avg_sq"], state["step"], case.images, grad, case.sites,
            case.lowest, case.highest, inverse, view, 4, 4, 0.25, 0.5, 0.99, 1e-8, 3.0, 2.0, grad, norm,
        )  # fmt: skip
    assert work.launches == 2
    assert work.operators == operators


@pytest.mark.parametrize("norm", ["batch", "image"])
def test_the_priors_gradient_is_that_of_its_value(norm, seed):
    case = Case(2, (3, 3), (3, 2), [5, 9], "cpu")
    mask = kept_mask(case.positions, case.lengths, case.grid, case.patch)
    images = case.images.double().requires_grad_()
    sets = [slice(None)] if norm == "batch" else [slice(0, 1), slice(1, 2)]
    plain = sum(plain_prior(images[own], mask[own], **PRIOR) for own in sets)
    assert torch.autograd.gradcheck(lambda x: plain_prior(x, mask, **PRIOR), (images,))
    value, grad = prior_reference(images.detach(), case.sites, *case.patch, **PRIOR, norm=norm)
    torch.testing.assert_close(value, plain.detach(), rtol=1e-14, atol=0)
    expected = cut(torch.autograd.grad(plain, images)[0], case.positions, case.lengths, case.patch)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-14)


def test_sites_hold_places_and_kept_neighbours(device, seed):
    grid, lengths = (3, 4), [5, 0, 12, 1]
    positions = random_keep(grid, lengths, device)
    sites = patch_sites(positions, cu_seqlens_of(lengths, device), grid)
    assert sites.dtype == torch.int32
    kept = {(image, p) for image, own in enumerate(positions.cpu().split(lengths)) for p in own.tolist()}
    image_of = [image for image, n in enumerate(lengths) for _ in range(n)]
    for (image, row, column, bits), position, own in zip(sites.tolist(), positions.tolist(), image_of, strict=True):
        assert (image, row, column) == (own, position // 4, position % 4)
        for bit in range(9):
            r, c = row + bit // 3 - 1, column + bit % 3 - 1
            assert bits >> bit & 1 == (0 <= r < 3 and 0 <= c < 4 and (image, 4 * r + c) in kept)


def arguments(device="cpu"):
    case = Case(3, (2, 2), (4, 4), [2, 3], device)
    state = case.state()
    return {
        "next_images": state["images"],
        "exp_avg": state["exp_avg"],
        "exp_avg_sq": state["exp_avg_sq"],
        "step": state["step"],
        "images": case.images,
        "grad": case.grads[0],
        "sites": case.sites,
        "lowest": case.lowest,
        "highest": case.highest,
        "patch_size": 4,
        "lr": 0.25,
    }


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autograd_knows_what_a_step_writes_to(backend, device, seed):
    """A backward pass that has kept one of these tensors is refused, as after any operation in place."""
    given = arguments(device)
    before = {name: x._version for name, x in given.items() if isinstance(x, torch.Tensor)}
    pixel_step(**given, backend=backend)
    written = {name for name, version in before.items() if given[name]._version > version}
    assert written == {"next_images", "exp_avg", "exp_avg_sq", "step"}
    with torch.inference_mode():  # whose tensors have no such count
        pixel_step(**arguments(device), backend=backend)


@pytest.mark.parametrize("view", [None, (1, -1, 1)], ids=str)
def test_operator_passes_opcheck(view, device, seed):
    given = arguments(device)
    given.pop("patch_size"), given.pop("lr")
    inverse = None
    if view is not None:
        view, inverse = torch.tensor(view, device=device), torch.full((2, 2, 2), -1, dtype=torch.int32, device=device)
    numbers = 4, 4, 0.25, 0.5, 0.99, 1e-8, 3.0, 2.0
    torch.library.opcheck(pixel_step_op, (*given.values(), inverse, view, *numbers))
    given["step"] = torch.tensor([3, 4], device=device)
    torch.library.opcheck(pixel_step_op, (*given.values(), inverse, view, *numbers, given["grad"], "image"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "8x8 pixels do not divide into patches of 3x3"),
        ({"images": torch.zeros(2, 8, 8)}, r"images is \(2, 8, 8\)"),
        ({"next_images": torch.zeros(2, 3, 8, 4)}, r"next_images is \(2, 3, 8, 4\)"),
        ({"next_images": torch.zeros(2, 3, 8, 8).mT}, "next_images is not contiguous"),
        ({"exp_avg": torch.zeros(5, 47)}, r"exp_avg is \(5, 47\)"),
        ({"exp_avg_sq": torch.zeros(5, 48, dtype=torch.float64)}, "exp_avg_sq is .*float64"),
        ({"step": torch.zeros(())}, "step is .*float32"),
        ({"step": torch.zeros(3, dtype=torch.int64)}, r"step is \(3,\) .* not \(2,\)"),
        ({"sites": torch.zeros(5, 2, dtype=torch.int32)}, r"sites is \(5, 2\)"),
        ({"grad": torch.zeros(4, 48)}, r"grad is \(4, 48\)"),
        ({"pixel_grad": torch.zeros(5, 47)}, r"pixel_grad is \(5, 47\)"),
        ({"pixel_grad": torch.zeros(5, 48, dtype=torch.bfloat16)}, "pixel_grad is .*bfloat16, not .*float32"),
        ({"lowest": torch.zeros(1)}, r"lowest is \(1,\)"),
        ({"view": torch.zeros(3, dtype=torch.int32)}, "inverse is None"),
        ({"inverse": torch.zeros(2, 2, 2, dtype=torch.int32)}, "view is None"),
        (
            {"inverse": torch.zeros(2, 2, 2, dtype=torch.int32), "view": torch.zeros(2, dtype=torch.int32)},
            r"view has shape \(2,\)",
        ),
        (
            {"inverse": torch.zeros(2, 2, 2, dtype=torch.int32), "view": torch.zeros(3, dtype=torch.int32)}
            | {"grad": torch.zeros(4, 47)},
            r"grad is \(4, 47\)",
        ),
        (
            {"inverse": torch.zeros(2, 4, dtype=torch.int32), "view": torch.zeros(3, dtype=torch.int32)},
            r"inverse is \(2, 4\)",
        ),
        ({"lr": -1.0}, "lr .* -1.0"),
        ({"lr": torch.ones(3, dtype=torch.float64)}, r"lr is \(3,\) torch.float64"),
        ({"lr": torch.ones(0)}, r"lr is \(0,\)"),
        ({"tv_l2": math.nan}, "tv_l2 .* nan"),
        ({"betas": (0.5, 1.0)}, r"betas .*\(0.5, 1.0\)"),
        ({"norm": "patch"}, "norm .* 'patch'"),
        ({"backend": "cuda"}, "backend 'cuda'"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        pixel_step(**{**arguments(), **changes})


def test_stepping_images_in_place_is_refused():
    given = arguments()
    with pytest.raises(ValueError, match="next_images is images itself"):
        pixel_step(**{**given, "next_images": given["images"]})


@pytest.mark.parametrize(
    ("positions", "cu_seqlens", "message"),
    [
        (torch.zeros(2, dtype=torch.int64), cu_seqlens_of([1, 1]), "positions .*int64"),
        (torch.zeros(2, dtype=torch.int32), torch.zeros(3), "cu_seqlens .*float32"),
    ],
)
def test_bad_sites_are_named(positions, cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        patch_sites(positions, cu_seqlens, (2, 2))


@pytest.mark.cuda
@pytest.mark.parametrize("patch", [(16, 16), (14, 14), (4, 4)], ids=str)
@pytest.mark.parametrize("per_image", [False, True], ids=["one view", "views"])
def test_gpu_many_steps_equal_adam_with_autograd(per_image, patch, device, seed):
    lengths = [46] * 8 + [196, 1, 100]
    case = Case(3, (14, 14), patch, lengths, device, views=drawn_views(50, len(lengths) if per_image else None))
    for backend in BACKENDS:
        case.assert_matches(backend, **ADAM, tv_l2=30.0, l2=20.0)
        case.assert_matches(backend, **ADAM, tv_l2=3.0, l2=2.0, norm="image")


@pytest.mark.cuda
def test_replayed_cuda_graphs_count_steps_and_read_the_view(device, seed):
    """One graph holds a step from each of the two image batches to the other."""
    case = Case(3, (6, 5), (16, 16), [7, 30, 11], device, views=[(8 * i - 20, 5 * i, i % 2) for i in range(8)])
    case.grads[1::2] = case.grads[0::2]
    state, view = case.state(), torch.zeros(2, 3, dtype=torch.int64, device=device)
    pair, grad = (state["images"], state["images"].clone()), case.grads[0].clone()

    def steps():
        priors = []
        for number in range(2):
            images, other = pair[number], pair[1 - number]
            inverse = case.gathered(images, view[number])[1]
            prior = pixel_step(
                other, state["exp_avg"], state["exp_avg_sq"], state["step"], images, grad, case.sites, case.lowest,
                case.highest, inverse, view[number], patch_size=16, backend="triton", **ADAM, **PRIOR,
            )  # fmt: skip
            priors.append(prior)
        return torch.stack(priors)

    steps()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        priors = steps()
    for name, value in case.state().items():
        state[name].copy_(value)
    pair[1].copy_(pair[0])
    seen = []
    for number in range(0, 8, 2):
        view.copy_(torch.tensor(case.views[number : number + 2]))
        grad.copy_(case.grads[number])
        graph.replay()
        seen.append(priors.clone())
    expected = case.run("triton", **ADAM, **PRIOR)
    for name in (*STATE, "step"):
        assert torch.equal(state[name], expected[name]), name
    assert torch.equal(torch.cat(seen), expected["priors"])


@pytest.mark.cuda
def test_gpu_steps_without_synchronising(device, seed):
    case = Case(3, (4, 4), (16, 16), [7, 16], device)
    state, view = case.state(), torch.tensor([3, -5, 1], device=device)
    inverse = case.gathered(case.images, view)[1]

    def step(backend):
        sites = patch_sites(case.positions, case.cu_seqlens, case.grid)
        pixel_step(
            state["images"], state["exp_avg"], state["exp_avg_sq"], state["step"], case.images, case.grads[0], sites,
            case.lowest, case.highest, inverse, view, patch_size=16, backend=backend, **ADAM, **PRIOR,
        )  # fmt: skip

    for backend in BACKENDS:
        step(backend)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(backend)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32], ids=str)
def test_zero_unless_is_where_also_for_nan(dtype):
    x = torch.tensor([[1, -2, 0, float("nan"), float("inf"), -0.0]] * 2 if dtype.is_floating_point else [[1, -2]] * 2)
    x, condition = x.to(dtype), torch.tensor([[True], [False]])
    found = zero_unless(condition, x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.stack((x[0], torch.zeros_like(x[1]))), rtol=0, atol=0, equal_nan=True)
