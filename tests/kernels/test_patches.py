"""Patches seen through a view, compared with rolling, mirroring and unfolding whole images, on both backends."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import DeviceWork, cu_seqlens_of, poisoned_memory
from smi_fast.kernels import gather_patches, view_cells
from smi_fast.kernels import patches as patches_module
from smi_fast.kernels.patches import gather_patches_backward_op, gather_patches_op

BACKENDS = ["torch", "triton", "auto"]


def nearest_cell(position, dy, dx, flip, grid, patch):
    """The cell to which the centre of a patch goes, in Python's integers; half a patch is rounded up."""
    (rows, columns), (ph, pw) = grid, patch
    row = (position // columns + (2 * dy + ph) // (2 * ph)) % rows
    column = (position % columns + (2 * dx + pw) // (2 * pw)) % columns
    return row * columns + (columns - 1 - column if flip else column)


def viewed_patches(images, positions, lengths, views, patch):
    """Patches cut out of images that are rolled, mirrored and unfolded as a whole, and their cells."""
    grid = images.shape[2] // patch[0], images.shape[3] // patch[1]
    cells, patches = [], []
    for image, (dy, dx, flip), own in zip(images, views, positions.split(lengths), strict=True):
        viewed = torch.roll(image, (dy, dx), (1, 2))
        viewed = torch.flip(viewed, (2,)) if flip else viewed
        cells += [nearest_cell(p, dy, dx, flip, grid, patch) for p in own.tolist()]
        columns = F.unfold(viewed[None], patch, stride=patch)[0].T  # (G, C * ph * pw)
        patches.append(columns[cells[len(cells) - len(own) :]])
    return torch.cat(patches), torch.tensor(cells, dtype=torch.int32, device=images.device)


def assert_matches_unfold(batch, channels, grid, patch, views, lengths, backend, dtype=torch.float32, device="cpu"):
    """Patches, cells and the gradient agree exactly. `views` is None, one view for all images, or a list of views."""
    images = torch.randn(batch, channels, grid[0] * patch[0], grid[1] * patch[1], device=device, requires_grad=True)
    positions = torch.cat([torch.randperm(grid[0] * grid[1])[:n] for n in lengths]).int().to(device)
    view = None if views is None else torch.tensor(views, device=device)
    with poisoned_memory():
        patches, cells = gather_patches(
            images, positions, cu_seqlens_of(lengths, device), view, patch_size=patch, dtype=dtype, backend=backend
        )
        grad_out = torch.randn(patches.shape, device=device).to(dtype)
        (grad,) = torch.autograd.grad(patches, images, grad_out)
    each = [(0, 0, 0)] * batch if views is None else views if isinstance(views, list) else [views] * batch
    expected, expected_cells = viewed_patches(images, positions, lengths, each, patch)
    expected = expected.to(dtype)
    assert patches.dtype == dtype
    assert torch.equal(patches, expected)
    assert torch.equal(cells, expected_cells)
    assert cells.dtype == torch.int32
    assert torch.equal(grad, torch.autograd.grad(expected, images, grad_out)[0])


offsets = st.integers(-70, 70)
single_views = st.tuples(offsets, offsets, st.integers(0, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_patches_and_gradients_equal_unfolding(backend, data):
    batch, channels = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    grid = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    patch = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    views = data.draw(st.one_of(st.none(), single_views, st.lists(single_views, min_size=batch, max_size=batch)))
    lengths = data.draw(st.lists(st.integers(0, grid[0] * grid[1]), min_size=batch, max_size=batch))
    assert_matches_unfold(batch, channels, grid, patch, views, lengths, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("views", [None, (11, -29, 1), [(0, 0, 0), (5, 40, 1)]], ids=str)
def test_large_patches_in_every_dtype(views, dtype, backend, device, seed):
    assert_matches_unfold(2, 5, (3, 2), (16, 16), views, [4, 2], backend, dtype, device)


@settings(max_examples=100, deadline=None)
@given(view=st.tuples(st.integers(-(2**40), 2**40), offsets, st.integers(0, 1)), data=st.data())
def test_cells_are_nearest_and_one_to_one(view, data):
    grid = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    patch = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    positions = torch.arange(grid[0] * grid[1])
    cells = view_cells(positions, torch.tensor(view), grid, patch)
    assert sorted(cells.tolist()) == positions.tolist()
    assert cells.tolist() == [nearest_cell(p, *view, grid, patch) for p in positions.tolist()]


def test_view_cells_broadcasts():
    positions, views = torch.arange(12, dtype=torch.int32), torch.tensor([[0, 0, 0], [8, -9, 1], [3, 4, 0]])
    cells = view_cells(positions, views[:, None], (3, 4), (8, 8))
    assert cells.shape == (3, 12)
    assert cells.dtype == torch.int32
    for row, view in zip(cells, views, strict=True):
        assert torch.equal(row, view_cells(positions, view, (3, 4), (8, 8)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend, device, seed):
    plain = torch.randn(2, 3, 8, 8, device=device)
    positions, cu_seqlens = torch.tensor([3, 0, 1], dtype=torch.int32, device=device), cu_seqlens_of([2, 1], device)
    grad_out = torch.randn(48, 3, device=device).mT
    for view in (None, torch.tensor([1, -3, 1], dtype=torch.int32, device=device)):
        results = []
        for images in (plain, plain.contiguous(memory_format=torch.channels_last)):
            images = images.detach().requires_grad_()
            patches, _ = gather_patches(images, positions, cu_seqlens, view, patch_size=4, backend=backend)
            results.append((patches, torch.autograd.grad(patches, images, grad_out)[0]))
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [0, 2])
def test_no_patches_give_empty_results(batch, backend, device):
    images = torch.randn(batch, 3, 8, 8, device=device, requires_grad=True)
    empty = torch.empty(0, dtype=torch.int32, device=device)
    patches, cells = gather_patches(images, empty, cu_seqlens_of([0] * batch, device), patch_size=4, backend=backend)
    assert patches.shape == (0, 48)
    assert cells.shape == (0,)
    patches.sum().backward()
    assert torch.equal(images.grad, torch.zeros_like(images))


@pytest.mark.parametrize("view", [None, [(3, -5, 1), (0, 9, 0)]], ids=str)
def test_patches_take_one_launch_and_gradients_another(view, device):
    images = torch.randn(2, 3, 12, 12, device=device, requires_grad=True)
    positions, cu_seqlens = torch.tensor([3, 0, 1], dtype=torch.int32, device=device), cu_seqlens_of([2, 1], device)
    view = None if view is None else torch.tensor(view, device=device)
    with DeviceWork(patches_module) as work:
        patches, _ = gather_patches(images, positions, cu_seqlens, view, patch_size=4, backend="triton")
    assert (work.launches, work.operators) == (1, [])
    weight = torch.ones_like(patches)
    with DeviceWork(patches_module) as work:
        torch.autograd.grad(patches, images, weight)
    assert (work.launches, work.operators) == (1, [])


@pytest.mark.parametrize("view", [None, (3, -5, 1)], ids=str)
def test_repeats_have_the_same_bits(view, device, seed):
    images = torch.randn(2, 3, 28, 42, device=device, requires_grad=True)
    positions, cu_seqlens = torch.randperm(6, dtype=torch.int32, device=device), cu_seqlens_of([2, 4], device)
    view = None if view is None else torch.tensor(view, device=device)
    weight, results = torch.randn(6, 588, device=device), []
    for _ in range(3):
        with poisoned_memory():
            patches, cells = gather_patches(images, positions, cu_seqlens, view, patch_size=14, backend="triton")
            results.append((patches, cells, torch.autograd.grad(patches, images, weight)[0]))
    for result in results[1:]:
        for first, again in zip(results[0], result, strict=True):
            assert torch.equal(first, again)


def test_definition_passes_gradcheck(seed):
    images = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    positions, cu_seqlens = torch.tensor([2, 1], dtype=torch.int32), cu_seqlens_of([2])
    for view in (None, torch.tensor([1, -1, 1])):
        assert torch.autograd.gradcheck(
            lambda x, view=view: gather_patches(x, positions, cu_seqlens, view, patch_size=2)[0], (images,)
        )


def test_operators_pass_opcheck(device, seed):
    images = torch.randn(2, 1, 4, 4, device=device, requires_grad=True)
    positions, cu_seqlens = torch.tensor([2, 1], dtype=torch.int32, device=device), cu_seqlens_of([1, 1], device)
    for view in (None, torch.tensor([1, -1, 1], device=device)):
        arguments = (images, positions, cu_seqlens, view, 2, 2, torch.float32)
        torch.library.opcheck(gather_patches_op, arguments)
        patches, _, inverse = gather_patches_op(*arguments)
        torch.library.opcheck(
            gather_patches_backward_op, (torch.randn_like(patches), inverse, view, 1, 2, 2, torch.float32)
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_the_same_numbers(backend, device, seed):
    images = torch.randn(2, 3, 8, 8, device=device, requires_grad=True)
    positions, cu_seqlens = torch.tensor([2, 1, 3], dtype=torch.int32, device=device), cu_seqlens_of([1, 2], device)
    view = torch.tensor([1, -1, 1], device=device)

    def function(x):
        patches, cells = gather_patches(x * 2, positions, cu_seqlens, view, patch_size=4, backend=backend)
        return patches * 3, cells

    out, cells = torch.compile(function, fullgraph=True, backend="aot_eager")(images)
    expected, expected_cells = function(images)
    assert torch.equal(out, expected)
    assert torch.equal(cells, expected_cells)
    grad, expected_grad = (torch.autograd.grad(x.square().sum(), images)[0] for x in (out, expected))
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, "8x8 pixels do not divide into patches of 5x5"),
        ({"patch_size": (4, 3)}, "4x3"),
        ({"images": torch.zeros(2, 8, 8)}, r"\(2, 8, 8\)"),
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "uint8"),
        ({"positions": torch.zeros(2, dtype=torch.int64)}, "int64"),
        ({"cu_seqlens": torch.zeros(2, dtype=torch.int32)}, r"\(2,\)"),
        ({"view": torch.zeros(2, dtype=torch.int32)}, r"\(2,\)"),
        ({"view": torch.zeros(3)}, "float32"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(changes, message):
    arguments = {
        "images": torch.zeros(2, 3, 8, 8),
        "positions": torch.zeros(2, dtype=torch.int32),
        "cu_seqlens": cu_seqlens_of([1, 1]),
        "patch_size": 4,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        gather_patches(**arguments)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("views", [None, (11, -29, 1), "each"], ids=str)
@pytest.mark.parametrize("patch", [(16, 16), (14, 14), (8, 32), (32, 4)], ids=str)
def test_gpu_patches_and_gradients_equal_unfolding(patch, views, dtype, device, seed):
    if views == "each":
        views = [
            tuple(v) for v in torch.cat([torch.randint(-300, 300, (9, 2)), torch.randint(0, 2, (9, 1))], 1).tolist()
        ]
    for backend in BACKENDS:
        assert_matches_unfold(9, 3, (14, 14), patch, views, [46] * 8 + [196], backend, dtype, device)


@pytest.mark.cuda
def test_replayed_cuda_graphs_read_the_view(device, seed):
    images = torch.randn(3, 3, 48, 64, device=device, requires_grad=True)
    positions = torch.cat([torch.randperm(12)[:n] for n in (5, 12, 1)]).int().to(device)
    cu_seqlens, view = cu_seqlens_of([5, 12, 1], device), torch.zeros(3, 3, dtype=torch.int32, device=device)
    weight = torch.randn(18, 768, device=device)

    def run(backend):
        patches, cells = gather_patches(images, positions, cu_seqlens, view, patch_size=16, backend=backend)
        return patches, cells, torch.autograd.grad(patches, images, weight)[0]

    run("triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run("triton")
    for _ in range(3):
        view.copy_(torch.randint(-99, 99, (3, 3)))
        view[:, 2] %= 2
        graph.replay()
        for ours, theirs in zip(replayed, run("torch"), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.cuda
def test_gpu_reads_the_view_without_synchronising(device, seed):
    images = torch.randn(4, 3, 32, 32, device=device, requires_grad=True)
    positions = torch.tensor([0, 3, 1, 2], dtype=torch.int32, device=device)
    cu_seqlens, view = cu_seqlens_of([1, 1, 1, 1], device), torch.tensor([3, -5, 1], device=device)
    for backend in BACKENDS:
        gather_patches(images, positions, cu_seqlens, view, patch_size=16, backend=backend)
        torch.cuda.set_sync_debug_mode("error")
        try:
            gather_patches(images, positions, cu_seqlens, view, patch_size=16, backend=backend)[0].sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
