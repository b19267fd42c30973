"""The strongest loop that plain PyTorch allows, as a peer: timm's modules, torch's operators, nothing of our kernels.

It does what smi-fast's loop does between two stoppings: weights frozen and cast once, the whole model in the compute
dtype; kept patches alone embedded, attended to by SDPA, regularised and optimised; the last block for the class token
alone; torch.compile over each part; and on a GPU one CUDA graph of an iteration.
"""

from __future__ import annotations

import copy
import time

import torch
import torch.nn.functional as F
from smi_fast.kernels.patches import inverse_reference, patches_reference
from smi_fast.kernels.pixels import patch_sites, pixel_step_reference
from smi_fast.kernels.rows import uniform_lengths
from torch import Tensor, nn

from smi_fast.inversion.graphs import Replayed, has_graphs, side_stream


class PlainLoop:
    """Iterations of one stage. `patches_reference` and `pixel_step_reference` are plain torch, compiled here.

    Args:
        model: timm's, of plain blocks with a class token.
        dtype: of the matrix products and of all activations.
        compiled: by torch.compile, else as they are.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, *, compiled: bool = True):
        self.model = copy.deepcopy(model).eval().requires_grad_(False).to(dtype)
        self.dtype = dtype
        compiler = torch.compile if compiled else lambda function: function
        self.see, self.step = compiler(patches_reference), compiler(pixel_step_reference)
        self.loss = compiler(self._loss)

    def logits(self, patches: Tensor, cells: Tensor) -> Tensor:
        """Of patches (B, K, C * ph * pw) in cells (B, K) of the grid."""
        model, proj = self.model, self.model.patch_embed.proj
        x = F.linear(patches, proj.weight.flatten(1), proj.bias) + model.pos_embed[0][1 + cells]
        first = (model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = model.norm_pre(torch.cat((first, x), 1))
        *blocks, last = model.blocks
        for block in blocks:
            x = block(x)
        attn, normed = last.attn, last.norm1(x)
        q, kv = attn.qkv.weight.split((attn.attn_dim, 2 * attn.attn_dim))
        q_bias, kv_bias = attn.qkv.bias.split((attn.attn_dim, 2 * attn.attn_dim))
        q = F.linear(normed[:, :1], q, q_bias).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)  # [B, H, 1, D]
        k, v = F.linear(normed, kv, kv_bias).unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x[:, :1] + attn.proj(out)
        x = x + last.mlp(last.norm2(x))
        return model.forward_head(model.norm(x))

    def _loss(self, patches: Tensor, cells: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(patches, cells).float(), targets)

    def seconds(self, targets: Tensor, images: Tensor, keep: Tensor, bounds: tuple[Tensor, Tensor], *, lead: int,
                timed: int, every: int) -> Tensor:  # fmt: skip
        """Seconds of an iteration, `timed` times, each the mean of `every`, behind `lead` that are not timed.

        Args:
            targets: (B,). images: (B, C, H, W), noise. keep: (B, K). bounds: lowest and highest pixel, (C,) each.
        """
        model, device = self.model, images.device
        grid_size, patch_size = model.patch_embed.grid_size, model.patch_embed.patch_size
        positions, cu_seqlens = keep.flatten().int(), uniform_lengths(*keep.shape, device)
        sites, pair = patch_sites(positions, cu_seqlens, grid_size), (images, images.clone())
        moments = images.new_zeros(2, len(positions), images[0].numel() // (grid_size[0] * grid_size[1]))
        steps = torch.zeros(len(keep), dtype=torch.int64, device=device)
        view = torch.zeros(3, dtype=torch.int32, device=device)

        def iterate(number: int) -> None:
            view.copy_(torch.stack((steps[0] * 7 % 57 - 28, steps[0] * 5 % 57 - 28, steps[0] % 2)))  # all offsets
            patches, cells = self.see(pair[number], positions, cu_seqlens, view, patch_size, self.dtype)
            leaf = patches.view(*keep.shape, -1).detach().requires_grad_()
            (grad,) = torch.autograd.grad(self.loss(leaf, cells.view(keep.shape).long(), targets), leaf)
            self.step(
                pair[1 - number], *moments, steps, pair[number], grad.flatten(0, 1), sites, *bounds,
                inverse_reference(cells, cu_seqlens, grid_size), view, *patch_size, 0.25, 0.5, 0.99, 1e-8, 1e-4, 0.0,
            )  # fmt: skip

        run = Replayed(iterate) if has_graphs(device) else iterate
        clock = []
        with side_stream(device):
            for iteration in range(lead + timed * every + 1):
                if iteration >= lead and (iteration - lead) % every == 0:
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    clock.append(time.perf_counter())
                run(iteration % 2)
        return torch.tensor(clock, dtype=torch.float64).diff() / every


def forward_flops(tokens: int, width: int, depth: int = 12) -> int:
    """Of one image: multiplications and additions in matrix products and attention (see METHOD.md). The last block has
    keys and values for all tokens and the rest for the class token."""
    block = 24 * tokens * width**2 + 4 * tokens**2 * width
    last = 4 * tokens * width**2 + 20 * width**2 + 4 * tokens * width
    return (depth - 1) * block + last + 2 * (tokens - 1) * 768 * width


def backward_flops(tokens: int, width: int, depth: int = 12) -> int:
    """To the pixels alone: products once more, attention twice."""
    attention = 4 * (depth - 1) * tokens**2 * width + 4 * tokens * width
    return forward_flops(tokens, width, depth) + attention


def elementwise_bytes(tokens: int, width: int, element: int, depth: int = 12) -> int:
    """Count the bytes that what surrounds the matrix products of one image must move, forward and backward, if it is
    fused: in each block two residual sums with their LayerNorm, and a bias with its GELU. The residual stream is
    float32, and all else has elements of so many bytes.

    A residual sum with its LayerNorm reads a branch and the stream, and writes the stream and the normalised rows. Its
    backward pass reads the gradients of both and the stream, and writes the gradient of the stream twice, in float32
    and in the compute dtype. GELU reads and writes 4 C elements a token; its backward pass reads two rows and writes
    one. The last block has these for the class token alone, except for its first LayerNorm.
    """
    norm, gelu = (2 * element + 8) + (2 * element + 12), (2 + 3) * 4 * element
    return width * ((depth - 1) * tokens * (2 * norm + gelu) + tokens * norm + norm + gelu)
