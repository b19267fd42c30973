"""Attention with one query for each sequence: against its formula in float64, on both backends, and full attention."""

import sys
from itertools import product

import pytest
import torch
from kernel_cases import (
    assert_within_twice,
    canaries,
    cu_seqlens_of,
    poisoned_memory,
    twice,
    untouched,
    with_errors_elsewhere,
)
from smi_fast.kernels import attention, class_attention
from smi_fast.kernels.class_attention import (
    class_attention_backward_op,
    class_attention_op,
    launch_class_attention,
    launch_class_attention_backward,
)
from smi_fast.kernels.dispatch import override

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = ("", {"BN": 16, "num_warps": 4})  # a block of 16 tokens, so that short sequences have several
FORMS = {
    "by the table": {},
    "several blocks": {"class_attention_forward": SMALL, "class_attention_backward": SMALL},
}


def formula(q, kv, lengths, scale):
    """Sequence by sequence, in the dtype of q: out (B, H, D), attention (H, T)."""
    outs, rows = [], []
    for query, sequence in zip(q, kv.split(lengths), strict=True):
        k, v = sequence.permute(1, 2, 0, 3)  # (H, N, D) each
        p = (query[:, None] @ k.mT * scale).softmax(-1)  # (H, 1, N)
        outs.append((p @ v)[:, 0])
        rows.append(p[:, 0])
    return torch.stack(outs), torch.cat(rows, 1)


def run(q, kv, lengths, grad_out, backend=None, scale=None):
    q, kv = (x.detach().requires_grad_() for x in (q, kv))
    if backend is None:
        out, row = formula(q, kv, lengths, scale or q.shape[-1] ** -0.5)
    else:
        cu_seqlens = cu_seqlens_of(lengths, q.device)
        out, row = class_attention(q, kv, cu_seqlens, max(lengths), scale=scale, return_attention=True, backend=backend)
        assert not row.requires_grad
    grad_q, grad_kv = torch.autograd.grad(out, (q, kv), grad_out.to(out.dtype))
    return {"out": out.detach(), "attention": row.detach(), "grad_q": grad_q, "grad_kv": grad_kv}


def inputs(lengths, heads, head_dim, dtype, device):
    shapes = ((len(lengths), heads, head_dim), (sum(lengths), 2, heads, head_dim), (len(lengths), heads, head_dim))
    return (torch.randn(shape, device=device).to(dtype) for shape in shapes)


def check(lengths, heads, head_dim, dtype, device, scale=None):
    def draw():
        q, kv, grad_out = inputs(lengths, heads, head_dim, dtype, device)
        exact = run(q.double(), kv.double(), lengths, grad_out, scale=scale)
        return q, kv, grad_out, exact, [run(q, kv, lengths, grad_out, backend, scale) for backend in (None, "torch")]

    q, kv, grad_out, exact, plain = draw()
    with poisoned_memory():
        result = run(q, kv, lengths, grad_out, "triton", scale)
    assert_within_twice(result, with_errors_elsewhere(plain, exact, draw, 3), exact)
    return result


def matrix():
    """Every dtype and head dim; float16, which runs the code of bfloat16, in two of them where there is no GPU."""
    for dtype, head_dim in product(DTYPES, [8, 32, 48, 64, 72, 80, 88, 96, 128]):
        slow = dtype == torch.float16 and head_dim not in (48, 128)
        yield pytest.param(dtype, head_dim, marks=pytest.mark.cuda if slow else ())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "head_dim"), list(matrix()))
def test_triton_obeys_the_2x_rule(dtype, head_dim, form, device, seed):
    with override(FORMS[form]):
        check([1, 15, 16, 17, 47, 33], 2, head_dim, dtype, device)
        check([4] * 6, 3, head_dim, dtype, device, scale=0.4)  # many: a few gradients would measure chance


def test_lengths_from_1_to_4096_mix_in_one_batch(device, seed):
    check([197, 1, 4096, 47, 1000], 2, 16, torch.float32, device)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("lengths", [[7, 7], [3, 9, 1]], ids=str)
def test_equals_the_first_row_of_full_attention(lengths, backend, device, seed):
    qkv = torch.randn(sum(lengths), 3, 2, 16, device=device)
    cu_seqlens = cu_seqlens_of(lengths, device)
    full, full_rows = attention(qkv, cu_seqlens, max(lengths), return_class_attention=True, backend="torch")
    first = cu_seqlens[:-1].long()
    out, rows = class_attention(
        qkv[first, 0], qkv[:, 1:], cu_seqlens, max(lengths), return_attention=True, backend=backend
    )
    torch.testing.assert_close(out, full[first])
    torch.testing.assert_close(rows, full_rows)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_empty_sequence_gets_zero_and_disturbs_no_other(backend, form, device, seed):
    lengths = [3, 0, 20]
    q, kv, grad_out = inputs(lengths, 2, 16, torch.float32, device)
    with override(FORMS[form]):
        result = run(q, kv, lengths, grad_out, backend)
        others = run(q[[0, 2]], kv, [3, 20], grad_out[[0, 2]], backend)
    assert (result["out"][1] == 0).all()
    assert (result["grad_q"][1] == 0).all()
    torch.testing.assert_close(result["out"][[0, 2]], others["out"])
    torch.testing.assert_close(result["grad_q"][[0, 2]], others["grad_q"])
    torch.testing.assert_close(result["grad_kv"], others["grad_kv"])
    torch.testing.assert_close(result["attention"], others["attention"])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("batch", [0, 2])
