"""timm's plain Block in a straight line: what decides that a block is plain is looked up once, and compared afterwards.

A block has twenty modules, each of which may get a hook or be replaced at any time. To ask `obstacle` about each of
them takes the host longer than to launch the block's kernels. `PlainBlock` holds what decided that a block is plain, so
that one comparison says whether it still is. Within its straight line the operations believe their arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import chain, repeat
from operator import attrgetter, contains, is_
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from timm.layers import GELU as TimmGELU
from timm.layers import Attention, DropPath, GELUTanh, LayerScale, QuickGELU
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from smi_fast import kernels
from smi_fast.backbones.attend import Attend, normalise_qk
from smi_fast.backbones.casting import autocast_dtype, frozen_weights
from smi_fast.backbones.importance import softmax_scale
from smi_fast.backbones.stream import LAYER_NORMS, PATHS, SCALES, Stream
from smi_fast.backbones.support import DROPS, LINEAR, MLP, NORMS, obstacle
from smi_fast.kernels.attention import MAX_HEAD_DIM, MAX_SEQLEN, believed_attention
from smi_fast.kernels.backend import FLOATS
from smi_fast.kernels.gradients import transformed
from smi_fast.kernels.linear import linear
from smi_fast.kernels.mlp import FORMS, believed_bias_gelu
from smi_fast.kernels.norm import MAX_CHANNELS, believed_residual_norm
from smi_fast.kernels.operators import PLAIN, traced

GELUS = {nn.GELU: "none", TimmGELU: "none", GELUTanh: "tanh", QuickGELU: "quick"}
IDENTITY = (nn.Identity,)
PARTS = {  # the modules of a plain block and their classes
    "": (Block,),
    "norm1": LAYER_NORMS,
    "attn": (Attention,),
    "attn.qkv": LINEAR,
    "attn.q_norm": NORMS,
    "attn.k_norm": NORMS,
    "attn.attn_drop": DROPS,
    "attn.norm": IDENTITY,
    "attn.proj": LINEAR,
    "attn.proj_drop": DROPS,
    "ls1": SCALES,
    "drop_path1": PATHS,
    "norm2": LAYER_NORMS,
    "mlp": MLP,
    "mlp.fc1": LINEAR,
    "mlp.act": tuple(GELUS),
    "mlp.drop1": DROPS,
    "mlp.norm": IDENTITY,
    "mlp.fc2": LINEAR,
    "mlp.drop2": DROPS,
    "ls2": SCALES,
    "drop_path2": PATHS,
}
READ = (nn.Linear, *LAYER_NORMS, LayerScale)  # modules whose parameters are read
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Operations(NamedTuple):
    """What surrounds the products of a block.

    Attributes:
        norm: (x, update, gamma, weight, bias, eps, dtype) -> the stream and its norm, as `kernels.residual_norm`. With
            a further argument `first`, as `kernels.residual_norm_of_first`.
        attention: (qkv, cu_seqlens, max_seqlen, scale) -> as `kernels.attention`, but (T, C).
        hidden: (x, weight, bias, act) -> act(x weight^T + bias).
    """

    norm: Callable[..., tuple[Tensor, Tensor]]
    attention: Callable[..., Tensor]
    hidden: Callable[..., Tensor]


def _fused_hidden(x: Tensor, weight: Tensor, bias: Tensor | None, act: nn.Module) -> Tensor:
    return believed_bias_gelu(linear(x, weight), bias, gelu_form(act))


BELIEVED = Operations(believed_residual_norm, believed_attention, _fused_hidden)


@lru_cache
def _checked(backend: str) -> Operations:
    """Return the operations that check their arguments, where `backend` is plain torch."""

    def norm(x, update, gamma, weight, bias, eps, dtype, first=None):
        options = {"update": update, "gamma": gamma, "dtype": dtype, "backend": backend}
        if first is None:
            return kernels.residual_norm(x, weight, bias, eps, **options)
        return kernels.residual_norm_of_first(x, weight, bias, eps, first=first, **options)

    def attention(qkv, cu_seqlens, max_seqlen, scale):
        return kernels.attention(qkv, cu_seqlens, max_seqlen, scale=scale, backend=backend).flatten(1)

    def hidden(x, weight, bias, act):
        return act(linear(x, weight, bias))

    return Operations(norm, attention, hidden)


def gelu_form(act: nn.Module) -> str:
    """Return the `approximate` of `bias_gelu` that stands for a plain GELU."""
    return act.approximate if type(act) is nn.GELU else GELUS[type(act)]


def operations_on(stream: Stream, attend: Attend) -> Operations | None:
    """Return the operations of a straight line on these tokens, or None if it does not serve them: while something
    traces or transforms the operations, and where the operations would refuse the tokens."""
    x, update, _ = stream
    shape = attend.tokens.positions.shape[0], x.shape[-1]
    for rows in (x, update):
        if rows is not None and not (
            rows.dtype in FLOATS and rows.device == x.device and rows.shape == x.shape and rows.is_contiguous()
        ):
            return None
    if x.ndim < 2 or x.numel() != shape[0] * shape[1] or traced(*stream) or transformed():
        return None
    if kernels.resolve_backend(attend.backend, x.device) == "torch":
        return _checked(attend.backend)
    doubles = torch.float64 in [rows.dtype for rows in stream if rows is not None]
    if doubles or shape[1] > MAX_CHANNELS or attend.tokens.max_seqlen > MAX_SEQLEN:
        return None
    return BELIEVED


class PlainBlock:
    """A plain Block of timm's as it was when it was looked at, and its forward pass.

    It holds no reference to the block itself, so that a block is freed as if it were not known here.

    Args:
        parts: what `_plain_parts` returns for the block.
    """

    def __init__(self, parts: dict[str, nn.Module]):
        self.attn, self.act = parts["attn"], parts["mlp.act"]
        self.norms = [(parts[name], *_weight_and_bias(parts[name])) for name in ("norm1", "norm2")]
        self.gammas = [parts[name]._parameters.get("gamma") for name in ("ls1", "ls2")]
        self.qkv, self.proj, self.fc1, self.fc2 = (
            (parts[name], *_weight_and_bias(parts[name])) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        )
        # These say whether the block still is what it was.
        self.inner = [part for name, part in parts.items() if name]
        self.classes, self.states = [*map(type, self.inner)], [part.__dict__ for part in self.inner]
        self.hooks = [part.__dict__[kind] for part in parts.values() for kind in HOOKS]
        self.dicts = [held for part in parts.values() for held in (part._modules, part._parameters) if held]
        self.members = self._members()
        # These say whether the straight line serves it at the moment.
        self.settings = self._settings()
        self.dropping = [self.attn, *(part for part in self.inner if type(part) in (nn.Dropout, DropPath))]
        self.parameters = [x for x in self.members if isinstance(x, Tensor)]
        self.channels, (_, weight, bias) = self.qkv[1].shape[1], self.fc1
        sizes = {x: self.channels for _, *affine in self.norms for x in (*affine, *self.gammas)} | {bias: len(weight)}
        sizes.pop(None, None)
        self.rows = [*sizes]  # which kernels read that believe their arguments
        self.layout = self._layout()
        self.suits_kernels = all(x.shape == (size,) and x.dtype != torch.float64 for x, size in sizes.items())

    def _members(self) -> list[nn.Module | Tensor | None]:
        return [*chain.from_iterable(map(dict.values, self.dicts))]

    def _settings(self) -> tuple:
        attn, flags = self.attn, [norm.__dict__.get("_fast_norm") for norm, *_ in self.norms]
        return attn.num_heads, attn.head_dim, attn.gate, gelu_form(self.act), flags

    def _layout(self) -> list:
        return [*map(Tensor.numel, self.rows), *map(attrgetter("dtype"), self.rows)]

    def holds(self, block: nn.Module) -> bool:
        """Return whether nothing has changed of what decided that the block is plain."""
        members = self._members()
        return (
            type(block) is Block
            and "forward" not in block.__dict__
            and not any(self.hooks)
            and [*map(type, self.inner)] == self.classes
            and not any(map(contains, self.states, repeat("forward")))
            and len(members) == len(self.members)
            and all(map(is_, members, self.members))
            and self._settings() == self.settings
            and self._layout() == self.layout
        )

    def drops(self) -> bool:
        """Return whether a part of the block may drop something at random now."""
        return any(map(attrgetter("training"), self.dropping))

    def serves(self, x: Tensor, operations: Operations) -> bool:
        """Return whether these operations on tokens x compute the block now: nothing drops anything, no weight gets a
        gradient, and what a kernel reads lies on the device of x."""
        if self.drops() or x.shape[-1] != self.channels:
            return False
        if torch.is_grad_enabled() and any(map(attrgetter("requires_grad"), self.parameters)):
            return False
        if operations is not BELIEVED:
            return True
        return self.suits_kernels and {*map(Tensor.get_device, self.rows)} <= {x.get_device()}

    def __call__(self, stream: Stream, attend: Attend) -> Stream:
        """Compute the block. Tokens (B, N, C) become packed ones (T, C)."""
        attn, tokens, dtype = self.attn, attend.tokens, autocast_dtype(stream.x)
        x, normed = self.normalise(0, stream.packed(), attend.operations, dtype)
        qkv = linear(normed, *frozen_weights(*self.qkv, dtype)).view(-1, 3, attn.num_heads, attn.head_dim)
        out = attend.operations.attention(
            normalise_qk(attn, qkv), tokens.cu_seqlens, tokens.max_seqlen, softmax_scale(attn)
        )
        update = linear(out, *frozen_weights(*self.proj, dtype))
        return self.second_half(Stream(x, update, self.gammas[0]), attend.operations, dtype)

    def normalise(
        self, number: int, stream: Stream, operations: Operations, dtype: torch.dtype | None, *first: int
    ) -> tuple[Tensor, ...]:
        """Return the tokens of the stream and their norm, the first or the second one of the block. `dtype` is that of
        autocast. With `first`, do what `residual_norm_of_first` does."""
        module, weight, bias = self.norms[number]
        return operations.norm(*stream, weight, bias, module.eps, dtype, *first)

    def second_half(self, stream: Stream, operations: Operations, dtype: torch.dtype | None) -> Stream:
        """Compute the MLP of the block. `dtype` is that of autocast."""
        x, normed = self.normalise(1, stream, operations, dtype)
        hidden = operations.hidden(normed, *frozen_weights(*self.fc1, dtype), self.act)
        return Stream(x, linear(hidden, *frozen_weights(*self.fc2, dtype)), self.gammas[1])


def _weight_and_bias(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    return module._parameters["weight"], module._parameters["bias"]


def _plain_parts(block: nn.Module) -> dict[str, nn.Module] | None:
    """Return the modules of a block by their names, or None if a straight line does not compute what it computes."""
    parts: dict[str, nn.Module] = {}
    for name, kinds in PARTS.items():
        parent, _, last = name.rpartition(".")
        part = parts[parent]._modules.get(last) if name else block
        if part is None or obstacle(part, kinds) is not None or not _has_plain_parameters(part):
            return None
        parts[name] = part
    return parts if _has_plain_settings(parts) else None


def _has_plain_parameters(part: nn.Module) -> bool:
    held, names = part._parameters, {"gamma"} if type(part) is LayerScale else {"weight", "bias"}
    if type(part) in READ and (held.keys() != names or names & part.__dict__.keys()):
        return False
    return all(x is None or type(x) in PLAIN for x in held.values())


def _has_plain_settings(parts: dict[str, nn.Module]) -> bool:
    attn, width = parts["attn"], parts["attn.qkv"]._parameters["weight"].shape[0]
    return (
        attn.gate is None
        and width == 3 * attn.num_heads * attn.head_dim
        and attn.head_dim % 8 == 0
        and attn.head_dim <= MAX_HEAD_DIM
        and gelu_form(parts["mlp.act"]) in FORMS
        and not any(parts[name].__dict__.get("_fast_norm") for name in ("norm1", "norm2"))
    )


_known: WeakKeyDictionary[nn.Module, PlainBlock] = WeakKeyDictionary()


def plain_block(block: nn.Module) -> PlainBlock | None:
    """Return the straight line of a block, or None if it has none. A compiler looks at the modules themselves."""
    if torch.compiler.is_compiling():
        return None
    known = _known.get(block)
    if known is None or not known.holds(block):
        parts = _plain_parts(block)
        known = None if parts is None else PlainBlock(parts)
        if known is not None:
            _known[block] = known
    return known


def run_plain(block: nn.Module, stream: Stream, attend: Attend) -> Stream | None:
    """Run the block that `attend` has entered in a straight line. Return None if the block or the tokens do not allow
    it, or if something is to be measured, recorded or pruned within the block."""
    if attend.wanted or attend.measures or attend.prune is not None or attend.sizes is not None:
        return None
    plain = plain_for(block, stream, attend)
    if plain is None:
        return None
    attend.believed = plain(stream, attend)
    return attend.believed


def plain_for(block: nn.Module, stream: Stream, attend: Attend) -> PlainBlock | None:
    """Return the straight line of a block if it serves these tokens now. `attend` then has its operations."""
    if torch.compiler.is_compiling():
        return None
    if stream is not attend.believed:
        attend.operations = operations_on(stream, attend)
    if attend.operations is None:
        return None
    plain = plain_block(block)
    return plain if plain is not None and plain.serves(stream.x, attend.operations) else None
