"""Which models are refused, and which of their modules the fast forward pass may replace.

The fast forward pass does not call most of a timm model: kernels take the place of its Linears and attentions, and the
forward methods of its blocks never run. This gives timm's numbers only where a module is plain, as `obstacle` defines
it. A module that is not plain is called as it is, or the model is refused. Hooks and modules come and go, so every
forward pass decides this anew.
"""

from __future__ import annotations

from collections.abc import Collection

from timm.layers import GELU as TimmGELU
from timm.layers import (
    Attention,
    AttentionPoolLatent,
    AttentionPoolPrr,
    DiffAttention,
    DropPath,
    GELUTanh,
    GluMlp,
    LayerNorm,
    LayerNormFp32,
    LayerScale,
    Mlp,
    PatchDropout,
    PatchEmbed,
    QuickGELU,
    RmsNorm,
    RmsNormFp32,
    SimpleNorm,
    SwiGLU,
)
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module
from torch.utils.module_tracker import ModuleTracker

from smi_fast import kernels
from smi_fast.backbones.readouts import ClassAndMean, CosineLogits

MODELS = (VisionTransformer, VisionTransformerDistilled)
TIMM_BLOCKS = (Block, DiffParallelScalingBlock, ParallelScalingBlock, ParallelThingsBlock, ResPostBlock)
TIMM_ATTENTIONS = (Attention, DiffAttention)
HEAD_NORMS = ("q_norm", "k_norm", "sub_norm")
POOLS = (AttentionPoolLatent, AttentionPoolPrr, ClassAndMean)
LINEAR, MLP = (nn.Linear,), (Mlp,)
DROPS, PATCH_DROPS = (nn.Dropout, nn.Identity), (PatchDropout, nn.Identity)
NORMS = (nn.Identity, nn.LayerNorm, nn.RMSNorm, LayerNorm, LayerNormFp32, RmsNorm, RmsNormFp32, SimpleNorm)
ACTIVATIONS = (nn.GELU, nn.ReLU, nn.SiLU, nn.Tanh, nn.Sigmoid, TimmGELU, GELUTanh, QuickGELU)
SEQUENTIAL = (nn.Sequential,)
BRANCH = ("norm", "attn", "ls", "drop_path")  # the parts of a branch in a ParallelThingsBlock
TOKENWISE = frozenset(  # modules that process each token by itself
    (nn.Linear, Mlp, GluMlp, SwiGLU, LayerScale, DropPath, nn.Sequential, nn.ModuleList, *DROPS, *NORMS, *ACTIVATIONS)
)
PLAIN = TOKENWISE | {*MODELS, PatchEmbed, nn.Conv2d, PatchDropout, *TIMM_BLOCKS, *TIMM_ATTENTIONS, *POOLS, CosineLogits}
WEIGHTED = (nn.Linear, nn.Conv2d)  # modules whose weights are read
WEIGHTS = (nn.Parameter, Tensor, FakeTensor, type(None))  # a replica of nn.DataParallel holds its weights as tensors
CONVERTERS = {  # the beginning of the name of another library's module -> the function that takes its models
    "transformers.": "from_huggingface",
    "torchvision.models.vision_transformer": "from_torchvision",
}
OWN_MODULES = ("timm.models.vision_transformer", "timm.models.deit", "smi_fast.backbones.vit")
MODEL_METHODS = ("forward", "forward_features", "_pos_embed", "forward_head", "pool")
GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


class UnsupportedModelError(ValueError):
    """The model cannot be accelerated. The message says which part of it stands in the way."""


def _original(kind: type, name: str) -> object:
    """Return the method of a class, or None if it was replaced before this package was imported."""
    method = getattr(kind, name)
    owner = next(base for base in kind.__mro__ if name in base.__dict__)
    is_own = (method.__module__, method.__qualname__) == (owner.__module__, f"{owner.__qualname__}.{name}")
    return method if is_own else None


ORIGINALS = [(kind, "forward", _original(kind, "forward")) for kind in PLAIN - {*MODELS, nn.ModuleList}]
ORIGINALS += [(kind, name, _original(kind, name)) for kind in MODELS for name in MODEL_METHODS]


def obstacle(module: nn.Module, kinds: Collection[type]) -> str | None:
    """Say why a module cannot be bypassed, as the end of a sentence that begins with its name; None if it is plain.

    The class of a plain module is exactly one of `kinds`, so the module is not subclassed, wrapped or parametrised. It
    has no hooks of its own, forward or backward. Its `forward` is that of its class. If it is a Linear or a
    convolution, its weight is not a subclass of Tensor, which could define products of its own.
    """
    kind, state = type(module), module.__dict__  # nn.Module's own access to attributes is slow
    if kind not in kinds:
        return f" is a {kind.__module__}.{kind.__name__}"
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return " has hooks"
    if "forward" in state:
        return " has a forward of its own"
    if kind in WEIGHTED and type(state["_parameters"].get("weight")) not in WEIGHTS:
        return f" has a weight that is a {type(module.weight).__module__}.{type(module.weight).__name__}"
    return None


