"""Attention over packed sequences: against its formula in float64, on both backends."""

import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import (
    assert_within_twice,
    canaries,
    cu_seqlens_of,
    naive_attention,
    poisoned_memory,
    twice,
    untouched,
    with_errors_elsewhere,
)
from smi_fast.kernels import attention
from smi_fast.kernels.attention import (
    attention_backward_op,
    attention_op,
    attention_reference,
    class_attention_reference,
    launch_attention,
    launch_attention_backward,
)
from smi_fast.kernels.cpu import suits_cpp
from smi_fast.kernels.dispatch import override

HEAD_DIMS = [8, 16, 24, 32, 48, 64, 72, 80, 88, 96, 104, 112, 120, 128]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Every form of both passes, on tiles small enough that a short sequence has several; and how long it may be.
WARPS = {"num_warps": 4}
FORWARD = {
    "tile": (("tile", {"BN": 32, **WARPS}), 32),
    "blocks": (("blocks", {"BM": 32, "BN": 16, **WARPS}), 4096),
}
BACKWARD = {
    "tile": (("tile", {"BN": 32, **WARPS}), 32),
    "rows": (("rows", {"BM": 64, "BN": 16, "CHANNELS_FIRST": False, **WARPS}), 64),
    "rows, channels first": (("rows", {"BM": 64, "BN": 16, "CHANNELS_FIRST": True, **WARPS}), 64),
    "blocks": (
        ("blocks", {"dq": {"BM": 32, "BN": 16, **WARPS}, "dkv": {"BM": 16, "BN": 32, **WARPS}}),
        4096,
    ),
}


PLAIN = (None, "sdpa")
MAGNITUDES = (1 / 4, 1, 4, 16)  # queries and keys are multiplied by one of these, and scores by its square


def run(qkv, lengths, grad_out, scale=None, backend=None):
    """Output, class row and gradient; of the formula where no backend is named, and of SDPA for the backend "sdpa"."""
    qkv = qkv.detach().requires_grad_()
    cu_seqlens = cu_seqlens_of(lengths, qkv.device)
    if backend is None:
        out, row = naive_attention(qkv, lengths, scale or qkv.shape[-1] ** -0.5)
    elif backend == "sdpa":
        arguments = qkv, cu_seqlens, max(lengths), scale or qkv.shape[-1] ** -0.5
        out, row = attention_reference(*arguments), class_attention_reference(*arguments)
    else:
        out, row = attention(qkv, cu_seqlens, max(lengths), scale=scale, return_class_attention=True, backend=backend)
    (grad,) = torch.autograd.grad(out, qkv, grad_out.to(out.dtype))
    return {"out": out.detach(), "class_attention": row.detach(), "grad": grad}


def check(lengths, heads, head_dim, dtype, device, backend, scale=None, magnitude=1.0, draws=1):
    """The 2x rule for queries and keys of a standard deviation."""

    def draw():
        qkv = torch.randn(sum(lengths), 3, heads, head_dim, device=device)
        qkv[:, :2] *= magnitude
        qkv, grad_out = qkv.to(dtype), torch.randn(sum(lengths), heads, head_dim, device=device).to(dtype)
        exact = run(qkv.double(), lengths, grad_out, scale)
        return qkv, grad_out, exact, [run(qkv, lengths, grad_out, scale, plain_form) for plain_form in PLAIN]

    qkv, grad_out, exact, plain = draw()
    plain = with_errors_elsewhere(plain, exact, draw, 8 if magnitude > 1 else draws)
    with poisoned_memory():
        result = run(qkv, lengths, grad_out, scale, backend)
    assert_within_twice(result, plain, exact)
    return result


def matrix():
    """Every dtype, head dim and size of a tile; what is slow where kernels are interpreted, on a GPU only."""
    large = {
        (torch.float32, 32), (torch.bfloat16, 48), (torch.float32, 64), (torch.bfloat16, 64), (torch.float16, 64),
        (torch.bfloat16, 80), (torch.float16, 128),
    }  # fmt: skip
    for dtype, head_dim, size in product(DTYPES, HEAD_DIMS, (16, 32, 64, 128, 256)):
        slow = size > (128 if (dtype, head_dim) in large else 32) and (dtype, head_dim) != (torch.bfloat16, 64)
        magnitude = MAGNITUDES[(HEAD_DIMS.index(head_dim) + size.bit_length()) % 4]
        yield pytest.param(dtype, head_dim, size, magnitude, marks=pytest.mark.cuda if slow else ())


