"""accelerate(): timm's ViT and DeiT on packed, pruned batches.

The timm model keeps its weights and its modules; what is replaced is the way from tokens to tokens. Each function that
stands in for a timm forward says what it changes ("Modifications:").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from timm.layers import (
    Attention,
    AttentionPoolLatent,
    DiffAttention,
    DropPath,
    PatchDropout,
    resample_abs_pos_embed,
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

from smi_fast import kernels
from smi_fast.keep import Keep, pack_keep
from smi_fast.kernels.linear import PackedWeight, can_pack, linear
from smi_fast.kernels.rows import gather_rows, sequence_of_tokens
from smi_fast.stopping import Mass, kept_count
from smi_fast.support import (
    LINEAR,
    MLP,
    UnsupportedModelError,
    block_obstacle,
    check_bypassed,
    check_supported,
    obstacle,
    obstacle_within,
    obstacle_within_block,
    obstacle_within_pool,
    patch_projection,
)
from smi_fast.tokens import PackedTokens, pad, prepend, unpad

Prune = Mapping[int, float | Mass]  # block -> what is pruned before it


def accelerate(
    model: nn.Module, dtype: torch.dtype | None = None, backend: str = "auto", prune: Prune | None = None
) -> AcceleratedViT:
    """Make a timm VisionTransformer or DeiT fast on pruned batches, without changing its numbers.

    With `prune` the forward pass itself drops patches, as EViT does (Liang et al., 2022; without its fused token and
    without retraining): before block b those go to which the class token attends least in block b - 1, in the mean over
    heads. What is left of a batch goes on packed.

    Hooks, wrapped or subclassed modules and patched forwards act as they do in timm, whenever they come and go: what is
    not a plain module of timm's is called as it is, on tokens (B, N, C) of the kept patches, which may be slower. A
    batch whose images keep different numbers of patches then runs image by image, as (1, N, C). What cannot be called
    raises UnsupportedModelError in the forward pass: changes of the model itself, of its patch embedding or of the
    container of its blocks, global module hooks, and importance or pruning by a block whose attention is changed.
    torch.compile looks for hooks when it compiles, and later only if `torch._dynamo.config.skip_nnmodule_hook_guards`
    is False.

    Args:
        model: of timm's modules `vision_transformer` or `deit`. Its weights are shared, not copied.
        dtype: compute dtype of the matrix products (torch.float32, bfloat16 or float16). None: the weights' own dtype
            if that is not float32; bfloat16 on GPUs that have it in hardware; else float32.
        backend: "auto" (Triton on CUDA, plain torch elsewhere), "triton" or "torch".
        prune: block, from 1 to the last -> what is pruned before it, of the patches still there: a fraction in (0, 1),
            of which n patches leave int(n * (1 - fraction)), at least one; or `Mass(p)`, the fewest patches that hold a
            share p of their attention stay, which may be another number in each image. As in `select_patches`.

    Raises:
        UnsupportedModelError: some part of the model is not one that is known, or leaves no class token's attention to
            prune by; the message names it.
        ValueError: an unknown backend, a dtype that the weights do not allow, or a block or share out of range.
    """
    return AcceleratedViT(model, dtype=dtype, backend=backend, prune=prune)


class AcceleratedViT(nn.Module):
    """A timm ViT that embeds, moves and attends only over kept patches. Made by `accelerate`; `.model` is timm's."""

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        prune: Prune | None = None,
    ):
        super().__init__()
        check_supported(model)
        self.prune = check_prune(model, prune or {})
        parameter = next(model.parameters())
        kernels.resolve_backend(backend, parameter.device)
        if dtype is not None and dtype != parameter.dtype and parameter.dtype != torch.float32:
            raise ValueError(f"the weights are {parameter.dtype}: dtype must be None or the same, got {dtype}")
        if dtype not in (None, parameter.dtype, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
        self.model = model
        self.backend = backend
        self._dtype = dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the matrix products, where the weights are now."""
        if self._dtype is not None:
            return self._dtype
        weight = self.model.patch_embed.proj.weight
        if (
            weight.dtype == torch.float32
            and weight.is_cuda
            and torch.cuda.get_device_capability(weight.device) >= (8, 0)
        ):
            return torch.bfloat16
        return weight.dtype

    def grid_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The patch grid (rows, columns) of images of (H, W) pixels.

        Raises:
            ValueError: the patches do not divide the images, or the model is of a fixed, different size.
        """
        embed = self.model.patch_embed
        (height, width), (patch_height, patch_width) = image_size, embed.patch_size
        if height % patch_height or width % patch_width:
            raise ValueError(
                f"images of {height}x{width} pixels are not divided by patches of {patch_height}x{patch_width}"
            )
        if embed.strict_img_size and embed.img_size is not None and tuple(embed.img_size) != (height, width):
            expected = "x".join(map(str, embed.img_size))
            raise ValueError(f"images have {height}x{width} pixels, the model takes {expected}")
        return height // patch_height, width // patch_width

    def forward(
        self,
        images: Tensor,
        keep: Keep | None = None,
        *,
        view: Tensor | None = None,
        return_attention: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of the kept patches of each image.

        Args:
            images: (B, C, H, W), floating point, normalised as the model wants it.
            keep: which patches enter: indices (B, K), a boolean mask (B, N), or a list of B index tensors; None: all.
            view: integers (dy, dx, flip), one view (3,) for the batch or one an image (B, 3), on the images' device:
                the images are seen rolled by (dy, dx) pixels, then mirrored left-right if flip is 1. `keep` and the
                attention stay those of the plain image.
            return_attention: return the importance of the kept patches too.

        Returns:
            logits (B, num_classes) as timm's model gives them; with `return_attention` also the importance of each
            kept patch, float32, (B, K) aligned to `keep`, packed (T,) where images keep different numbers. Importance
            is the class token's attention in the last block, averaged over heads; without a class token the mean
            attention that a patch receives there, or the pooling query's attention (attention pooling). It carries no
            gradient. Patches that the forward pass has pruned have importance 0.

        Raises:
            ValueError: images or keep that do not fit the model or each other; the message names the value.
        """
        check_bypassed(self.model)
        self._check_images(images)
        batch_size = len(images)
        rows, columns = self.grid_size(images.shape[-2:])
        kept = pack_keep(keep, batch_size, rows * columns, images.device)
        patches, cells = kernels.gather_patches(
            images,
            kept.positions,
            kept.cu_seqlens,
            view,
            patch_size=self.model.patch_embed.patch_size,
            backend=self.backend,
        )
        tokens = PackedTokens(patches, cells, kept.cu_seqlens, kept.max_seqlen)
        return self._of_patches(tokens, (rows, columns), return_attention)

    def forward_patches(
        self, patches: PackedTokens, *, grid_size: tuple[int, int] | None = None, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of images that are given as patches alone, such as a batch of an `InvertedDataset`.

        Args:
            patches: values (T, C * patch height * patch width), normalised pixels in (C, height, width) order, at their
                positions in the grid.
            grid_size: (rows, columns) of the patch grid; None: the model's own.
            return_attention: as for `forward`.
        """
        check_bypassed(self.model)
        return self._of_patches(patches, tuple(grid_size or self.model.patch_embed.grid_size), return_attention)

    def _of_patches(
        self, patches: PackedTokens, grid_size: tuple[int, int], return_attention: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`forward_patches`, of a model that has been checked."""
        model = self.model
        uniform = patches.is_uniform and not any(isinstance(share, Mass) for share in self.prune.values())
        self._check_training(uniform)
        if not uniform and patches.batch_size > 1 and not self._packs():
            return self._one_by_one(patches, grid_size, return_attention)
        with self._autocast(patches.values.device):
            tokens = self._embed(patches, grid_size)
            x, attend = model.norm_pre(tokens.batch_or_values()), Attend(tokens, model.has_class_token, self.backend)
            *blocks, last = model.blocks
            for following, block in enumerate(blocks, start=1):
                attend.measures = following in self.prune
                x = _any_block(block, following - 1, x, attend)
                if attend.measures:
                    tokens = self._pruned(replace(tokens, values=x.flatten(0, -2)), attend, self.prune[following])
                    x, attend = tokens.batch_or_values(), Attend(tokens, model.has_class_token, self.backend)
            attend.measures = return_attention and not _pools_by_attention(model)
            queries = self._pooled_tokens(last)
            if queries is None or (queries > 1 and not tokens.is_uniform):
                x = _any_block(last, len(blocks), x, attend)
            else:
                x = _block_of_first_tokens(last, x, queries, attend)
            x = model.norm(x)
            if return_attention and _pools_by_attention(model):
                reason = obstacle_within_pool(model.attn_pool)
                if reason is not None:
                    raise UnsupportedModelError(f"attn_pool{reason}, so the attention within it cannot be measured")
                attend.measured = [_pooling_attention(model, x, attend)[None]]
            logits = self._head(x, attend)
        if not return_attention:
            return logits
        return logits, self._importance(attend.rows().mean(0), patches, tokens, grid_size)

    def _importance(
        self, importance: Tensor, patches: PackedTokens, tokens: PackedTokens, grid_size: tuple[int, int]
    ) -> Tensor:
        """The importance of the tokens that are left (T',), prefix tokens included, as that of the patches given."""
        prefix = self.model.num_prefix_tokens
        if tokens.is_uniform and not self.prune:
            return importance.view(-1, tokens.max_seqlen)[:, prefix:]
        # By way of the grid, from the patches that are left to those that were given.
        cells = prefix + grid_size[0] * grid_size[1]
        given, left = (
            sequence_of_tokens(packed.cu_seqlens, len(packed.values)) * cells + packed.positions + prefix
            for packed in (patches, tokens)
        )
        importance = importance.new_zeros(patches.batch_size * cells).index_copy(0, left, importance)[given]
        return importance.view(-1, patches.max_seqlen) if patches.is_uniform else importance

    def _packs(self) -> bool:
        """Whether tokens of several images may lie end to end: they see each other in plain attentions only."""
        model = self.model
        reasons = [obstacle_within(model.norm_pre), obstacle_within(model.norm)]
        reasons += [obstacle_within_block(block) for block in model.blocks]
        reasons += [] if model.attn_pool is None else [obstacle_within_pool(model.attn_pool)]
        return reasons.count(None) == len(reasons)

    def _one_by_one(
        self, patches: PackedTokens, grid_size: tuple[int, int], return_attention: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As `_of_patches`, image by image, so that hooks and foreign modules see (1, N, C); the host waits."""
        positions = patches.positions.split(patches.cu_seqlens.diff().tolist())
        outputs = [
            self._of_patches(PackedTokens.from_batch(values[None], cells), grid_size, return_attention)
            for values, cells in zip(patches.sequences(), positions, strict=True)
        ]
        if not return_attention:
            return torch.cat(outputs)
        logits, importance = (torch.cat([output[i].flatten(0, i) for output in outputs]) for i in range(2))
        return logits, importance.view(-1, patches.max_seqlen) if patches.is_uniform else importance

    def _pruned(self, tokens: PackedTokens, attend: Attend, share: float | Mass) -> PackedTokens:
        """Prefix tokens, and the patches with the most of the class token's attention in the block before."""
        prefix, k, mass = self.model.num_prefix_tokens, None, None
        if isinstance(share, Mass):
            mass = share.share
        elif tokens.is_uniform:
            k = max(1, kept_count(tokens.max_seqlen - prefix, share))
        else:
            k = [max(1, kept_count(length - prefix, share)) for length in tokens.cu_seqlens.diff().tolist()]
        selection = kernels.select_tokens(
            attend.rows(),
            tokens.values,
            tokens.positions,
            k=k,
            mass=mass,
            num_prefix_tokens=prefix,
            cu_seqlens=tokens.cu_seqlens,
            max_seqlen=tokens.max_seqlen,
            backend=self.backend,
        )
        return PackedTokens(selection.values, selection.positions, selection.cu_seqlens, selection.max_seqlen)

    def _embed(self, patches: PackedTokens, grid_size: tuple[int, int]) -> PackedTokens:
        """Patch embedding, position embedding and prefix tokens.

        Modifications: kept patches only, and a matrix product in the place of a convolution.
        """
        model, embed = self.model, self.model.patch_embed
        weight, bias = _weights(embed.proj)
        if patches.values.shape[1] != weight[0].numel():
            raise ValueError(
                f"patches have {patches.values.shape[1]} values each, the model's have {weight[0].numel()}"
            )
        embedded = embed.norm(linear(patches.values.to(weight.dtype), weight.flatten(1), bias))
        prefix = (model.cls_token, getattr(model, "dist_token", None), model.reg_token)  # (1, count, C) each, or None
        prefix = torch.cat([embedded[:0], *(tokens[0] for tokens in prefix if tokens is not None)])
        if model.pos_embed is not None:
            count = 0 if model.no_embed_class else model.num_prefix_tokens
            pos_embed = model.pos_embed
            if grid_size != tuple(embed.grid_size):
                pos_embed = resample_abs_pos_embed(pos_embed, grid_size, embed.grid_size, num_prefix_tokens=count)
            embedded = embedded + pos_embed[0, count:][patches.positions]
            if count:
                prefix = prefix + pos_embed[0, :count]
        tokens = prepend(prefix, replace(patches, values=embedded))
        return tokens if model.pos_embed is None else replace(tokens, values=model.pos_drop(tokens.values))

    def _pooled_tokens(self, block: nn.Module) -> int | None:
        """How many tokens, from the first, the head reads of the last block; None where something reads all."""
        if self.model.global_pool != "token" or type(block) is not Block or type(block.attn) is not Attention:
            return None
        if type(block.attn.qkv) is not nn.Linear or obstacle_within_block(block) or obstacle_within(self.model.norm):
            return None
        return 2 if isinstance(self.model, VisionTransformerDistilled) else 1

    def _head(self, x: Tensor, attend: Attend) -> Tensor:
        """timm's own pooling and classifier. Modifications: sequences (T, C) that differ in length are pooled here."""
        model = self.model
        if x.ndim == 3:
            return model.forward_head(x)
        if model.global_pool == "token":
            first = attend.cu_seqlens[:-1, None] + torch.arange(model.num_prefix_tokens, device=x.device)
            return model.forward_head(x[first])
        padded, mask = pad(x, attend.cu_seqlens, attend.max_seqlen)
        if not model.pool_include_prefix:
            padded, mask = padded[:, model.num_prefix_tokens :], mask[:, model.num_prefix_tokens :]
        if model.global_pool == "map":
            pooled = model.attn_pool(padded, attn_mask=mask[:, None, None])
        elif model.global_pool in ("avg", "max", "avgmax"):
            mean = padded.sum(1) / mask.sum(1, keepdim=True)
            largest = padded.masked_fill(~mask[..., None], float("-inf")).amax(1)
            pooled = {"avg": mean, "max": largest, "avgmax": 0.5 * (largest + mean)}[model.global_pool]
        else:
            raise ValueError(f"global_pool {model.global_pool!r} needs images that all keep the same number of patches")
        return model.head(model.head_drop(model.fc_norm(pooled)))

    @contextmanager
    def cast_weights(self, *, pack: bool = True) -> Iterator[None]:
        """For a time in which weights are frozen and do not change: those of matrix products are cast to the compute
        dtype once, not in every forward pass, and on a CPU are packed for its products, which torch.compile does not
        take. The numbers are the same; the copies take memory."""
        proj = patch_projection(self.model)
        pack = pack and can_pack(self.compute_dtype, proj.weight.device)
        sliced = getattr(getattr(self.model.blocks[-1], "attn", None), "qkv", None)  # which are read in part
        parts = [proj, *(module for module in self.model.modules() if obstacle(module, LINEAR) is None)]
        parts = [part for part in parts if not hasattr(part, "_cast_weights")]
        if self.compute_dtype == proj.weight.dtype and not pack:
            parts = []
        try:
            for part in parts:
                weight = part.weight.detach().to(self.compute_dtype)
                bias = None if part.bias is None else part.bias.detach().to(self.compute_dtype)
                if pack and type(part) is nn.Linear and part is not sliced:
                    weight = PackedWeight(weight)
                part._cast_weights = weight, bias
            yield
        finally:
            for part in parts:
                part.__dict__.pop("_cast_weights", None)

    def _autocast(self, device: torch.device):
        if self.compute_dtype == self.model.patch_embed.proj.weight.dtype:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.compute_dtype)

    def _check_images(self, images: Tensor) -> None:
        weight = self.model.patch_embed.proj.weight
        if images.ndim != 4 or images.shape[1] != weight.shape[1]:
            raise ValueError(f"images have shape {tuple(images.shape)}, expected (B, {weight.shape[1]}, H, W)")
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}, expected a floating point dtype")
        if images.device != weight.device:
            raise ValueError(f"images are on {images.device}, the model is on {weight.device}")

    def _check_training(self, uniform: bool) -> None:
        """Refuse what timm does at random while training and packed tokens cannot; it is never left out silently.

        Modes are timm's modules': each has its own, and `train()` on the timm model does not set that of this one.
        """
        if not (self.model.training or any(block.training for block in self.model.blocks)):
            return
        for name, module in self.model.named_modules():
            if not module.training:
                continue
            if isinstance(module, PatchDropout) and module.prob > 0:
                raise UnsupportedModelError(f"{name} drops patches while training: say which to keep instead")
            if name.endswith("attn_drop") and getattr(module, "p", 0) > 0:
                raise UnsupportedModelError(f"{name} drops attention while training, which the kernels do not")
            if isinstance(module, DropPath) and module.drop_prob and not uniform:
                raise UnsupportedModelError(
                    f"{name} drops whole images while training, which needs equally many patches"
                )


class Attend:
    """Attention within each sequence of a batch, and the importance that the block which measures leaves behind."""

    def __init__(self, tokens: PackedTokens, has_class_token: bool, backend: str):
        self.cu_seqlens, self.max_seqlen = tokens.cu_seqlens, tokens.max_seqlen
        self.has_class_token, self.backend = has_class_token, backend
        self.measures = False  # the block at hand is the one whose attention is asked for
        self.measured: list[Tensor] = []  # (heads or 1, T) float32, one for each attention of that block

    def rows(self) -> Tensor:
        """What was measured, (heads, T) float32; its mean over the heads is the importance."""
        return self.measured[0] if len(self.measured) == 1 else torch.cat(self.measured)

    def __call__(self, qkv: Tensor, scale: float) -> Tensor:
        """Attention of (T, 3, H, D) -> (T, H, D)."""
        if self.measures and self.has_class_token:
            out, rows = self.attention(qkv, scale, return_class_attention=True)
            self.measured.append(rows)
            return out
        if self.measures:
            self.measured.append(self.received(qkv[:, 0], qkv[:, 1], scale)[None])
        return self.attention(qkv, scale)

    def attention(self, qkv: Tensor, scale: float, **options) -> Tensor | tuple[Tensor, Tensor]:
        return kernels.attention(qkv, self.cu_seqlens, self.max_seqlen, scale=scale, backend=self.backend, **options)

    def first(self, x: Tensor, count: int) -> Tensor:
        """The first `count` tokens of each sequence: (B, N, C), or (T, C) and count 1 -> (B, count, C)."""
        return x[:, :count] if x.ndim == 3 else gather_rows(x, self.cu_seqlens[:-1].long())[:, None]

    def of_first(self, q: Tensor, kv: Tensor, scale: float) -> Tensor:
        """Attention of each sequence's first tokens: (B, count, H, D) and (T, 2, H, D) -> (B, count, H, D)."""
        count = q.shape[1]
        if count == 1:
            out, rows = kernels.class_attention(
                q[:, 0], kv, self.cu_seqlens, self.max_seqlen, scale=scale, return_attention=True, backend=self.backend
            )
            out = out[:, None]
        else:  # all sequences are equally long
            k, v = kv.unflatten(0, (len(q), -1)).unbind(2)  # [B, N, H, D] each
            exact = torch.promote_types(k.dtype, torch.float32)
            scores = torch.einsum("bqhd,bnhd->hbqn", q.to(exact), k.to(exact)) * scale
            attention = scores.softmax(-1)  # [H, B, count, N]
            out = torch.einsum("hbqn,bnhd->bqhd", attention.to(v.dtype), v)
            rows = attention[:, :, 0].detach().flatten(1).float()  # [H, T]
        if self.measures:
            self.measured.append(rows)
        return out

    @torch.no_grad()
    def received(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """The attention that each token gets, averaged over heads: (T, H, D) twice -> (T,) float32.

        From the class token; where there is none, from all tokens in the mean.
        """
        packed = len(q)
        q, mask = pad(q.float(), self.cu_seqlens, self.max_seqlen)  # [B, N, H, D], [B, N]
        k, _ = pad(k.float(), self.cu_seqlens, self.max_seqlen)
        asking = 1 if self.has_class_token else self.max_seqlen
        scores = torch.einsum("bqhd,bkhd->bhqk", q[:, :asking], k) * scale
        attention = scores.masked_fill(~mask[:, None, None], float("-inf")).softmax(-1)
        weights = mask[:, :asking].float()
        weights = weights / weights.sum(1, keepdim=True)
        received = torch.einsum("bhqk,bq->bk", attention, weights) / q.shape[2]  # [B, N]
        return unpad(received, self.cu_seqlens, packed)


def _attention(attn: Attention, x: Tensor, attend: Attend) -> Tensor:
    """timm's Attention. Modifications: x is (B, N, C) or packed (T, C); attention reads the qkv projection's layout."""
    qkv = _linear(attn.qkv, x).view(-1, 3, attn.num_heads, attn.head_dim)
    out = attend(_normalise_qk(attn, qkv), _scale(attn))
    out = attn.norm(out.view(*x.shape[:-1], attn.attn_dim))
    if attn.gate is not None:
        out = out * _linear(attn.gate, x).sigmoid()
    return attn.proj_drop(_linear(attn.proj, out))


def _scale(attn: nn.Module) -> float:
    """The factor that timm multiplies scores by. Its fused attention takes torch's default and ignores `attn.scale`."""
    return attn.head_dim**-0.5 if attn.fused_attn else attn.scale


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    """timm's Linear. Modifications: the product is ours; what is not a plain Linear, or no longer, runs as it is."""
    return linear(x, *_weights(module)) if obstacle(module, LINEAR) is None else module(x)


def _weights(module: nn.Module) -> tuple[Tensor | PackedWeight, Tensor | None]:
    """Weight and bias, cast already within `AcceleratedViT.cast_weights`."""
    return getattr(module, "_cast_weights", None) or (module.weight, module.bias)


def _mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    """timm's Mlp. Modifications: as for `_linear`; what is not a plain Mlp runs as it is."""
    if obstacle(mlp, MLP) is not None:
        return mlp(x)
    x = mlp.drop1(mlp.act(_linear(mlp.fc1, x)))
    return mlp.drop2(_linear(mlp.fc2, mlp.norm(x)))


def _normalise_qk(attn: nn.Module, qkv: Tensor) -> Tensor:
    """qk-norm of (T, 3, H, D), where the model has it."""
    if isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity):
        return qkv
    q, k, v = qkv.unbind(1)
    return torch.stack((attn.q_norm(q).to(v.dtype), attn.k_norm(k).to(v.dtype), v), dim=1)


def _diff_attention(attn: DiffAttention, x: Tensor, attend: Attend) -> Tensor:
    """timm's DiffAttention. Modifications: as for `_differential`."""
    q, k, v = _linear(attn.qkv, x).flatten(0, -2).chunk(3, dim=-1)
    out = attn.norm(_differential(attn, q, k, v, attend).view_as(x))
    return attn.proj_drop(_linear(attn.proj, out))


def _differential(
    attn: DiffAttention | DiffParallelScalingBlock, q: Tensor, k: Tensor, v: Tensor, attend: Attend
) -> Tensor:
    """Differential attention (Ye et al., 2024, Eq. 1) of (T, C) queries, keys and values -> (T, C).

    Modifications: values are twice as wide as queries; both halves of them ride as heads of their own, so that one call
    of the attention kernel does both softmaxes.
    """
    heads, head_dim = attn.num_heads, attn.head_dim
    q1, q2 = attn.q_norm(q.view(-1, heads, 2, head_dim)).to(v.dtype).unbind(2)  # [T, H, D] each
    k1, k2 = attn.k_norm(k.view(-1, heads, 2, head_dim)).to(v.dtype).unbind(2)
    va, vb = v.view(-1, heads, 2, head_dim).unbind(2)
    qkv = torch.stack(
        (torch.cat((q1, q1, q2, q2), 1), torch.cat((k1, k1, k2, k2), 1), torch.cat((va, vb) * 2, 1)), dim=1
    )
    first_a, first_b, second_a, second_b = attend.attention(qkv, _scale(attn)).chunk(4, dim=1)
    weight = attn._compute_lambda().type_as(q)
    out = torch.cat((first_a, first_b), -1) - weight * torch.cat((second_a, second_b), -1)  # [T, H, 2 D]
    if attend.measures:
        received = attend.received(q1, k1, _scale(attn)) - weight.detach().float() * attend.received(
            q2, k2, _scale(attn)
        )
        attend.measured.append(received[None])
    return (attn.sub_norm(out) * (1 - attn.lambda_init)).flatten(1)


def _any_block(block: nn.Module, number: int, x: Tensor, attend: Attend) -> Tensor:
    """A block our way where what is bypassed in it is plain; else as it is, which leaves no attention to measure."""
    reason = block_obstacle(block)
    if reason is None:
        return BLOCKS[type(block)](block, x, attend)
    if attend.measures:
        raise UnsupportedModelError(f"blocks[{number}]{reason}, so the attention within it cannot be measured")
    return block(x)


def _block(block: Block, x: Tensor, attend: Attend) -> Tensor:
    """timm's Block. Modifications: attention is ours."""
    x = x + block.drop_path1(block.ls1(ATTENTIONS[type(block.attn)](block.attn, block.norm1(x), attend)))
    return x + block.drop_path2(block.ls2(_mlp(block.mlp, block.norm2(x))))


def _block_of_first_tokens(block: Block, x: Tensor, count: int, attend: Attend) -> Tensor:
    """timm's Block where only the first `count` tokens of its output are used: (B, N, C) or (T, C) -> (B, count, C).

    Modifications: keys and values for all tokens, everything else for those few.
    """
    attn, normed = block.attn, block.norm1(x)
    first = attend.first(normed, count)  # [B, count, C]
    weight, bias = _weights(attn.qkv)
    width = attn.attn_dim
    q = linear(first, weight[:width], None if bias is None else bias[:width])
    kv = linear(normed, weight[width:], None if bias is None else bias[width:])
    q = attn.q_norm(q.unflatten(-1, (attn.num_heads, attn.head_dim)))  # [B, count, H, D]
    kv = kv.flatten(0, -2).unflatten(-1, (2, attn.num_heads, attn.head_dim))  # [T, 2, H, D]
    if not isinstance(attn.k_norm, nn.Identity):
        k, v = kv.unbind(1)
        kv = torch.stack((attn.k_norm(k).to(v.dtype), v), 1)
    out = attn.norm(attend.of_first(q.to(kv.dtype), kv, _scale(attn)).flatten(2))
    if attn.gate is not None:
        out = out * _linear(attn.gate, first).sigmoid()
    x = attend.first(x, count) + block.drop_path1(block.ls1(attn.proj_drop(_linear(attn.proj, out))))
    return x + block.drop_path2(block.ls2(_mlp(block.mlp, block.norm2(x))))


def _res_post_block(block: ResPostBlock, x: Tensor, attend: Attend) -> Tensor:
    """timm's ResPostBlock. Modifications: attention is ours."""
    x = x + block.drop_path1(block.norm1(ATTENTIONS[type(block.attn)](block.attn, x, attend)))
    return x + block.drop_path2(block.norm2(_mlp(block.mlp, x)))


def _parallel_scaling_block(block: ParallelScalingBlock, x: Tensor, attend: Attend) -> Tensor:
    """timm's ParallelScalingBlock. Modifications: attention reads q, k and v where the joint projection left them."""
    mlp, qkv = _linear(block.in_proj, block.in_norm(x)).split((block.in_split[0], sum(block.in_split[1:])), dim=-1)
    qkv = qkv.flatten(0, -2).unflatten(-1, (3, block.num_heads, block.head_dim))
    out = attend(_normalise_qk(block, qkv), _scale(block)).view_as(x)
    mlp = block.mlp_drop(block.mlp_act(mlp if block.mlp_bias is None else mlp + block.mlp_bias))
    if block.out_proj is not None:
        out = _linear(block.out_proj, torch.cat((out, mlp), dim=-1))
    else:
        out = _linear(block.attn_out_proj, out) + _linear(block.mlp_out_proj, mlp)
    return x + block.drop_path(block.ls(out))


def _diff_parallel_scaling_block(block: DiffParallelScalingBlock, x: Tensor, attend: Attend) -> Tensor:
    """timm's DiffParallelScalingBlock. Modifications: as for `_differential`."""
    mlp, q, k, v = _linear(block.in_proj, block.in_norm(x)).split(block.in_split, dim=-1)
    out = _differential(block, q.flatten(0, -2), k.flatten(0, -2), v.flatten(0, -2), attend).view_as(x)
    mlp = block.mlp_drop(block.mlp_act(mlp if block.mlp_bias is None else mlp + block.mlp_bias))
    return x + block.drop_path(block.ls(_linear(block.out_proj, torch.cat((out, mlp), dim=-1))))


def _parallel_things_block(block: ParallelThingsBlock, x: Tensor, attend: Attend) -> Tensor:
    """timm's ParallelThingsBlock. Modifications: attention is ours."""
    branches = [b.drop_path(b.ls(ATTENTIONS[type(b.attn)](b.attn, b.norm(x), attend))) for b in block.attns]
    x = x + torch.stack(branches).sum(0)
    return x + torch.stack([ffn(x) for ffn in block.ffns]).sum(0)


ATTENTIONS: dict[type, Callable[[nn.Module, Tensor, Attend], Tensor]] = {
    Attention: _attention,
    DiffAttention: _diff_attention,
}
BLOCKS: dict[type, Callable[[nn.Module, Tensor, Attend], Tensor]] = {
    Block: _block,
    ResPostBlock: _res_post_block,
    ParallelScalingBlock: _parallel_scaling_block,
    DiffParallelScalingBlock: _diff_parallel_scaling_block,
    ParallelThingsBlock: _parallel_things_block,
}


def check_prune(model: VisionTransformer, prune: Prune) -> dict[int, float | Mass]:
    """`prune` for a supported model; raises as `accelerate` says."""
    if prune and not model.has_class_token:
        raise UnsupportedModelError("the model has no class token, by whose attention patches are pruned")
    checked, last = {}, len(model.blocks) - 1
    for number, share in prune.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= last:
            raise ValueError(f"prune names block {number!r}: patches are pruned before one of blocks 1 to {last}")
        if not isinstance(share, Mass) and not (isinstance(share, (int, float)) and 0 < share < 1):
            raise ValueError(f"prune before block {number} must be a fraction in (0, 1) or a Mass, got {share!r}")
        for part in model.blocks[number - 1].modules():
            if isinstance(part, (DiffParallelScalingBlock, DiffAttention)):
                raise UnsupportedModelError(
                    f"blocks[{number - 1}] holds a {type(part).__name__}, whose difference of two attentions is no "
                    f"attention of the class token to prune by before block {number}"
                )
        checked[number] = share
    return checked


def _pools_by_attention(model: VisionTransformer) -> bool:
    """Whether importance is the pooling query's attention: attention pooling, and no class token."""
    return model.global_pool == "map" and not model.has_class_token


@torch.no_grad()
def _pooling_attention(model: VisionTransformer, x: Tensor, attend: Attend) -> Tensor:
    """The attention of the pooling query to each token, averaged over heads: (B, N, C) or (T, C) -> (T,) float32."""
    pool: AttentionPoolLatent = model.attn_pool
    tokens = x.flatten(0, -2)
    padded, mask = pad(tokens, attend.cu_seqlens, attend.max_seqlen)  # [B, N, C], [B, N]
    if not model.pool_include_prefix:
        mask = mask & (torch.arange(attend.max_seqlen, device=x.device) >= model.num_prefix_tokens)
    q = pool.q_norm(pool.q(pool.latent).view(-1, pool.num_heads, pool.head_dim))  # [L, H, D]
    k = F.linear(padded, *(None if p is None else p.chunk(2)[0] for p in (pool.kv.weight, pool.kv.bias)))
    k = pool.k_norm(k.unflatten(-1, (pool.num_heads, pool.head_dim)))  # [B, N, H, D]
    scores = torch.einsum("lhd,bnhd->bhln", q.float(), k.float()) * _scale(pool)
    attention = scores.masked_fill(~mask[:, None, None], float("-inf")).softmax(-1)
    return unpad(attention.mean((1, 2)), attend.cu_seqlens, len(tokens))
