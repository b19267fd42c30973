"""Models with hooks and with changed modules: timm's numbers or UnsupportedModelError, never other numbers."""

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block, ParallelScalingBlock, ParallelThingsBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import smi_fast
from smi_fast.models import cifar10_vit

DENSE, KEEP, RAGGED = None, torch.tensor([[7, 2, 5, 0], [1, 8, 3, 4]]), [torch.tensor([6, 1]), torch.tensor([3, 0, 8])]
# What comes of a change: timm's numbers; those, but no importance; or a refusal.
SAME, UNMEASURED, REFUSED = "same", "unmeasured", "refused"


def build() -> VisionTransformer:
    """Two blocks, width 32, 3x3 patches, float64, every weight random."""
    model = VisionTransformer(
        img_size=12, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5, init_values=0.5, qk_norm=True
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else 1.5 / parameter.shape[-1] ** 0.5)
    return model.double().eval()


class LastAttention(TorchFunctionMode):
    """Remembers the class token's softmax row (B, N) of the last attention that torch computes, averaged over heads."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            q, k = args[:2]
            self.row = (q[:, :, :1] @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1).mean(1)[:, 0].detach()
        return function(*args, **(kwargs or {}))


def timm_numbers(model: VisionTransformer, images: Tensor, keep: Tensor | list[Tensor] | None) -> tuple[Tensor, Tensor]:
    """Logits and importance that timm's own modules give on the embedded, gathered tokens."""
    if isinstance(keep, list):
        alone = [timm_numbers(model, images[i : i + 1], row[None]) for i, row in enumerate(keep)]
        return torch.cat([logits for logits, _ in alone]), torch.cat([importance[0] for _, importance in alone])
    attention = LastAttention()
    with attention:
        if keep is None:
            logits = model(images)
        else:
            x = model.patch_drop(model._pos_embed(model.patch_embed(images)))
            x = torch.cat((x[:, :1], x[:, 1:].gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))), dim=1)
            logits = model.forward_head(model.norm(model.blocks(model.norm_pre(x))))
    return logits, getattr(attention, "row", torch.zeros(len(images), 1))[:, 1:]


def gradient(logits: Tensor, images: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    return torch.autograd.grad((logits * weights).sum(), images)[0]


def outcome(
    fast: smi_fast.AcceleratedViT,
    images: Tensor,
    keep: Tensor | list[Tensor] | None,
    measures: bool,
    timm_model: VisionTransformer | None = None,
) -> str:
    """SAME or REFUSED; fails on any other numbers than those of timm's model."""
    try:
        logits = fast(images, keep=keep, return_attention=measures)
    except smi_fast.UnsupportedModelError:
        return REFUSED
    logits, importance = logits if measures else (logits, None)
    expected, expected_importance = timm_numbers(timm_model or fast.model, images, keep)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient(logits, images), gradient(expected, images), rtol=1e-9, atol=1e-9)
    if measures:
        torch.testing.assert_close(importance.double(), expected_importance, rtol=1e-5, atol=1e-6)
    return SAME


def mixed(x: Tensor) -> Tensor:
    """Another tensor, whose tokens have seen each other."""
    return x * 1.25 + (0.25 * x.mean(-2, keepdim=True) if x.ndim > 2 else 0.25)


HOOKS: dict[str, Callable[[nn.Module], object]] = {
    "forward_hook": lambda m: m.register_forward_hook(lambda _, args, out: mixed(out)),
    "forward_pre_hook": lambda m: m.register_forward_pre_hook(lambda _, args: (mixed(args[0]), *args[1:])),
    "full_backward_hook": lambda m: m.register_full_backward_hook(lambda _, given, grads: (given[0] * 1.5,)),
    "full_backward_pre_hook": lambda m: m.register_full_backward_pre_hook(lambda _, grads: (grads[0] * 1.5,)),
    "patched_forward": lambda m: patch(m, "forward"),
}


def patch(module: nn.Module, name: str) -> None:
    original = getattr(module, name)
    setattr(module, name, lambda *args, **kwargs: mixed(original(*args, **kwargs)))


