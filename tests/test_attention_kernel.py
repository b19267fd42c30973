"""Attention over packed sequences: against its formula in float64, on both backends."""

import pytest
import torch
from kernel_cases import assert_within_twice, cu_seqlens_of, naive_attention, poisoned_memory
from smi_fast.kernels import attention
from smi_fast.kernels.attention import attention_backward_op, attention_op, class_attention_op, tiles

HEAD_DIMS = [8, 16, 24, 32, 48, 64, 72, 80, 88, 96, 104, 112, 120, 128]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(qkv, lengths, grad_out, scale=None, backend=None):
    """Output, class row and gradient; of the formula where no backend is named."""
    qkv = qkv.detach().requires_grad_()
    if backend is None:
        out, row = naive_attention(qkv, lengths, scale or qkv.shape[-1] ** -0.5)
    else:
        cu_seqlens = cu_seqlens_of(lengths, qkv.device)
        out, row = attention(qkv, cu_seqlens, max(lengths), scale=scale, return_class_attention=True, backend=backend)
    (grad,) = torch.autograd.grad(out, qkv, grad_out.to(out.dtype))
    return {"out": out.detach(), "class_attention": row.detach(), "grad": grad}


def check(lengths, heads, head_dim, dtype, device, backend, scale=None):
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, device=device).to(dtype)
    grad_out = torch.randn(sum(lengths), heads, head_dim, device=device).to(dtype)
    exact = run(qkv.double(), lengths, grad_out, scale)
    plain = [run(qkv, lengths, grad_out, scale, backend) for backend in (None, "torch")]  # the formula, and SDPA
    with poisoned_memory():
        result = run(qkv, lengths, grad_out, scale, backend)
    assert_within_twice(result, plain, exact)
    return result


def awkward_lengths(head_dim, dtype):
    """One token, and one less than, exactly and one more than a tile, in one ragged batch."""
    sizes = {size for kernel in ("forward", "dq", "dkv") for size in tiles(kernel, head_dim, dtype)[:2]}
    return [1] + [size + step for size in sorted(sizes) for step in (-1, 0, 1)]


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.float32, head_dim) for head_dim in HEAD_DIMS]
    + [(torch.bfloat16, head_dim) for head_dim in (8, 32, 48, 64, 80, 128)]
    + [(torch.float16, head_dim) for head_dim in (24, 64, 72, 88, 96)],
    ids=str,
)
def test_triton_errs_at_most_twice_as_far_as_plain_torch(head_dim, dtype, device, seed):
    lengths = awkward_lengths(head_dim, dtype)
    check(lengths[: 4 if device.type == "cpu" else None], 1, head_dim, dtype, device, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_is_right_over_several_tiles_and_heads(dtype, device, seed):
    check([47, 130, 1], 3, 64, dtype, device, "triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("lengths", [[5, 5, 5], [7, 1, 3], [4, 0, 6], [0, 1], [9]], ids=str)
def test_uniform_ragged_and_empty_sequences_follow_the_formula(lengths, backend, device, seed):
    check(lengths, 2, 16, torch.float32, device, backend, scale=0.37)


@pytest.mark.parametrize("backend", ["torch", "triton"])
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


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_class_attention_sums_to_one_in_each_sequence_and_has_no_gradient(backend, device, seed):
    lengths = [6, 1, 40]
    qkv = torch.randn(sum(lengths), 3, 2, 32, device=device, requires_grad=True)
    _, row = attention(qkv, cu_seqlens_of(lengths, device), 40, return_class_attention=True, backend=backend)
    assert row.dtype == torch.float32
    assert not row.requires_grad
    for part in row.split(lengths):
        torch.testing.assert_close(part.sum().item(), 1.0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strides_of_the_projection_and_of_the_gradient_do_not_matter(backend, device, seed):
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
    total = torch.autograd.grad(attention(plain.requires_grad_(), cu_seqlens, 9, backend=backend).sum(), plain)[0]
    ones = run(plain, lengths, torch.ones_like(grad_out), backend=backend)
    torch.testing.assert_close(total, ones["grad"])  # sum() hands back a gradient of stride 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("batch", [0, 2])
def test_no_tokens_give_empty_results_and_gradients(batch, backend, device):
    qkv = torch.empty(0, 3, 2, 16, device=device, requires_grad=True)
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=device)
    out, row = attention(qkv, cu_seqlens, 0, return_class_attention=True, backend=backend)
    assert out.shape == (0, 2, 16)
    assert row.shape == (0,)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


def test_definition_passes_gradcheck_in_float64(seed):
    for lengths in ([2, 2], [3, 1]):
        qkv = torch.randn(4, 3, 2, 8, dtype=torch.float64, requires_grad=True)
        cu_seqlens, max_seqlen = cu_seqlens_of(lengths), max(lengths)
        assert torch.autograd.gradcheck(attention, (qkv, cu_seqlens, max_seqlen))


def test_operators_pass_opcheck(device, seed):
    qkv = torch.randn(6, 3, 2, 16, device=device, requires_grad=True)
    cu_seqlens = cu_seqlens_of([4, 2], device)
    torch.library.opcheck(attention_op, (qkv, cu_seqlens, 4, 0.25))
    out, statistics = (x.detach() for x in attention_op(qkv, cu_seqlens, 4, 0.25))
    torch.library.opcheck(class_attention_op, (qkv.detach(), statistics, cu_seqlens, 4, 0.25))
    torch.library.opcheck(
        attention_backward_op, (torch.randn_like(out), qkv.detach(), out, statistics, cu_seqlens, 4, 0.25)
    )


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
def test_gpu_matrix_errs_at_most_twice_as_far_and_repeats_bit_for_bit(lengths, head_dim, dtype, device, seed):
    state = torch.random.get_rng_state(), torch.cuda.get_rng_state()
    first = check(lengths, 3, head_dim, dtype, device, "triton")
    torch.random.set_rng_state(state[0])
    torch.cuda.set_rng_state(state[1])
    second = check(lengths, 3, head_dim, dtype, device, "triton")
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
