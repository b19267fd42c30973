"""Gradients of any order, and the transforms of torch.func, are those of plain torch."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import cu_seqlens_of, naive_attention
from smi_fast.kernels import (
    attention,
    bias_gelu,
    class_attention,
    cross_entropy,
    embed_tokens,
    gather_patches,
    patch_entropy,
    residual_norm,
    residual_norm_of_first,
    select_tokens,
)
from smi_fast.kernels.rows import gather_rows
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import smi_fast
from smi_fast.models import cifar10_vit

BOTH = pytest.mark.parametrize("backend", ["torch", "triton", "auto"])
VIEW = torch.tensor([3, -5, 1])


def attend(qkv, backend, lengths=(5, 5)):
    return attention(qkv, cu_seqlens_of(lengths, qkv.device), max(lengths), backend=backend)


def attend_ragged(qkv, backend):
    return attend(qkv, backend, (3, 0, 7))


def attend_once(x, backend, lengths=(4, 6)):
    q, kv = x[:2, 0], x[:, 1:]
    return class_attention(q, kv, cu_seqlens_of(lengths, x.device), max(lengths), backend=backend)


def cut_out(images, backend):
    positions = torch.tensor([0, 3, 1], dtype=torch.int32, device=images.device)
    cu_seqlens = cu_seqlens_of([2, 1], images.device)
    return gather_patches(images, positions, cu_seqlens, VIEW.to(images.device), patch_size=4, backend=backend)[0]


def select(values, backend):
    attention = torch.arange(10.0, device=values.device).view(2, 5).sin() + 2
    return select_tokens(attention, values, k=3, num_prefix_tokens=1, backend=backend)[0]


def add_and_normalise(x, backend):
    weights = torch.linspace(-1, 2, 12, device=x.device).to(x.dtype).view(3, 4)
    gamma, weight, bias = weights
    return torch.cat(residual_norm(x[0], weight, bias, 0.1, update=x[1], gamma=gamma, backend=backend))


def normalise(x, backend):
    """Without an update, the stream is x itself."""
    return torch.cat(residual_norm(x, None, None, 0.1, backend=backend))


def normalise_of_first(x, backend):
    """The rows are weighted, so that no two of the three gradients that flow back are alike."""
    stream, normed, first = residual_norm_of_first(x, None, None, 0.1, first=2, backend=backend)
    return torch.cat((2 * stream, normed, 3 * first), 1)


def add_and_normalise_first(x, backend):
    weights = torch.linspace(-1, 2, 12, device=x.device).to(x.dtype).view(3, 4)
    options = {"first": 1, "update": x[1], "gamma": weights[0], "backend": backend}
    stream, normed, first = residual_norm_of_first(x[0], weights[1], weights[2], 0.1, **options)
    return torch.cat((2 * stream, normed, 3 * first), 1)


def embed(x, backend):
    embeddings = torch.linspace(-1, 2, 28, device=x.device).to(x.dtype).view(7, 4)
    positions = torch.tensor([4, 0, 2, 1, 3], dtype=torch.int32, device=x.device)
    cu_seqlens = cu_seqlens_of([2, 3], x.device)
    return embed_tokens(x, positions, cu_seqlens, 3, embeddings[:1], embeddings[1:], backend=backend)[0]


def classify(x, backend):
    return cross_entropy(x, torch.tensor([3, 0, 1], device=x.device), backend=backend)[None]


def compare_patches(x, backend):
    """Beside an image of opposite patches. Its similarities are the batch's bounds, which are detached."""
    x = torch.cat((x.new_tensor([1, -1, 1])[:, None, None].expand(3, *x.shape[1:]), x))
    positions = torch.tensor([0, 1, 2, -1, 0, 1, 2], dtype=torch.int32, device=x.device)
    cu_seqlens = cu_seqlens_of([3, 4], x.device)
    return patch_entropy(x, positions, cu_seqlens, 4, bandwidth=0.5, points=5, backend=backend)[1:]


def activate(x, backend):
    bias = torch.linspace(-1, 1, x.shape[-1], device=x.device).to(x.dtype)
    return bias_gelu(x, bias, approximate="tanh", backend=backend)


SHAPES = {
    attend: (10, 3, 2, 8),
    attend_ragged: (10, 3, 2, 8),
    attend_once: (10, 3, 2, 8),
    cut_out: (2, 3, 8, 8),
    select: (2, 6, 4),
    add_and_normalise: (2, 3, 4),
    normalise: (3, 4),
    normalise_of_first: (2, 3, 4),
    add_and_normalise_first: (2, 2, 3, 4),
    embed: (5, 4),
    classify: (3, 4),
    compare_patches: (4, 2, 4),
    activate: (3, 4),
}


