"""The loss after a removal is that of timm's blocks on the patches that are left."""

import pytest
import torch
import torch.nn.functional as F

from smi_fast import accelerate
from smi_fast.studies.removal import removal_losses


def test_losses_are_those_of_timms_blocks(vit, seed, device):
    model = vit("random").to(device)
    images, targets = torch.randn(5, 3, 16, 16), torch.randint(3, (5,))
    batches = [(images[:3], targets[:3]), (images[3:], targets[3:])]
    measured = removal_losses(accelerate(model), batches, counts=(5,))
    x = model.pos_embed[:, 1:] + model.patch_embed(images.to(device))
    prefix = (model.cls_token + model.pos_embed[:, :1]).expand(5, -1, -1)
    before = model.blocks[:-1](torch.cat((prefix, x), 1))
    attn = model.blocks[-1].attn
    q, k, _ = attn.qkv(model.blocks[-1].norm1(before)).reshape(5, 17, 3, 2, 16).permute(2, 0, 3, 1, 4)
    order = (q[:, :, :1] @ k.mT / 4).softmax(-1).mean(1)[:, 0, 1:].argsort(1)
    for kept, (loss, accuracy) in zip((None, order[:, -5:], order[:, :5]), measured, strict=False):
        part = x if kept is None else x.gather(1, kept[..., None].expand(-1, -1, 32))
        logits = model.forward_head(model.norm(model.blocks(torch.cat((prefix, part), 1)))).cpu()
        assert loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-3)
        assert accuracy == pytest.approx(100 * (logits.argmax(1) == targets).float().mean().item())