LAST = ("norm1", "attn.qkv", "attn.proj", "attn.proj_drop", "ls1", "norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2")
PLACES = {
    **dict.fromkeys(("patch_embed", "patch_embed.proj", "patch_embed.norm", "pos_drop", "patch_drop"), SAME),
    **dict.fromkeys(("blocks",), UNMEASURED),
    **dict.fromkeys(("blocks.1", "blocks.1.attn", "blocks.1.attn.q_norm", "blocks.1.attn.k_norm"), UNMEASURED),
    **dict.fromkeys(("blocks.0", "blocks.0.attn", "blocks.0.attn.k_norm", "blocks.0.mlp.fc2"), SAME),
    **dict.fromkeys(("norm_pre", "norm", "head", *(f"blocks.1.{part}" for part in LAST)), SAME),
}


class LoRA(nn.Module):
    """A wrapper as peft makes it: of a Linear, or of a convolution with `down` and `up` of its kind."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base_layer = base
        if isinstance(base, nn.Linear):
            self.down, self.up = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)
        else:
            self.down = nn.Conv2d(base.in_channels, 4, base.kernel_size, base.stride, bias=False)
            self.up = nn.Conv2d(4, base.out_channels, 1, bias=False)
        self.double()

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return mixed(super().forward(x))


class OwnConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return mixed(super().forward(x))


class OwnAttention(Attention):
    def forward(self, *args, **kwargs) -> Tensor:
        return mixed(super().forward(*args, **kwargs))


class OwnMlp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return mixed(super().forward(x))


class OwnBlock(Block):
    def forward(self, *args, **kwargs) -> Tensor:
        return mixed(super().forward(*args, **kwargs))


class OwnSequential(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return mixed(super().forward(x))


class OwnModel(smi_fast.AcceleratedViT):
    def forward_features(self, *args, **kwargs) -> Tensor:
        return mixed(super().forward_features(*args, **kwargs))


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return mixed(x)


class ScaledWeight(Tensor):
    """A weight with products of its own."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        return result * 1.25 if function is torch.nn.functional.linear else result


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def replace_module(model: nn.Module, path: str, make: Callable[[nn.Module], nn.Module]) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, make(model.get_submodule(path)))


def become(model: nn.Module, path: str, kind: type) -> None:
    model.get_submodule(path).__class__ = kind


def weight_as_attribute(linear: nn.Linear) -> None:
    """As it is done to differentiate through a step of training."""
    weight = 1.5 * linear.weight.detach()
    del linear.weight
    linear.weight = weight


def without_fused_attention(model: nn.Module, attn_drop: Callable[[Attention], None]) -> None:
    model.blocks[1].attn.fused_attn = False
    attn_drop(model.blocks[1].attn)


def linears(model: nn.Module, wrap: Callable[[nn.Module], object]) -> None:
    """Of the last block: the product that importance is made of, one that is packed, and one that it reads in part."""
    for path in ("attn.qkv", "attn.proj", "mlp.fc1"):
        wrap(model.blocks[1].get_submodule(path))


def parametrize(module: nn.Module, name: str) -> None:
    nn.utils.parametrize.register_parametrization(module, name, Halved())


def weight_norm(linear: nn.Linear) -> None:
    parametrizations.weight_norm(linear)
    linear.parametrizations.weight.original0.data *= 1.25  # at first it changes nothing


def old_weight_norm(linear: nn.Linear) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(linear)
    linear.weight_g.data *= 1.25


def attn(model: nn.Module) -> Attention:
    """An attention that is not the one which importance is measured in."""
    other = copy.deepcopy(model.blocks[0].attn)
    other.fused_attn = False
    return other


def scaled_weight(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(ScaledWeight))