def naive(operation, x: Tensor) -> Tensor:
    """The operation in plain torch: attention from its formula, and rows and pixels picked by plain indexing."""
    if operation is attend:
        return naive_attention(x, [5, 5], x.shape[-1] ** -0.5)[0]
    if operation is attend_ragged:
        return naive_attention(x, [3, 0, 7], x.shape[-1] ** -0.5)[0]
    if operation is attend_once:
        scores = [(q * k).sum(-1) * x.shape[-1] ** -0.5 for q, k in zip(x[:2, 0], x[:, 1].split([4, 6]), strict=True)]
        parts = zip(scores, x[:, 2].split([4, 6]), strict=True)
        return torch.stack([(s.softmax(0)[..., None] * v).sum(0) for s, v in parts])
    if operation in (add_and_normalise, normalise):
        gamma, weight, bias = torch.linspace(-1, 2, 12, device=x.device).to(x.dtype).view(3, 4)
        s = x[0] + gamma * x[1] if operation is add_and_normalise else x
        centred = s - s.mean(-1, keepdim=True)
        n = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt()
        return torch.cat((s, n * weight + bias if operation is add_and_normalise else n))
    if operation is normalise_of_first:
        n = naive(normalise, x)[x.shape[0] :]
        return torch.cat((2 * x[:, :2], n, 3 * n[:, :2]), 1)
    if operation is classify:
        return (x.exp().sum(1).log() - x[[0, 1, 2], [3, 0, 1]]).mean()[None]
    if operation is add_and_normalise_first:
        s, n = naive(add_and_normalise, x).chunk(2)
        return torch.cat((2 * s[:, :1], n, 3 * n[:, :1]), 1)
    if operation is embed:
        prefix, first, *others = torch.linspace(-1, 2, 28, device=x.device).to(x.dtype).view(7, 4)
        tokens = x + torch.stack([others[cell] for cell in (4, 0, 2, 1, 3)])
        return torch.cat([(prefix + first)[None], tokens[:2], (prefix + first)[None], tokens[2:]])
    if operation is compare_patches:
        a = x[1:].mean(1)
        n = a / a.square().sum(1, keepdim=True).sqrt()
        at = torch.linspace(-1, 1, 5, dtype=x.dtype, device=x.device)
        q = (-2 * ((n @ n.T)[..., None] - at) ** 2).exp().mean((0, 1)) / (torch.pi / 2) ** 0.5 + 1e-4
        return torch.trapezoid(-q * q.log(), at)[None]
    if operation is activate:
        z = x + torch.linspace(-1, 1, x.shape[-1], device=x.device).to(x.dtype)
        return z * torch.sigmoid((8 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))
    # Where each element comes from is found by sending numbered ones through.
    numbered = torch.arange(x.numel(), dtype=x.dtype, device=x.device).view(x.shape)
    return x.flatten()[operation(numbered, "torch").long()]