def test_no_tokens_give_empty_results_and_gradients(batch, backend, device):
    q = torch.randn(batch, 2, 16, device=device, requires_grad=True)
    kv = torch.empty(0, 2, 2, 16, device=device, requires_grad=True)
    cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=device)
    out, row = class_attention(q, kv, cu_seqlens, 0, return_attention=True, backend=backend)
    assert row.shape == (2, 0)
    assert torch.equal(out, torch.zeros_like(q))
    out.sum().backward()
    assert kv.grad is None or kv.grad.shape == kv.shape
    assert torch.equal(q.grad, torch.zeros_like(q))


def test_definition_passes_gradcheck_in_float64(seed):
    for lengths in ([2, 2], [3, 1]):
        q, kv, _ = (x.requires_grad_() for x in inputs(lengths, 2, 8, torch.float64, "cpu"))
        assert torch.autograd.gradcheck(class_attention, (q, kv, cu_seqlens_of(lengths), max(lengths)))


def test_operators_pass_opcheck(device, seed):
    q, kv, grad_out = inputs([4, 2], 2, 16, torch.float32, device)
    cu_seqlens = cu_seqlens_of([4, 2], device)
    torch.library.opcheck(
        class_attention_op, (q.clone().requires_grad_(), kv.clone().requires_grad_(), cu_seqlens, 4, 0.25)
    )
    _, _, statistics = class_attention_op(q, kv, cu_seqlens, 4, 0.25)
    torch.library.opcheck(class_attention_backward_op, (grad_out, q, kv, statistics, cu_seqlens, 4, 0.25))


@pytest.mark.parametrize("form", FORMS)
def test_writes_stay_in_the_outputs_and_repeat_bit_for_bit(form, device, seed):
    module, lengths, results = sys.modules[class_attention.__module__], [31, 1, 0, 17], []
    q, kv, grad_out = inputs(lengths, 2, 24, torch.float32, device)
    cu_seqlens = cu_seqlens_of(lengths, device)
    with override(FORMS[form]):
        for _ in range(2):
            with canaries(module, "_fake_class_attention"):
                out, row, statistics = launch_class_attention(q, kv, cu_seqlens, 31, 0.2)
            with canaries(module, "_fake_class_attention_backward"):
                grads = launch_class_attention_backward(grad_out, q, kv, statistics, cu_seqlens, 31, 0.2)
            results.append((out, row, *grads))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="where kernels are interpreted: a GPU has no memory without pages"
)
def test_elements_beyond_two_to_the_31_are_addressed(tmp_path, seed):
    module, lengths, heads, head_dim = sys.modules[class_attention.__module__], [5, 17], 16, 8
    before = 2**31 // (heads - 1)
    tokens = before + sum(lengths)
    q, part, grad_out = inputs(lengths, heads, head_dim, torch.float32, "cpu")
    kv = untouched((tokens, 2, heads, head_dim), torch.float32, tmp_path)
    kv[before:] = part
    cu_seqlens = cu_seqlens_of(lengths) + before

    def lazily(original):
        def allocate(*args):
            outputs = original(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in args))
            return tuple(untouched(tuple(x.shape), x.dtype, tmp_path) for x in outputs)

        return allocate

    with pytest.MonkeyPatch.context() as patch:
        for fake in ("_fake_class_attention", "_fake_class_attention_backward"):
            patch.setattr(module, fake, lazily(getattr(module, fake)))
        out, row, statistics = launch_class_attention(q, kv, cu_seqlens, 17, 0.25)
        grad_q, grad_kv = launch_class_attention_backward(grad_out, q, kv, statistics, cu_seqlens, 17, 0.25)
    exact = run(q.double(), part.double(), lengths, grad_out, scale=0.25)
    result = {"out": out, "attention": row[:, before:], "grad_q": grad_q, "grad_kv": grad_kv[before:]}
    for name, reference in exact.items():
        torch.testing.assert_close(result[name].double(), reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("q", "kv", "dtype", "lengths", "max_seqlen", "message"),
    [
        ((1, 2, 12), (6, 2, 2, 12), torch.float32, [6], 6, "head_dim 12"),
        ((2, 16), (6, 2, 2, 16), torch.float32, [6], 6, r"\(2, 16\)"),
        ((1, 2, 16), (6, 3, 2, 16), torch.float32, [6], 6, r"\(6, 3, 2, 16\)"),
        ((1, 2, 16), (6, 2, 2, 16), torch.int32, [6], 6, "torch.int32"),
        ((2, 2, 16), (6, 2, 2, 16), torch.float32, [6], 6, r"not \(3,\)"),
        ((1, 2, 16), (6, 2, 2, 16), torch.float32, [6], 4097, "max_seqlen 4097"),
        ((1, 2, 16), (6, 2, 2, 16), torch.float32, [3], 3, "6 tokens"),
    ],
)
def test_bad_arguments_are_named(q, kv, dtype, lengths, max_seqlen, message):
    with pytest.raises(ValueError, match=message):
        class_attention(torch.zeros(q, dtype=dtype), torch.zeros(kv, dtype=dtype), cu_seqlens_of(lengths), max_seqlen)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 48, 64, 72, 128])
@pytest.mark.parametrize("lengths", [[47] * 8, [197] * 3, [577], [1, 63, 64, 65, 300], [4096, 5]], ids=str)
def test_gpu_obeys_the_2x_rule_and_repeats_bit_for_bit(lengths, head_dim, dtype, device, seed):
    first, second = twice(lambda: check(lengths, 3, head_dim, dtype, device))
    for name in first:
        assert torch.equal(first[name], second[name]), name