CHANGES: dict[str, tuple[str, Callable[[VisionTransformer], object]]] = {
    "lora_qkv": (SAME, lambda m: replace_module(m, "blocks.1.attn.qkv", LoRA)),
    "lora_fc1": (SAME, lambda m: replace_module(m, "blocks.1.mlp.fc1", LoRA)),
    "lora_patch_embed": (SAME, lambda m: replace_module(m, "patch_embed.proj", LoRA)),
    "weight_norm": (SAME, lambda m: linears(m, weight_norm)),
    "old_weight_norm": (SAME, lambda m: linears(m, old_weight_norm)),
    "spectral_norm": (SAME, lambda m: linears(m, parametrizations.spectral_norm)),
    "orthogonal": (SAME, lambda m: parametrizations.orthogonal(m.blocks[1].attn.proj)),
    "parametrized_linear": (SAME, lambda m: linears(m, lambda linear: parametrize(linear, "weight"))),
    "parametrized_conv": (SAME, lambda m: parametrize(m.patch_embed.proj, "weight")),
    "parametrized_pos_embed": (SAME, lambda m: parametrize(m, "pos_embed")),
    "pruned_linear": (SAME, lambda m: linears(m, lambda linear: prune.l1_unstructured(linear, "weight", 0.5))),
    "pruned_conv": (SAME, lambda m: prune.l1_unstructured(m.patch_embed.proj, "weight", 0.5)),
    "weight_as_attribute": (SAME, lambda m: linears(m, weight_as_attribute)),
    "weight_subclass": (SAME, lambda m: linears(m, scaled_weight)),
    "linear_class": (SAME, lambda m: become(m, "blocks.1.attn.qkv", OwnLinear)),
    "conv_class": (SAME, lambda m: become(m, "patch_embed.proj", OwnConv2d)),
    "attention_class": (UNMEASURED, lambda m: become(m, "blocks.1.attn", OwnAttention)),
    "first_attention_class": (SAME, lambda m: become(m, "blocks.0.attn", OwnAttention)),
    "mlp_class": (SAME, lambda m: become(m, "blocks.1.mlp", OwnMlp)),
    "block_class": (UNMEASURED, lambda m: become(m, "blocks.1", OwnBlock)),
    "first_block_class": (SAME, lambda m: become(m, "blocks.0", OwnBlock)),
    "other_block": (SAME, lambda m: replace_module(m, "blocks.0", lambda _: ParallelScalingBlock(32, 2).double())),
    "fewer_blocks": (SAME, lambda m: setattr(m, "blocks", m.blocks[:1])),
    "blocks_class": (UNMEASURED, lambda m: become(m, "blocks", OwnSequential)),
    "foreign_block": (UNMEASURED, lambda m: replace_module(m, "blocks.1", lambda _: Mixing())),
    "foreign_mlp": (SAME, lambda m: replace_module(m, "blocks.1.mlp", lambda mlp: nn.Sequential(mlp, Mixing()))),
    "attention_in_mlp": (SAME, lambda m: replace_module(m, "blocks.1.mlp", lambda mlp: nn.Sequential(mlp, attn(m)))),
    "attention_in_norm": (SAME, lambda m: replace_module(m, "norm", lambda norm: nn.Sequential(norm, attn(m)))),
    "foreign_norm": (SAME, lambda m: replace_module(m, "blocks.1.norm2", lambda norm: nn.Sequential(norm, Mixing()))),
    "foreign_final_norm": (SAME, lambda m: replace_module(m, "norm", lambda norm: nn.Sequential(norm, Mixing()))),
    "foreign_activation": (SAME, lambda m: replace_module(m, "blocks.1.mlp.act", lambda _: Mixing())),
    "foreign_patch_drop": (SAME, lambda m: setattr(m, "patch_drop", Mixing())),
    "foreign_q_norm": (UNMEASURED, lambda m: replace_module(m, "blocks.1.attn.q_norm", lambda _: Mixing())),
    "attn_drop": (UNMEASURED, lambda m: without_fused_attention(m, lambda attn: setattr(attn, "attn_drop", Mixing()))),
    "attn_drop_hook": (UNMEASURED, lambda m: without_fused_attention(m, lambda a: HOOKS["forward_hook"](a.attn_drop))),
    "overlapping_patches": (SAME, lambda m: setattr(m.patch_embed, "proj", nn.Conv2d(3, 32, 6, 4, 1).double())),
    "patched_pos_embed": (SAME, lambda m: patch(m, "_pos_embed")),
    "patched_head": (SAME, lambda m: patch(m, "forward_head")),
}


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).requires_grad_()