def second_order(operation, x: Tensor, vector: Tensor, nonlinear: bool) -> list[Tensor]:
    """A first-order gradient made by create_graph=True, and the gradient of its product with a vector."""
    y = operation(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
    (grad,) = torch.autograd.grad((weights * (y.pow(3) if nonlinear else y)).sum(), x, create_graph=True)
    # A linear operation with a linear loss has a constant gradient; adding x keeps a graph there.
    return [grad.detach(), torch.autograd.grad((grad * vector).sum() + 0 * x.sum(), x)[0]]


@pytest.mark.parametrize("nonlinear", [False, True], ids=["linear loss", "nonlinear loss"])
@BOTH
@pytest.mark.parametrize("operation", SHAPES)
def test_second_order_gradients_are_plain_torchs(operation, backend, nonlinear, device, seed):
    x, vector = torch.randn(2, *SHAPES[operation], dtype=torch.float64, device=device)
    exact = second_order(lambda x: naive(operation, x), x.requires_grad_(), vector, nonlinear)
    dtypes = {torch.float32: 1e-4} | ({torch.float64: 1e-10} if backend == "torch" else {})
    for dtype, tolerance in dtypes.items():
        start = x.detach().to(dtype).requires_grad_()
        found = second_order(lambda x: operation(x, backend), start, vector.to(dtype), nonlinear)
        for got, wanted in zip(found, exact, strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("operation", SHAPES)
def test_gradients_of_gradients_pass_gradgradcheck(operation, seed):
    x = torch.randn(SHAPES[operation], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: operation(x, "torch"), (x,))
    assert torch.autograd.gradgradcheck(lambda x: operation(x, "torch"), (x,))


@BOTH
def test_third_order_gradients_are_plain_torchs(backend, device, seed):
    def third(operation, x):
        grad = x
        for _ in range(3):
            y = operation(x).pow(2).sum() if grad is x else grad.pow(2).sum()
            (grad,) = torch.autograd.grad(y, x, create_graph=True)
        return grad.double()

    x = 0.3 * torch.randn(SHAPES[attend], dtype=torch.float64, device=device)
    exact = third(lambda x: naive(attend, x), x.clone().requires_grad_())
    found = third(lambda x: attend(x, backend), x.float().requires_grad_())
    assert (found - exact).abs().max() < 1e-4 * exact.abs().max()


def test_a_backward_call_without_inputs_leaves_gradients_that_have_gradients(device, seed):
    x = torch.randn(SHAPES[attend], dtype=torch.float64, device=device, requires_grad=True)
    first = torch.autograd.grad(naive(attend, x).sum(), x, create_graph=True)[0]
    with pytest.warns(UserWarning, match="reference cycle"):
        attend(x, "torch").sum().backward(create_graph=True)
    torch.testing.assert_close(x.grad, first)
    found, exact = (torch.autograd.grad(grad.pow(2).sum(), x)[0] for grad in (x.grad, first))
    x.grad = None  # of the reference cycle
    torch.testing.assert_close(found, exact)


@BOTH
def test_keys_that_depend_on_the_queries_get_their_own_gradient(backend, device, seed):
    """The second-order gradient of a saved tensor must not take in what flows on to another saved tensor."""

    def f(x, backend):
        q = x[:2, 0].tanh()
        kv = x[:, 1:] * q[0]
        return class_attention(q, kv, cu_seqlens_of([4, 6], x.device), 6, backend=backend)

    def plain(x):
        q = x[:2, 0].tanh()
        return naive(attend_once, torch.cat((torch.cat((q, x[2:, 0]))[:, None], x[:, 1:] * q[0]), 1))

    x, vector = torch.randn(2, *SHAPES[attend_once], dtype=torch.float64, device=device)
    exact = second_order(plain, x.clone().requires_grad_(), vector, True)
    found = second_order(lambda x: f(x, backend), x.float().requires_grad_(), vector.float(), True)
    for got, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(7,), (7, 2)], ids=str)
def test_second_order_gradients_of_picked_rows_are_right(shape, seed):
    x, rows = torch.randn(shape, dtype=torch.float64, requires_grad=True), torch.tensor([5, 0, 3])
    assert torch.autograd.gradgradcheck(lambda x: gather_rows(x, rows).pow(3), (x,))