@pytest.mark.parametrize(("dtype", "head_dim", "size", "magnitude"), list(matrix()))
def test_triton_obeys_the_2x_rule(dtype, head_dim, size, magnitude, device, seed):
    """One token, and one less than, exactly and one more than the sizes of tiles, in what the table chooses."""
    check([1, size - 1, size], 1, head_dim, dtype, device, "triton", magnitude=magnitude)
    check([size + 1, 2], 1, head_dim, dtype, device, "triton")


@pytest.mark.parametrize(("forward", "backward"), list(product(FORWARD, BACKWARD)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_form_obeys_the_2x_rule(dtype, forward, backward, device, seed):
    (forward, longest), (backward, longest_backward) = FORWARD[forward], BACKWARD[backward]
    longest = min(longest, longest_backward, 100)
    cases = list(zip((64, 16, 40, 24), MAGNITUDES, strict=True))
    with override({"attention_forward": forward, "attention_backward": backward}):
        # Interpreted kernels are slow: one fresh case of the four, in each form and dtype.
        for head_dim, magnitude in cases if device.type == "cuda" else [cases[seed % 4]]:
            lengths = [1, 15, 16, 17, longest - 1, longest]
            check(lengths, 2, head_dim, dtype, device, "triton", magnitude=magnitude)


@pytest.mark.parametrize("form", FORWARD)
def test_a_class_row_of_large_scores_sums_to_one(form, device, seed):
    """Its scores, maximum and total must be rounded alike: large scores differ by more than a probability may."""
    choice, longest = FORWARD[form]
    lengths = [min(longest, 97), 5, 17]
    qkv = 16 * torch.randn(sum(lengths), 3, 4, 64, device=device)
    with override({"attention_forward": choice}):
        _, row, _ = launch_attention(qkv, cu_seqlens_of(lengths, device), max(lengths), 0.125, True, True)
    for part in row.split(lengths, dim=1):
        torch.testing.assert_close(part.sum(1), torch.ones(4, device=device), rtol=0, atol=2e-6)


def test_lengths_from_1_to_4096_mix_in_one_batch(device, seed):
    large = {"BM": 256, "BN": 256, **WARPS} if device.type == "cpu" else {"BM": 64, "BN": 64, **WARPS}
    blocks = {
        "attention_forward": ("blocks", large),
        "attention_backward": ("blocks", {"dq": large, "dkv": large}),
    }
    with override(blocks):
        check([197, 1, 4096, 47, 1000, 0, 2], 1, 16, torch.float32, device, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_is_right_over_several_tiles_and_heads(dtype, device, seed):
    check([47, 130, 1], 3, 64, dtype, device, "triton")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    ("batch", "length", "head_dim"), [(1, 1, 8), (1, 3, 64), (2, 47, 64), (3, 67, 40), (2, 197, 64)]
)
def test_short_sequences_on_a_cpu_obey_the_2x_rule(dtype, batch, length, head_dim, seed):
    """Equally long ones, shorter and longer than those whose softmax is kept for the backward pass."""
    check([length] * batch, 3, head_dim, dtype, "cpu", "torch")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_cpp_obeys_the_2x_rule(dtype, head_dim, seed, monkeypatch):
    monkeypatch.setattr(sys.modules[attention.__module__], "attention_suits_cpp", lambda qkv, *_: suits_cpp(qkv))
    magnitude = MAGNITUDES[HEAD_DIMS.index(head_dim) % 4]
    check([1, 15, 16, 17, 0, 47, 64], 2, head_dim, dtype, "cpu", "auto", magnitude=magnitude, draws=8)
    check([197, 197], 3, head_dim, dtype, "cpu", "auto", draws=8)


def test_gradients_on_a_cpu_are_right_for_scores_of_any_size(seed):
    """The scores are tens of thousands and differ by 0 or by 1000 and more, so that float32 gives the exact softmax."""
    qkv, grad_out = torch.randn(47, 3, 2, 16), torch.randn(47, 2, 16)
    qkv[:, :2] = 64 * torch.randint(-3, 4, (47, 2, 2, 16))
    exact = run(qkv.double(), [17, 30], grad_out, 0.3)["grad"]
    error = (run(qkv, [17, 30], grad_out, 0.3, "auto")["grad"] - exact).abs().max()
    assert error <= 1e-5 * qkv.abs().max()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_query_that_is_nan_reaches_its_own_row_only(dtype, seed):
    qkv = torch.randn(20, 3, 2, 16).to(dtype)
    qkv[3, 0, 1] = torch.nan
    out = attention(qkv, cu_seqlens_of([12, 8]), 12)
    assert out[3, 1].isnan().all()
    out[3, 1] = 0
    assert out.isfinite().all()


@pytest.mark.parametrize("lengths", [(150, 150), (150, 0, 131)], ids=str)
def test_long_and_ragged_sequences_on_a_cpu_have_the_bits_of_torchs_own_attention(lengths, seed):
    qkv = torch.randn(sum(lengths), 3, 2, 16, requires_grad=True)
    padded = torch.nn.utils.rnn.pad_sequence(qkv.split(lengths), batch_first=True)  # (B, N, 3, H, D)
    taken = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    mask = None if taken.all() else taken[:, None, None]
    theirs = F.scaled_dot_product_attention(*padded.permute(2, 0, 3, 1, 4), mask, scale=0.3).transpose(1, 2)[taken]
    ours = attention(qkv, cu_seqlens_of(lengths), max(lengths), scale=0.3, backend="torch")
    grad = torch.randn_like(ours)
    assert torch.equal(ours, theirs)
    assert torch.equal(*(torch.autograd.grad(out, qkv, grad)[0] for out in (ours, theirs)))


def test_long_sequences_on_a_cpu_keep_no_softmax(seed):
    """Memory for the backward pass grows with N and not with N^2."""
    batch, length, heads, kept = 2, 600, 2, []
    qkv = torch.randn(batch * length, 3, heads, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        attention(qkv, cu_seqlens_of([length] * batch), length, backend="torch")
    assert kept
    assert max(kept) < batch * heads * length**2


@pytest.mark.parametrize("backend", ["torch", "triton", "auto"])
@pytest.mark.parametrize("lengths", [[5, 5, 5], [7, 1, 3], [4, 0, 6], [0, 1], [9]], ids=str)
def test_uniform_ragged_and_empty_sequences_follow_the_formula(lengths, backend, device, seed):
    check(lengths, 2, 16, torch.float32, device, backend, scale=0.37)


@pytest.mark.parametrize("backend", ["torch", "triton", "auto"])
def test_large_scores_neither_overflow_nor_leak_into_masked_keys(backend, device, seed):
    """With scores far below zero, a masked key's score of 0 would take all of the softmax."""
    lengths = [5, 17, 33]
    qkv = torch.randn(sum(lengths), 3, 1, 16, device=device).abs()
    qkv[:, 1] *= -100  # q k^T is about -1000
    grad_out = torch.randn(sum(lengths), 1, 16, device=device)
    result, exact = run(qkv, lengths, grad_out, 1.0, backend), run(qkv.double(), lengths, grad_out, 1.0)
    for name, reference in exact.items():
        torch.testing.assert_close(
            result[name].double(), reference, rtol=2e-2, atol=2e-2 * reference.abs().max().item()
        )


@pytest.mark.parametrize("backend", ["torch", "triton", "auto"])
def test_class_attention_sums_to_one_and_has_no_gradient(backend, device, seed):
    lengths = [6, 1, 40]
    qkv = torch.randn(sum(lengths), 3, 2, 32, device=device, requires_grad=True)
    _, row = attention(qkv, cu_seqlens_of(lengths, device), 40, return_class_attention=True, backend=backend)
    assert row.dtype == torch.float32
    assert not row.requires_grad
    for part in row.split(lengths, dim=1):
        torch.testing.assert_close(part.sum(1), torch.ones(2, device=device), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton", "auto"])
def test_strides_do_not_matter(backend, device, seed):
    lengths, cu_seqlens = [5, 9], cu_seqlens_of([5, 9], device)
    plain = torch.randn(14, 3, 2, 16, device=device)
    grad_out = torch.randn(14, 2, 16, device=device)
    expected = run(plain, lengths, grad_out, backend=backend)
    apart = torch.randn(3, 2, 14, 32, device=device)[..., :16].permute(2, 0, 1, 3).copy_(plain)
    scattered = torch.randn(2, 16, 14, device=device).permute(2, 0, 1).copy_(grad_out)
    assert apart.stride() != plain.stride()
    assert scattered.stride() != grad_out.stride()
    result = run(apart, lengths, scattered, backend=backend)
    for name in expected:
        torch.testing.assert_close(result[name], expected[name])
    assert attention(apart, cu_seqlens, 9, backend=backend).is_contiguous()
    assert attention(plain, cu_seqlens_of([14], device), 14, backend=backend).is_contiguous()
    total = torch.autograd.grad(attention(plain.requires_grad_(), cu_seqlens, 9, backend=backend).sum(), plain)[0]
    ones = run(plain, lengths, torch.ones_like(grad_out), backend=backend)
    torch.testing.assert_close(total, ones["grad"])  # sum() hands back a gradient of stride 0


@pytest.mark.parametrize("backend", ["torch", "triton", "auto"])
@pytest.mark.parametrize("batch", [0, 2])
def test_no_tokens_give_empty_results_and_gradients(batch, backend, device):
    qkv = torch.empty(0, 3, 2, 16, device=device, requires_grad=True)
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=device)
    out, row = attention(qkv, cu_seqlens, 0, return_class_attention=True, backend=backend)
    assert out.shape == (0, 2, 16)
    assert row.shape == (2, 0)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


def test_definition_passes_gradcheck_in_float64(seed):
    for lengths in ([2, 2], [3, 1]):
        qkv = torch.randn(4, 3, 2, 8, dtype=torch.float64, requires_grad=True)
        cu_seqlens, max_seqlen = cu_seqlens_of(lengths), max(lengths)
        assert torch.autograd.gradcheck(attention, (qkv, cu_seqlens, max_seqlen))


@pytest.mark.parametrize("backward", BACKWARD)
def test_operators_pass_opcheck(backward, device, seed):
    qkv = torch.randn(6, 3, 2, 16, device=device, requires_grad=True)
    cu_seqlens = cu_seqlens_of([4, 2], device)
    with override({"attention_backward": BACKWARD[backward][0]}):
        torch.library.opcheck(attention_op, (qkv, cu_seqlens, 4, 0.25, True, backward != "tile"))
        out, _, statistics = (x.detach() for x in attention_op(qkv, cu_seqlens, 4, 0.25, False, True))
        kept = (None, None) if backward == "tile" else (out, statistics)
        grad_out = torch.randn_like(out)
        torch.library.opcheck(attention_backward_op, (grad_out, qkv.detach(), *kept, cu_seqlens, 4, 0.25))


@pytest.mark.parametrize(("forward", "backward"), list(product(FORWARD, BACKWARD)))
def test_writes_stay_in_the_outputs_and_repeat_bit_for_bit(forward, backward, device, seed):
    module, lengths = sys.modules[attention.__module__], [31, 1, 0, 17]
    cu_seqlens = cu_seqlens_of(lengths, device)
    qkv, grad_out = (torch.randn(49, *shape, device=device) for shape in ((3, 2, 24), (2, 24)))
    results = []
    with override({"attention_forward": FORWARD[forward][0], "attention_backward": BACKWARD[backward][0]}):
        for _ in range(2):
            with canaries(module, "_fake_attention"):
                out, row, statistics = launch_attention(qkv, cu_seqlens, 31, 0.2, True, backward != "tile")
            kept = (None, None) if backward == "tile" else (out, statistics)
            with canaries(module, "_fake_attention_backward"):
                grad = launch_attention_backward(grad_out, qkv, *kept, cu_seqlens, 31, 0.2)
            results.append((out, row, grad))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="where kernels are interpreted: a GPU has no memory without pages"
)
@pytest.mark.parametrize(("forward", "backward"), [("tile", "tile"), ("blocks", "rows"), ("blocks", "blocks")])
def test_elements_beyond_two_to_the_31_are_addressed(forward, backward, tmp_path, seed):
    """The last two sequences of a batch with 2^31 elements before them even in the class attention (H, T)."""
    module, lengths, heads, head_dim = sys.modules[attention.__module__], [5, 17], 16, 8
    before = 2**31 // (heads - 1)
    tokens = before + sum(lengths)
    qkv = untouched((tokens, 3, heads, head_dim), torch.float32, tmp_path)
    grad_out = untouched((tokens, heads, head_dim), torch.float32, tmp_path)
    qkv[before:] = torch.randn(sum(lengths), 3, heads, head_dim)
    grad_out[before:] = torch.randn(sum(lengths), heads, head_dim)
    cu_seqlens = cu_seqlens_of(lengths) + before

    def lazily(original):
        def allocate(*args):
            outputs = original(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in args))
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            outputs = tuple(untouched(tuple(x.shape), x.dtype, tmp_path) for x in outputs)
            return outputs if len(outputs) > 1 else outputs[0]

        return allocate

    with pytest.MonkeyPatch.context() as patch:
        for fake in ("_fake_attention", "_fake_attention_backward"):
            patch.setattr(module, fake, lazily(getattr(module, fake)))
        patch.setattr(torch, "empty_like", lambda x, **options: untouched(tuple(x.shape), x.dtype, tmp_path))
        with override({"attention_forward": FORWARD[forward][0], "attention_backward": BACKWARD[backward][0]}):
            out, row, statistics = launch_attention(qkv, cu_seqlens, 17, 0.25, True, backward != "tile")
            kept = (None, None) if backward == "tile" else (out, statistics)
            grad = launch_attention_backward(grad_out, qkv, *kept, cu_seqlens, 17, 0.25)
    result = {"out": out[before:], "class_attention": row[:, before:], "grad": grad[before:]}
    exact = run(qkv[before:].double(), lengths, grad_out[before:], 0.25)
    for name, reference in exact.items():
        torch.testing.assert_close(result[name].double(), reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_without_graph_breaks_to_the_same_numbers(backend, device, seed):
    cu_seqlens = cu_seqlens_of([4, 2], device)
    qkv = torch.randn(6, 3, 2, 16, device=device, requires_grad=True)

    def function(x):
        out, row = attention(x * 2, cu_seqlens, 4, return_class_attention=True, backend=backend)
        return out * 3, row

    out, row = torch.compile(function, fullgraph=True, backend="aot_eager")(qkv)
    expected_out, expected_row = function(qkv)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(row, expected_row)
    grad, expected = (torch.autograd.grad(x.square().sum(), qkv)[0] for x in (out, expected_out))
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "lengths", "max_seqlen", "message"),
    [
        ((6, 3, 2, 12), torch.float32, [6], 6, "head_dim 12"),
        ((6, 3, 2, 136), torch.float32, [6], 6, "head_dim 136"),
        ((6, 2, 2, 16), torch.float32, [6], 6, r"\(6, 2, 2, 16\)"),
        ((6, 3, 2, 16), torch.int32, [6], 6, "torch.int32"),
        ((6, 3, 2, 16), torch.float32, [6], 4097, "max_seqlen 4097"),
        ((6, 3, 2, 16), torch.float32, [3], 3, "6 tokens"),
    ],
)
def test_bad_arguments_are_named(shape, dtype, lengths, max_seqlen, message):
    with pytest.raises(ValueError, match=message):
        attention(torch.zeros(shape, dtype=dtype), cu_seqlens_of(lengths), max_seqlen)