def assert_timms_numbers(expected: str, change: Callable[[VisionTransformer], object], images: Tensor) -> None:
    """A change made after a forward pass, over dense, sparse and ragged batches, with and without importance."""
    timm_model = build()
    unchanged_gradient = gradient(timm_numbers(timm_model, images, KEEP)[0], images)
    fast = smi_fast.accelerate(copy.deepcopy(timm_model))
    assert outcome(fast, images, KEEP, False, timm_model) == SAME
    for model in (fast, timm_model):
        torch.manual_seed(1)
        change(model)
    for keep in (DENSE, KEEP, RAGGED):
        for measures in (False, True):
            refused = expected == UNMEASURED and measures
            assert outcome(fast, images, keep, measures, timm_model) == (REFUSED if refused else SAME)
    changed = timm_numbers(timm_model, images, KEEP)[0]
    assert not torch.allclose(gradient(changed, images), unchanged_gradient, rtol=1e-3)


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_act_as_in_timm(seed, images, hook):
    for place, expected in PLACES.items():
        print(place)
        assert_timms_numbers(expected, lambda model, place=place: HOOKS[hook](model.get_submodule(place)), images)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_modules_act_as_in_timm(seed, images, change):
    assert_timms_numbers(*CHANGES[change], images)


def test_models_changed_before_are_alike(seed, images):
    for place in PLACES:
        model = build()
        HOOKS["forward_hook"](model.get_submodule(place))
        assert outcome(smi_fast.accelerate(model), images, KEEP, False) == SAME


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_of_the_model_act_where_it_is_called(seed, images, hook):
    timm_model = build()
    fast = smi_fast.accelerate(copy.deepcopy(timm_model))
    for model in (fast, timm_model):
        HOOKS[hook](model)
    assert outcome(fast, images, DENSE, False, timm_model) == SAME
    with pytest.raises(smi_fast.UnsupportedModelError, match=r"the model has .* only a call"):
        fast.outputs(smi_fast.PackedTokens.from_batch(torch.zeros(1, 9, 48).double(), torch.arange(9)))
    before = build()
    HOOKS[hook](before)
    if hook == "patched_forward":
        with pytest.raises(smi_fast.UnsupportedModelError, match="the model has a forward of its own"):
            smi_fast.accelerate(before)
    else:
        assert outcome(smi_fast.accelerate(before), images, DENSE, False, before) == SAME


@pytest.mark.parametrize("change", [lambda m: patch(m, "forward_features"), lambda m: become(m, "", OwnModel)])
def test_changed_features_are_called_on_all_patches_only(seed, images, change):
    timm_model = build()
    fast = smi_fast.accelerate(timm_model)
    expected = timm_model.forward_head(mixed(timm_model.forward_features(images)))
    change(fast)
    torch.testing.assert_close(fast(images), expected)
    for options in ({"keep": KEEP}, {"return_attention": True}):
        with pytest.raises(smi_fast.UnsupportedModelError, match="forward_features of its own, which does not take"):
            fast(images, **options)


def test_a_changed_embedding_sees_the_view(seed, images):
    """Through a view, and from patches alone, where it gives what it gives for an image of these patches."""
    fast = smi_fast.accelerate(build())
    HOOKS["forward_hook"](fast.pos_drop)
    view = torch.tensor([[4, 8, 1], [0, 4, 0]])
    seen = torch.stack([images[0].roll((4, 8), (1, 2)).flip(2), images[1].roll(4, 2)])
    torch.testing.assert_close(fast(images, view=view), fast.model(seen))
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(2, 9, 48)
    tokens = smi_fast.PackedTokens.from_batch(patches, torch.arange(9))
    torch.testing.assert_close(fast.forward_patches(tokens), fast.model(images))