@BOTH
@pytest.mark.parametrize("operation", SHAPES)
def test_every_transform_of_torch_func_is_right(operation, backend, device, seed):
    def f(x):
        return operation(x, backend).pow(2).flatten()[::3]

    xs = torch.randn(2, *SHAPES[operation], device=device)
    jacobians = torch.stack(
        [torch.autograd.functional.jacobian(lambda x: naive(operation, x).pow(2).flatten()[::3], x) for x in xs]
    )
    for found in (torch.func.vmap(torch.func.jacrev(f))(xs), torch.func.vmap(torch.func.jacfwd(f))(xs)):
        torch.testing.assert_close(found, jacobians, rtol=1e-4, atol=1e-4)
    values = torch.stack([naive(operation, x).pow(2).flatten()[::3] for x in xs])
    torch.testing.assert_close(torch.func.vmap(f)(xs), values, rtol=1e-4, atol=1e-4)
    with torch.autograd.forward_ad.dual_level():
        tangent = torch.autograd.forward_ad.unpack_dual(f(torch.autograd.forward_ad.make_dual(*xs))).tangent
    torch.testing.assert_close(tangent, jacobians[0].flatten(1) @ xs[1].flatten(), rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.parametrize("operation", SHAPES)
def test_a_vmapped_backward_pass_is_right(operation, backend, device, seed):
    x = torch.randn(SHAPES[operation], device=device, requires_grad=True)
    y, plain = operation(x, backend), naive(operation, x)
    vectors = torch.randn(3, *y.shape, device=device)
    exact = torch.stack([torch.autograd.grad(plain, x, vector, retain_graph=True)[0] for vector in vectors])
    found = torch.func.vmap(lambda vector: torch.autograd.grad(y, x, vector, retain_graph=True)[0])(vectors)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    found = torch.autograd.grad(y, x, vectors, is_grads_batched=True)[0]
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


@BOTH
def test_class_attention_rows_carry_no_tangent(backend, device, seed):
    qkv = torch.randn(2, *SHAPES[attend], device=device)
    cu_seqlens = cu_seqlens_of([5, 5], device)

    def rows(x):
        return (
            attention(x, cu_seqlens, 5, return_class_attention=True, backend=backend)[1],
            class_attention(x[:2, 0], x[:, 1:], cu_seqlens, 5, return_attention=True, backend=backend)[1],
        )

    found, tangents = torch.func.jvp(rows, (qkv[0],), (qkv[1],))
    torch.testing.assert_close(found, rows(qkv[0]))
    assert all(tangent.abs().max() == 0 for tangent in tangents)


def test_a_vmapped_selection_keeps_what_a_loop_keeps_and_refuses_nan(device, seed):
    def f(attention, values):
        return select_tokens(attention, values, k=3, num_prefix_tokens=1, backend="torch")[:3]

    attention, values = torch.rand(4, 2, 3, 7, device=device), torch.randn(4, 2, 8, 5, device=device)
    found = torch.func.vmap(f)(attention, values)
    for got, wanted in zip(found, zip(*map(f, attention, values), strict=True), strict=True):
        assert torch.equal(got, torch.stack(wanted))
    attention[1, 0, 0, 2] = torch.nan
    if device.type == "cpu":
        with pytest.raises(ValueError, match="NaN, which fails in row 1, 0"):
            torch.func.vmap(f)(attention, values)


def vit(**settings) -> nn.Module:
    """A small ViT whose classifier is not zero, so that its gradients are not either."""
    model = cifar10_vit(pretrained=False, depth=2, embed_dim=24, num_heads=3, **settings).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else parameter.shape[-1] ** -0.5)
    return model


def timms(model: nn.Module, images: Tensor, keep: list[Tensor] | None) -> Tensor:
    """The logits of timm's own blocks on the kept patches, image by image if their number differs."""
    if keep is None:
        return model(images)
    logits = []
    for image, kept in zip(images, keep, strict=True):
        patches = model.patch_embed(image[None])
        cls, patches = model._pos_embed(patches).split([1, patches.shape[1]], 1)
        logits.append(model.forward_head(model.norm(model.blocks(torch.cat((cls, patches[:, kept]), 1)))))
    return torch.cat(logits)


KEEP = {"dense": None, "kept": [[3, 60, 5, 17], [0, 1, 2, 9]], "ragged": [[7, 8, 40], [63]]}


def kept_patches(name: str, device: torch.device) -> list[Tensor] | None:
    return KEEP[name] and [torch.tensor(kept, device=device) for kept in KEEP[name]]


def hessian_vector_product(model, forward, images: Tensor) -> list[Tensor]:
    """Along a fixed vector, for the images."""
    images = images.clone().requires_grad_()
    loss = F.cross_entropy(forward(images), torch.tensor([3, 7], device=images.device))
    (grad,) = torch.autograd.grad(loss, images, create_graph=True)
    vector = torch.linspace(-1, 1, grad.numel(), dtype=grad.dtype, device=grad.device).view_as(grad)
    return [grad.detach(), *torch.autograd.grad(grad, images, vector)]


def gradient_matching(model, forward, images: Tensor) -> list[Tensor]:
    """1 - the cosine between the weights' gradients and a fixed vector, and its gradient for the images (Geiping et
    al., 2020, equation 4)."""
    images, weights = images.clone().requires_grad_(), list(model.parameters())
    loss = F.cross_entropy(forward(images), torch.tensor([3, 7], device=images.device))
    grads = torch.autograd.grad(loss, weights, create_graph=True)
    grad = torch.cat([x.flatten() for x in grads])
    vector = torch.linspace(-1, 1, len(grad), dtype=grad.dtype, device=grad.device)
    distance = 1 - F.cosine_similarity(grad, vector, dim=0)
    return [distance.detach(), *torch.autograd.grad(distance, images)]


def timms_own(product, model, images, keep=None) -> list[Tensor]:
    model.requires_grad_(product is gradient_matching)
    with sdpa_kernel(SDPBackend.MATH):  # the only one that has second-order gradients in torch
        return product(model, lambda x: timms(model, x, keep), images)


def relative_errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [((got - wanted).norm() / wanted.norm()).item() for got, wanted in zip(found, exact, strict=True)]


PRODUCTS = pytest.mark.parametrize("product", [hessian_vector_product, gradient_matching])