def test_float64_runs_in_plain_torch_only(device):
    qkv, cu_seqlens = torch.randn(4, 3, 1, 8, dtype=torch.float64, device=device), cu_seqlens_of([4], device)
    assert attention(qkv, cu_seqlens, 4).dtype == torch.float64
    with pytest.raises(ValueError, match="float64"):
        attention(qkv, cu_seqlens, 4, backend="triton")
    with pytest.raises(ValueError, match="'cuda'"):
        attention(qkv, cu_seqlens, 4, backend="cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("lengths", [[47] * 8, [197] * 3, [577], [1, 63, 64, 65, 0, 300], [4096, 5]], ids=str)
def test_gpu_obeys_the_2x_rule_and_repeats_bit_for_bit(lengths, head_dim, dtype, device, seed):
    first, second = twice(lambda: check(lengths, 3, head_dim, dtype, device, "triton"))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.cuda
def test_gpu_does_not_synchronise_with_the_host(device, seed):
    cu_seqlens = cu_seqlens_of([47, 3], device)
    for backend in ("torch", "triton"):
        for max_seqlen in (47, 50):
            qkv = torch.randn(50, 3, 2, 64, device=device, requires_grad=True)
            attention(qkv, cu_seqlens, max_seqlen, return_class_attention=True, backend=backend)[0].sum().backward()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                attention(qkv, cu_seqlens, max_seqlen, return_class_attention=True, backend=backend)[0].sum().backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_gpu_addresses_more_than_two_to_the_31_elements(device, seed):
    lengths = [4096] * 180  # 180 * 4096 tokens of 3 * 8 * 128 channels
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    qkv = torch.randn(sum(lengths), 3, 8, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
    assert qkv.numel() > 2**31
    out = attention(qkv, cu_seqlens_of(lengths, device), 4096, backend="triton")
    grad_out = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, qkv, grad_out)
    last = run(qkv[-4096:], [4096], grad_out[-4096:], backend="triton")
    assert torch.equal(out[-4096:], last["out"])
    assert torch.equal(grad[-4096:], last["grad"])