@pytest.mark.parametrize("kind", [Attention, Mlp, Block, VisionTransformer, nn.Linear, nn.LayerNorm])
def test_a_class_whose_forward_is_replaced_is_refused(seed, images, monkeypatch, kind):
    fast, forward = smi_fast.accelerate(build()), kind.forward
    with monkeypatch.context() as patched:
        patched.setattr(kind, "forward", lambda *args, **kwargs: mixed(forward(*args, **kwargs)))
        assert outcome(fast, images, KEEP, False) == REFUSED
    assert outcome(fast, images, KEEP, False) == SAME


def test_global_hooks_are_refused_unless_they_count(seed, images):
    fast = smi_fast.accelerate(build())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits = fast(images)
    torch.testing.assert_close(logits, fast(images))
    assert counter.get_total_flops() > 0
    for register in (
        torch.nn.modules.module.register_module_forward_hook,
        torch.nn.modules.module.register_module_forward_pre_hook,
        torch.nn.modules.module.register_module_full_backward_hook,
        torch.nn.modules.module.register_module_full_backward_pre_hook,
    ):
        handle = register(lambda *args: None)
        try:
            assert outcome(fast, images, KEEP, False) == REFUSED
        finally:
            handle.remove()
    assert outcome(fast, images, KEEP, False) == SAME


def test_refusals_name_the_module_and_the_reason(seed, images):
    model = build()
    fast = smi_fast.accelerate(model)
    handle = HOOKS["forward_hook"](model.blocks[1].attn)
    with pytest.raises(smi_fast.UnsupportedModelError, match=r"blocks\[1\].attn has hooks, so .* cannot be measured"):
        fast(images, return_attention=True)
    with pytest.raises(smi_fast.UnsupportedModelError, match=r"blocks\[1\].attn has hooks"):
        smi_fast.SMIAdaptor(fast)(images)
    handle.remove()
    patch(model.blocks, "forward")
    with pytest.raises(smi_fast.UnsupportedModelError, match=r"blocks has a forward of its own"):
        fast(images, return_attention=True)


def test_attention_that_cannot_be_measured_prunes_nothing(seed, images):
    model = build()
    fast = smi_fast.accelerate(model, prune={1: 0.3})
    expected = fast(images)
    handle = HOOKS["forward_hook"](model.blocks[0])
    with pytest.raises(smi_fast.UnsupportedModelError, match=r"blocks\[0\] has hooks"):
        fast(images)
    handle.remove()
    torch.testing.assert_close(fast(images), expected)


@pytest.mark.parametrize("keep", [KEEP, RAGGED], ids=["uniform", "ragged"])
def test_pruned_images_do_not_depend_on_their_batch(seed, images, keep):
    model = build()
    replace_module(model, "blocks.1.norm2", lambda norm: nn.Sequential(norm, Mixing()))
    fast = smi_fast.accelerate(model, prune={1: smi_fast.Mass(0.6)})
    logits, importance = fast(images, keep=keep, return_attention=True)
    alone = [fast(images[i : i + 1], keep=row[None], return_attention=True) for i, row in enumerate(keep)]
    torch.testing.assert_close(logits, torch.cat([each[0] for each in alone]))
    torch.testing.assert_close(importance.flatten(), torch.cat([each[1].flatten() for each in alone]))


def test_a_longer_branch_of_parallel_attention_is_run_as_it_is(seed, images):
    options = {"img_size": 12, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = VisionTransformer(block_fn=ParallelThingsBlock, **options).double().eval()
    fast = smi_fast.accelerate(model)
    for change in (lambda branch: branch.append(Mixing()), HOOKS["forward_hook"]):
        change(model.blocks[1].attns[1])
        assert [outcome(fast, images, RAGGED, measures) for measures in (False, True)] == [SAME, REFUSED]


def test_attention_pooling_with_hooks_has_no_importance(seed, images):
    options = {"img_size": 12, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5}
    model = VisionTransformer(class_token=False, global_pool="map", **options)
    fast = smi_fast.accelerate(model.double().eval())
    HOOKS["forward_hook"](model.attn_pool.kv)
    torch.testing.assert_close(fast(images), model(images))
    with pytest.raises(smi_fast.UnsupportedModelError, match=r"attn_pool.kv has hooks"):
        fast(images, return_attention=True)


@pytest.mark.parametrize("wrap", [weight_norm, old_weight_norm, parametrizations.spectral_norm])
def test_parametrised_linears_train_as_in_timm(seed, images, wrap):
    """Two steps: the second fails where a weight of the first step's graph is used again."""
    model = build().train()
    linears(model, wrap)
    reference = copy.deepcopy(model) if wrap is not old_weight_norm else rebuilt(model, wrap)
    fast = smi_fast.accelerate(model)
    for forward, parameters in ((fast, model.parameters()), (reference, reference.parameters())):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            forward(images).square().mean().backward()
            optimizer.step()
    expected = reference.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)