@PRODUCTS
@pytest.mark.parametrize("keep", KEEP)
def test_second_order_gradients_of_a_model_are_timms(product, keep, seed):
    model, images = vit().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    keep = kept_patches(keep, images.device)
    exact = timms_own(product, model, images, keep)
    fast = smi_fast.accelerate(model, backend="torch")
    assert max(relative_errors(product(model, lambda x: fast(x, keep=keep), images), exact)) < 1e-8


@PRODUCTS
@pytest.mark.parametrize(("backend", "side"), [("torch", 32), ("torch", 48), ("triton", 16)])
def test_second_order_gradients_of_a_float32_model_are_timms(product, backend, side, device, seed):
    """A CPU keeps the softmax of sequences of up to 128 tokens, and runs torch's fused attention for longer ones."""
    images = torch.randn(2, 3, side, side, device=device)
    model = vit(img_size=side).to(device)
    exact = timms_own(product, model.double(), images.double())
    fast = smi_fast.accelerate(model.float(), backend=backend, dtype=torch.float32)
    assert max(relative_errors(product(model, fast, images), exact)) < 1e-4


@PRODUCTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_order_gradients_in_autocast_and_of_packed_weights_are_as_exact_as_timms(product, dtype, seed):
    model, images = vit(), torch.randn(2, 3, 32, 32)
    exact = timms_own(product, model.double(), images.double())
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        *_, timm_error = relative_errors(timms_own(product, model.float(), images), exact)
    fast = smi_fast.accelerate(model, backend="torch", dtype=dtype)
    with fast.cast_weights() if product is hessian_vector_product else nullcontext():
        *_, error = relative_errors(product(model, fast, images), exact)
    assert error <= 2 * timm_error + torch.finfo(dtype).eps


def test_a_compiled_frozen_model_refuses_a_hessian_vector_product(seed):
    torch.compiler.reset()
    fast = smi_fast.accelerate(vit().requires_grad_(False), backend="torch", dtype=torch.float32)
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    loss = torch.compile(fast, backend="aot_eager", fullgraph=True)(images).square().sum()
    (grad,) = torch.autograd.grad(loss, images, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(grad, images, torch.randn_like(grad))


@pytest.mark.parametrize("keep", [None, [3, 60, 5, 17]], ids=["dense", "kept"])
def test_gradients_per_sample_by_vmap_are_those_of_a_loop(keep, seed):
    fast = smi_fast.accelerate(vit().double(), backend="torch")
    weights = {name: parameter.detach() for name, parameter in fast.named_parameters()}
    images, targets = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 5, 2])
    keep = None if keep is None else torch.tensor([keep])

    def loss(weights, image, target):
        logits = torch.func.functional_call(fast, weights, (image[None],), {"keep": keep})
        return F.cross_entropy(logits, target[None])

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, images, targets)
    for number in range(3):
        fast.zero_grad()
        F.cross_entropy(fast(images[number, None], keep=keep), targets[number, None]).backward()
        for name, parameter in fast.named_parameters():
            torch.testing.assert_close(found[name][number], parameter.grad, rtol=1e-9, atol=1e-12)


def test_the_jacobian_of_the_logits_by_torch_func_is_autograds(seed):
    fast = smi_fast.accelerate(vit().double().requires_grad_(False), backend="torch")
    image, tangent = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    exact = torch.autograd.functional.jacobian(lambda x: fast(x[None])[0], image)
    torch.testing.assert_close(torch.func.jacrev(lambda x: fast(x[None])[0])(image), exact)
    (_, found) = torch.func.jvp(lambda x: fast(x[None])[0], (image,), (tangent,))
    torch.testing.assert_close(found, exact.flatten(1) @ tangent.flatten())


@BOTH
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("operation", SHAPES)
def test_checkpointing_changes_no_gradient(operation, reentrant, backend, device, seed):
    x = torch.randn(SHAPES[operation], device=device, requires_grad=True)
    results = (operation(x, backend), checkpoint(operation, x, backend, use_reentrant=reentrant))
    grads = []
    for y in results:
        x.grad = None
        y.square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


class Undefined(torch.autograd.Function):
    """The identity, with an undefined gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@BOTH
@pytest.mark.parametrize("operation", SHAPES)
def test_an_undefined_gradient_passes(operation, backend, device, seed):
    """A user's function can make one, by cutting off a branch."""
    x = torch.randn(SHAPES[operation], device=device, requires_grad=True)
    (Undefined.apply(operation(x, backend)).sum() + 3 * x.sum()).backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 3))