def weight_and_bias(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Return `module.weight, module.bias` in less time than nn.Module's own access to attributes takes."""
    state, parameters = module.__dict__, module._parameters
    if "weight" in parameters and "bias" in parameters and "weight" not in state and "bias" not in state:
        return parameters["weight"], parameters["bias"]
    return module.weight, module.bias  # attributes, as in a replica of nn.DataParallel


def call(module: nn.Module, x: Tensor) -> Tensor:
    """Return module(x). A plain module that does nothing now, an Identity or a Dropout outside of training, is not
    called, because a call takes the host as long as a small kernel's launch."""
    kind = type(module)
    does_nothing = kind is nn.Identity or (kind is nn.Dropout and not module.training)
    return x if does_nothing and obstacle(module, DROPS) is None else module(x)


def obstacle_within(module: nn.Module, attentions: Collection[nn.Module] = ()) -> str | None:
    """Say why a module, or one within it, may not process each token by itself; None if it does.

    The modules in `attentions` may let tokens see each other.
    """
    if type(module) is DropPath and module.training and module.drop_prob:
        return " drops whole images while training"
    kinds = TIMM_ATTENTIONS if module in attentions else TOKENWISE
    return obstacle(module, kinds) or _children_obstacle(module, attentions)


def _children_obstacle(module: nn.Module, attentions: Collection[nn.Module] = ()) -> str | None:
    for name, child in module._modules.items():
        reason = None if child is None else obstacle_within(child, attentions)
        if reason is not None:
            return f".{name}{reason}"
    return None


def obstacle_within_block(block: nn.Module) -> str | None:
    """Say why tokens may see each other in a block outside of its attentions; None if they cannot."""
    reason = obstacle(block, TIMM_BLOCKS)
    if reason is not None:
        return reason
    if type(block) is ParallelThingsBlock:
        attentions = [branch.attn for branch in block.attns]
    else:
        attentions = [block.attn] if type(block) in (Block, ResPostBlock) else []
    return _children_obstacle(block, attentions)


def obstacle_within_pool(pool: nn.Module) -> str | None:
    """Say why an attention pooling, or a module within it, cannot be bypassed; None if it is plain."""
    if getattr(pool, "pos_embed", None) is not None:
        return " has a position embedding of its own"
    return obstacle(pool, POOLS) or _children_obstacle(pool)


def block_obstacle(block: nn.Module) -> str | None:
    """Say why the forward of a block and of its attentions cannot be bypassed; None if they are plain.

    Their Linears are not looked at: each of them is either bypassed or called.
    """
    reason = obstacle(block, TIMM_BLOCKS)
    if reason is not None:
        return reason
    kind = type(block)
    if kind is Block or kind is ResPostBlock:
        return _attention_obstacle(".attn", block._modules["attn"], TIMM_ATTENTIONS)
    if kind is not ParallelThingsBlock:
        return _attention_obstacle("", block, TIMM_BLOCKS)
    for number, branch in enumerate(block.attns):
        reason = obstacle(branch, SEQUENTIAL)
        if reason is None and tuple(branch._modules) != BRANCH:
            reason = f" holds {', '.join(branch._modules)}"
        reason = reason or _attention_obstacle(".attn", branch.attn, TIMM_ATTENTIONS)
        if reason is not None:
            return f".attns[{number}]{reason}"
    return None


def _attention_obstacle(name: str, attn: nn.Module, kinds: Collection[type]) -> str | None:
    """Say why an attention cannot be bypassed; None if it can. The modules that it calls on heads have to be plain too,
    because heads lie in another order here than in timm."""
    reason = obstacle(attn, kinds)
    if reason is not None:
        return f"{name}{reason}"
    parts = attn._modules
    for part in HEAD_NORMS:
        reason = obstacle(parts[part], NORMS) if part in parts else None
        if reason is not None:
            return f"{name}.{part}{reason}"
    # The fused attention does not call attn_drop.
    drop = parts["attn_drop"]
    if not attn.fused_attn and (reason := obstacle(drop, DROPS)) is not None:
        return f"{name}.attn_drop{reason}"
    if (attn if attn.fused_attn else drop).training and getattr(drop, "p", 0) > 0:
        return f"{name}.attn_drop drops attention while training"
    return None


def check_bypassed(model: nn.Module) -> None:
    """Raise UnsupportedModelError, naming the part, if a part that every forward pass bypasses is not plain."""
    for hooks in GLOBAL_HOOKS:
        for hook in hooks.values():
            if not isinstance(getattr(hook, "__self__", None), ModuleTracker):  # it only notes which module runs
                raise UnsupportedModelError(
                    "a global module hook is registered, and modules that the fast forward pass bypasses do not call it"
                )
    for kind, name, original in ORIGINALS:
        if getattr(kind, name) is not original:
            raise UnsupportedModelError(
                f"{kind.__module__}.{kind.__name__}.{name} was replaced, and the fast forward pass bypasses it"
            )


def check_called(model: nn.Module) -> None:
    """Raise UnsupportedModelError if the model has a change that only a call of the module would obey."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    reason = changed_method(model, "forward", "forward_features")
    if reason is None and any(model.__dict__[kind] for kind in hooks):
        reason = " has hooks"
    if reason is None and has_random_patches(model):
        reason = " drops random patches while training (patch_drop)"
    if reason is not None:
        raise UnsupportedModelError(f"the model{reason}, which only a call of the model with images obeys")


def changed_method(model: nn.Module, *names: str) -> str | None:
    """Say which of a model's methods is not its class's own, as the end of a sentence that begins with the model."""
    for name in names:
        if name in model.__dict__:
            return f" has a {name} of its own"
        for kind in type(model).__mro__:
            if kind.__module__ in OWN_MODULES:
                break
            if name in kind.__dict__:
                return f" is a {kind.__module__}.{kind.__name__}, which has a {name} of its own"
    return None


def embedding_obstacle(model: nn.Module) -> str | None:
    """Say which part of the embedding is changed, so that timm's own embedding has to run; None if none is."""
    embed = model.patch_embed
    for part, module, kinds in (
        ("patch_embed", embed, (PatchEmbed,)),
        ("patch_embed.proj", embed.proj, (nn.Conv2d,)),
        ("patch_embed.norm", embed.norm, NORMS),
        ("pos_drop", model.pos_drop, DROPS),
        ("patch_drop", model.patch_drop, PATCH_DROPS),
    ):
        reason = obstacle(module, kinds)
        if reason is not None:
            return f"{part}{reason}"
    if not _embeds_one_by_one(embed.proj, embed.patch_size):
        return f"patch_embed.proj is {embed.proj}"
    return changed_method(model, "_pos_embed")


def has_random_patches(model: nn.Module) -> bool:
    """Return whether timm's patch dropout drops patches in the next forward pass."""
    return model.patch_drop.training and getattr(model.patch_drop, "prob", 0) > 0


def num_channels(patch_embed: nn.Module) -> int:
    """Return the number of channels of the images that a patch embedding takes."""
    weight = getattr(patch_embed.proj, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 4:  # a wrapper holds the convolution
        weight = next(parameter for parameter in patch_embed.parameters() if parameter.ndim == 4)
    return weight.shape[1]


def check_embeds_patches(embed: nn.Module) -> None:
    """Raise UnsupportedModelError if a patch embedding does not embed the patches of a grid one by one."""
    if not isinstance(embed, PatchEmbed):
        kind = type(embed)
        raise UnsupportedModelError(f"patch_embed is a {kind.__module__}.{kind.__name__}, not a PatchEmbed")
    proj = next((part for part in embed.proj.modules() if isinstance(part, nn.Conv2d)), None)  # a wrapper may hold it
    if proj is None or not _embeds_one_by_one(proj, embed.patch_size):
        size = tuple(embed.patch_size)
        raise UnsupportedModelError(f"patch_embed.proj is {embed.proj}: it does not embed patches of {size} one by one")


def _embeds_one_by_one(proj: nn.Conv2d, patch_size: tuple[int, int]) -> bool:
    return proj.kernel_size == proj.stride == tuple(patch_size) and (proj.padding, proj.dilation) == ((0, 0), (1, 1))


def check_supported(model: nn.Module) -> None:
    """Raise UnsupportedModelError, naming the part, for a model that `accelerate` does not know."""

    def refuse(part: str, found: object, known: str) -> None:
        raise UnsupportedModelError(f"{part} is a {type(found).__module__}.{type(found).__name__}, not {known}")

    if type(model) not in MODELS:
        known, owner = "timm's VisionTransformer or VisionTransformerDistilled", type(model).__module__
        ways = [name for start, name in CONVERTERS.items() if owner.startswith(start)]
        refuse("the model", model, known + "".join(f", which smi_fast.{name}(model) makes of it" for name in ways))
    if (reason := changed_method(model, "forward")) is not None:
        raise UnsupportedModelError(f"the model{reason}, which nothing can accelerate")
    check_bypassed(model)
    check_embeds_patches(model.patch_embed)
    if model.patch_embed.dynamic_img_pad:
        raise UnsupportedModelError(
            "patch_embed pads images (dynamic_img_pad), so its patches are not those of the image"
        )
    if len(model.blocks) == 0:
        raise UnsupportedModelError("the model has no blocks")
    for number, block in enumerate(model.blocks):
        if type(block) not in TIMM_BLOCKS:
            refuse(f"blocks[{number}]", block, " or ".join(sorted(known.__name__ for known in TIMM_BLOCKS)))
        branches = [*block.attns, *block.ffns] if isinstance(block, ParallelThingsBlock) else [block]
        for part in branches:
            if hasattr(part, "attn") and type(part.attn) not in TIMM_ATTENTIONS:
                refuse(f"blocks[{number}].attn", part.attn, "timm's Attention or DiffAttention")
            head_dim = getattr(getattr(part, "attn", part), "head_dim", 8)
            if head_dim % 8 or head_dim > kernels.MAX_HEAD_DIM:
                raise UnsupportedModelError(
                    f"blocks[{number}] has a head_dim of {head_dim}, not a multiple of 8 up to {kernels.MAX_HEAD_DIM}"
                )