def rebuilt(model: VisionTransformer, wrap: Callable[[nn.Module], object]) -> VisionTransformer:
    """A copy of a model whose weights are computed in a hook, which deepcopy refuses."""
    other = build().train()
    linears(other, wrap)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("change", ["lora_qkv", "parametrized_linear", "linear_class", "mlp_class", "pruned_linear"])
def test_casting_weights_casts_none_that_a_module_changes(seed, change):
    model = build()
    CHANGES[change][1](model)
    model = model.float().requires_grad_(False)
    images = torch.randn(2, 3, 12, 12)
    fast = smi_fast.accelerate(model, dtype=torch.bfloat16)
    with fast.cast_weights():
        logits, importance = fast(images, keep=KEEP, return_attention=True)
    expected, expected_importance = timm_numbers(model, images, KEEP)
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()
    torch.testing.assert_close(importance, expected_importance, rtol=0.1, atol=0.01)
    assert not any(hasattr(module, "_cast_weights") for module in model.modules())


def quantizable() -> VisionTransformer:
    return VisionTransformer(img_size=12, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5).eval()


@pytest.mark.parametrize("change", [*HOOKS, "lora_fc1", "pruned_linear", "old_weight_norm", "weight_subclass"])
def test_changed_models_are_not_quantised(seed, change):
    images = torch.randn(2, 3, 12, 12)
    smi_fast.quantize(quantizable(), images)
    for place in ("", "blocks.1", "blocks.1.attn.attn_drop", "blocks.1.mlp.fc1", "patch_embed.proj", "norm"):
        model = quantizable()
        if change in HOOKS:
            HOOKS[change](model.get_submodule(place))
        else:
            CHANGES[change][1](model)
        with pytest.raises(smi_fast.UnsupportedModelError):
            smi_fast.quantize(model, images)


def test_a_compiled_model_notices_hooks_if_told_to_look(seed, images):
    model = build()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        compiled = torch.compile(smi_fast.accelerate(model), backend="aot_eager")
        torch.testing.assert_close(compiled(images, keep=KEEP), timm_numbers(model, images, KEEP)[0])
        HOOKS["forward_hook"](model.blocks[1].mlp.fc1)
        torch.testing.assert_close(compiled(images, keep=KEEP), timm_numbers(model, images, KEEP)[0])


def test_a_model_exports(seed, images):
    fast = smi_fast.accelerate(build().requires_grad_(False))
    program = torch.export.export(fast, (images.detach(),), strict=False)
    torch.testing.assert_close(program.module()(images.detach()), fast(images.detach()))


def test_a_scale_that_timms_fused_attention_ignores_is_ignored(seed):
    model = cifar10_vit(False, depth=2, embed_dim=32, num_heads=2).double()
    fast, images = smi_fast.accelerate(model), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for block in model.blocks:
        block.attn.scale = 0.01
    torch.testing.assert_close(fast(images), model(images))
    for block in model.blocks:
        block.attn.num_heads, block.attn.head_dim = 4, 8
    torch.testing.assert_close(fast(images), model(images))


def test_a_class_that_was_patched_before_the_import_is_refused():
    program = (
        "import timm.layers as layers; original = layers.Attention.forward;"
        "layers.Attention.forward = lambda self, x, *args, **kwargs: 2 * original(self, x, *args, **kwargs);"
        "import smi_fast; from smi_fast.models import cifar10_vit; smi_fast.accelerate(cifar10_vit(False))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "Attention.forward was replaced" in run.stderr.splitlines()[-1]
