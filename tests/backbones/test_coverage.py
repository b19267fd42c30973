"""Every name that timm lists in its modules vision_transformer and deit, built small, against timm's own modules."""

import timm
import torch
from torch import nn

import smi_fast

UNSUPPORTED: list[str] = []  # names that accelerate() refuses; the README lists the same
NAMES = sorted(timm.list_models(module="vision_transformer") + timm.list_models(module="deit"))
TOLERANCE = 1e-9  # relative, in float64: rounding only


def build_small(name: str) -> nn.Module:
    """The model at depth 2, two heads of its own head dim, a grid of 3 x 4 patches, float64, every weight random."""
    with torch.device("meta"):
        full = timm.create_model(name)
    block = full.blocks[0]
    attn = block.attns[0].attn if hasattr(block, "attns") else getattr(block, "attn", block)
    head_dim = full.embed_dim // attn.num_heads
    height, width = full.patch_embed.patch_size
    model = timm.create_model(
        name, depth=2, embed_dim=2 * head_dim, num_heads=2, img_size=(3 * height, 4 * width), num_classes=11
    )
    for parameter in model.parameters():  # zero-initialised heads, gains and biases would hide mistakes
        nn.init.normal_(parameter, std=0.2 if parameter.ndim < 2 else 0.5 / parameter.shape[-1] ** 0.5)
    return model.double().eval()


def timm_on_tokens(model: nn.Module, images: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """timm's own blocks on the patch-embedded, position-embedded, gathered tokens."""
    tokens, prefix = model._pos_embed(model.patch_embed(images)), model.num_prefix_tokens
    kept = tokens[:, prefix:].gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))
    tokens = torch.cat((tokens[:, :prefix], kept), dim=1)
    return model.forward_head(model.norm(model.blocks(model.norm_pre(tokens))))


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def worst_error(model: nn.Module) -> float:
    """The largest relative error of logits and input gradients: dense, sparse, and in sequences of differing length."""
    fast = smi_fast.accelerate(model)
    images = torch.randn(2, 3, *model.patch_embed.img_size, dtype=torch.float64, requires_grad=True)
    keep = torch.stack([torch.randperm(12)[:5] for _ in range(2)])
    ragged = [torch.randperm(12)[:count] for count in (3, 7)]
    alone = torch.cat([timm_on_tokens(model, images[i : i + 1], ragged[i][None]) for i in range(2)])
    errors = []
    for ours, theirs in (
        (fast(images), model(images)),
        (fast(images, keep=keep), timm_on_tokens(model, images, keep)),
        (fast(images, keep=ragged), alone),
    ):
        weights = torch.randn_like(theirs)
        ours_grad, theirs_grad = (torch.autograd.grad((y * weights).sum(), images)[0] for y in (ours, theirs))
        errors += [error(ours, theirs), error(ours_grad, theirs_grad)]
    return max(errors)


def test_every_name_of_timm_gives_timms_numbers(seed):
    wrong, refused = {}, []
    for name in NAMES:
        model = build_small(name)
        try:
            worst = worst_error(model)
        except smi_fast.UnsupportedModelError:
            refused.append(name)
            continue
        if not worst < TOLERANCE:
            wrong[name] = worst
    assert len(NAMES) > 150
    assert refused == UNSUPPORTED
    assert not wrong
