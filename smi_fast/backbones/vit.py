"""accelerate(): timm's ViT and DeiT on packed, pruned batches.

The timm model keeps its weights and its modules. Only the forward passes of its blocks are replaced, by those in
`timm_blocks.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from timm.data import resolve_data_config
from timm.layers import Attention, DropPath, PatchDropout, resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from smi_fast import kernels
from smi_fast.backbones.base import Backbone, Outputs
from smi_fast.backbones.importance import Attend, pooling_attention, pools_by_attention
from smi_fast.backbones.pruning import Mass, Prune, check_prune, keep_highest
from smi_fast.backbones.support import (
    LINEAR,
    UnsupportedModelError,
    check_bypassed,
    check_supported,
    obstacle,
    obstacle_within,
    obstacle_within_block,
    obstacle_within_pool,
    patch_projection,
)
from smi_fast.backbones.timm_blocks import any_block, block_of_first_tokens, weights
from smi_fast.grid import PatchGrid
from smi_fast.kernels.linear import PackedWeight, can_pack, linear
from smi_fast.packed import Keep, PackedTokens, pack_keep


def accelerate(
    model: nn.Module, dtype: torch.dtype | None = None, backend: str = "auto", prune: Prune | None = None
) -> AcceleratedViT:
    """Make a timm VisionTransformer or DeiT fast on pruned batches, without changing its numbers.

    With `prune` the forward pass itself drops patches, as EViT does (Liang et al., 2022), but without EViT's fused
    token and without retraining. Before block b it drops the patches to which the class token attends least in block
    b - 1, averaged over heads. The patches that are left go on as a packed batch.

    Hooks, wrapped or subclassed modules and patched forward methods act as they do in timm, and may come and go at any
    time. A module that is not one of timm's plain modules is called as it is, on tokens (B, N, C) of the kept patches,
    which may be slower. If the images of a batch keep different numbers of patches, they then run one by one, as
    (1, N, C). The forward pass raises UnsupportedModelError for changes that it would have to ignore: changes of the
    model itself, its patch embedding or the container of its blocks; global module hooks; and a changed attention in a
    block that measures importance or prunes. torch.compile looks for hooks when it compiles. It looks for later ones
    only if `torch._dynamo.config.skip_nnmodule_hook_guards` is False.

    Args:
        model: a model from timm's modules `vision_transformer` or `deit`. Its weights are shared, not copied.
        dtype: the dtype of the matrix products: torch.float32, bfloat16 or float16. None means the weights' own dtype
            if that is not float32, bfloat16 on GPUs that have it in hardware, and float32 elsewhere.
        backend: "auto" (Triton on CUDA, plain torch elsewhere), "triton" or "torch".
        prune: maps the number of a block, from 1 to the last, to what is pruned before it. A fraction in (0, 1) leaves
            int(n * (1 - fraction)) of n patches, at least one. `Mass(p)` leaves the fewest patches that hold a share p
            of the attention, and their number can differ between images. See `select_patches`.

    Raises:
        UnsupportedModelError: the model has a part that is not known, or has no class token whose attention could
            decide what is pruned. The message names the part.
        ValueError: the backend is unknown, the weights do not allow the dtype, or a block or share is out of range.
    """
    return AcceleratedViT(model, dtype=dtype, backend=backend, prune=prune)


def as_backbone(model: nn.Module, dtype: torch.dtype | None = None, backend: str = "auto") -> Backbone:
    """Return a model that the loop can invert: a `Backbone` unchanged, or the accelerated form of a timm model.

    Raises:
        ValueError: a dtype or backend is given for a model that is accelerated already.
        UnsupportedModelError: see `accelerate`.
    """
    if not isinstance(model, Backbone):
        return accelerate(model, dtype=dtype, backend=backend)
    if dtype is not None or backend != "auto":
        raise ValueError(f"the model is accelerated already: dtype={dtype} and backend={backend!r} come too late")
    return model


class AcceleratedViT(nn.Module):
    """A timm ViT that computes only on kept patches, made by `accelerate`. Its attribute `model` is the timm model."""

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
    def _weight(self) -> Tensor:
        """The weight (embed_dim, C, ph, pw) of the patch embedding, which has the model's device and dtype."""
        return self.model.patch_embed.proj.weight

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._weight.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the matrix products on the device where the weights are now."""
        if self._dtype is not None:
            return self._dtype
        weight = self._weight
        if (
            weight.dtype == torch.float32
            and weight.is_cuda
            and torch.cuda.get_device_capability(weight.device) >= (8, 0)
        ):
            return torch.bfloat16
        return weight.dtype

    @property
    def num_channels(self) -> int:
        """The number of channels of an image."""
        return self._weight.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels of the images that the model was made for."""
        return tuple(self.model.patch_embed.img_size or resolve_data_config(model=self.model)["input_size"][1:])

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean by which images are normalised, one number per channel, from timm's data config of the model."""
        return tuple(resolve_data_config(model=self.model)["mean"])

    @property
    def std(self) -> tuple[float, ...]:
        """The standard deviation by which images are normalised, in the same form as `mean`."""
        return tuple(resolve_data_config(model=self.model)["std"])

    @property
    def num_classes(self) -> int:
        """The number of logits per image."""
        return self.model.num_classes

    @property
    def num_prefix_tokens(self) -> int:
        """The number of class, distillation and register tokens per image."""
        return self.model.num_prefix_tokens

    def grid(self, image_size: Sequence[int]) -> PatchGrid:
        """Return the patch grid of images of (H, W) pixels.

        Raises:
            ValueError: the patches do not divide the images, or the model takes only images of another size.
        """
        embed = self.model.patch_embed
        grid = PatchGrid.of(image_size, embed.patch_size)
        if embed.strict_img_size and embed.img_size is not None and tuple(embed.img_size) != grid.image_size:
            expected = "x".join(map(str, embed.img_size))
            raise ValueError(f"images have {'x'.join(map(str, image_size))} pixels, the model takes {expected}")
        return grid

    def forward(
        self,
        images: Tensor,
        keep: Keep | None = None,
        *,
        view: Tensor | None = None,
        return_attention: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the logits of each image from its kept patches.

        Args:
            images: (B, C, H, W), floating point, normalised as the model wants it.
            keep: the patches to keep: indices (B, K), a boolean mask (B, N), or a list of B index tensors. None: all.
            view: integers (dy, dx, flip) on the images' device, (3,) for one view of the whole batch or (B, 3) for one
                of each image. The model sees images rolled by (dy, dx) pixels and then, if flip is 1, mirrored
                left-right. `keep` and the attention refer to the plain images.
            return_attention: whether to return the importance of the kept patches too.

        Returns:
            The logits (B, num_classes) as timm's model gives them. With `return_attention` also the importance of the
            kept patches, float32, (B, K) aligned to `keep`, or packed (T,) if images keep different numbers. Importance
            is the class token's attention in the last block, averaged over heads. Without a class token, it is the mean
            attention that a patch receives there, or the pooling query's attention if the model pools by attention. It
            carries no gradient. Patches that the forward pass has pruned have importance 0.

        Raises:
            ValueError: images or `keep` do not fit the model or each other. The message names the value.
        """
        check_bypassed(self.model)
        self._check_images(images)
        grid = self.grid(images.shape[-2:])
        kept = pack_keep(keep, len(images), grid.num_patches, images.device)
        patches, cells = kernels.gather_patches(
            images, kept.positions, kept.cu_seqlens, view, patch_size=grid.patch_size, backend=self.backend
        )
        outputs = self._outputs(replace(kept, values=patches, positions=cells), grid.size, return_attention)
        return _with_attention(outputs, kept) if return_attention else outputs.logits

    def forward_patches(
        self, patches: PackedTokens, *, grid_size: tuple[int, int] | None = None, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the logits of images that are given as patches only, such as a batch of an `InvertedDataset`.

        Args:
            patches: values (T, C * patch height * patch width), normalised pixels in (C, height, width) order, at their
                positions in the grid.
            grid_size: (rows, columns) of the patch grid. None: the model's own.
            return_attention: see `forward`.
        """
        outputs = self.outputs(patches, grid_size=grid_size, importance=return_attention)
        return _with_attention(outputs, patches) if return_attention else outputs.logits

    def outputs(
        self,
        patches: PackedTokens,
        *,
        grid_size: tuple[int, int] | None = None,
        importance: bool = False,
        features: Sequence[str] = (),
    ) -> Outputs:
        """Run `forward_patches` and return everything that a loss may need, as the `Backbone` protocol asks.

        Args:
            importance: whether to measure the importance (T,) of the patches.
            features: names "blocks.N", with N from 0, of the blocks whose output tokens (T', C) are returned, prefix
                tokens included, at their positions. Features that are not requested cost nothing.

        Raises:
            ValueError: the patches do not fit the model, or a feature has another name.
        """
        check_bypassed(self.model)
        known = [f"blocks.{number}" for number in range(len(self.model.blocks))]
        for name in features:
            if name not in known:
                raise ValueError(f"there is no feature {name!r}: the model has {known[0]} to {known[-1]}")
        return self._outputs(patches, tuple(grid_size or self.model.patch_embed.grid_size), importance, features)

    def _outputs(
        self, patches: PackedTokens, grid_size: tuple[int, int], importance: bool, features: Sequence[str] = ()
    ) -> Outputs:
        """Compute `outputs` after the model and the names have been checked."""
        model = self.model
        uniform = patches.is_uniform and not any(isinstance(stop, Mass) for stop in self.prune.values())
        self._check_training(uniform)
        if not uniform and patches.batch_size > 1 and not self._packs():
            return self._one_by_one(patches, grid_size, importance, features)
        found: dict[str, PackedTokens] = {}
        with self._autocast(patches.values.device):
            tokens = self._embed(patches, grid_size)
            x, attend = model.norm_pre(tokens.batch_or_values()), Attend(tokens, model.has_class_token, self.backend)
            *blocks, last = model.blocks
            for number, block in enumerate(blocks):
                stop = self.prune.get(number + 1)
                attend.measures = stop is not None
                x = any_block(block, number, x, attend)
                if f"blocks.{number}" in features:
                    found[f"blocks.{number}"] = replace(tokens, values=x.flatten(0, -2))
                if stop is not None:
                    tokens = replace(tokens, values=x.flatten(0, -2))
                    tokens = keep_highest(
                        tokens, attend.rows(), stop, num_prefix_tokens=model.num_prefix_tokens, backend=self.backend
                    )
                    x, attend = tokens.batch_or_values(), Attend(tokens, model.has_class_token, self.backend)
            attend.measures = importance and not pools_by_attention(model)
            name = f"blocks.{len(blocks)}"
            queries = None if name in features else self._pooled_tokens(last)
            if queries is None or (queries > 1 and not tokens.is_uniform):
                x = any_block(last, len(blocks), x, attend)
            else:
                x = block_of_first_tokens(last, x, queries, attend)
            if name in features:
                found[name] = replace(tokens, values=x.flatten(0, -2))
            x = model.norm(x)
            if importance and pools_by_attention(model):
                reason = obstacle_within_pool(model.attn_pool)
                if reason is not None:
                    raise UnsupportedModelError(f"attn_pool{reason}, so the attention within it cannot be measured")
                attend.measured = [pooling_attention(model, x, tokens)[None]]
            logits = self._head(x, tokens)
        measured = self._importance(attend.rows().mean(0), patches, tokens, grid_size) if importance else None
        return Outputs(logits, measured, found)

    def _importance(
        self, importance: Tensor, patches: PackedTokens, tokens: PackedTokens, grid_size: tuple[int, int]
    ) -> Tensor:
        """Map the importance (T',) of the tokens that are left, prefix tokens included, to the patches given."""
        prefix = self.model.num_prefix_tokens
        if tokens.is_uniform and not self.prune:
            return importance.view(-1, tokens.max_seqlen)[:, prefix:].flatten()
        # The cells of the grid connect the patches that are left with the patches that were given.
        cells = prefix + grid_size[0] * grid_size[1]
        given, left = (packed.owners() * cells + packed.positions + prefix for packed in (patches, tokens))
        return importance.new_zeros(patches.batch_size * cells).index_copy(0, left, importance)[given]

    def _packs(self) -> bool:
        """Return whether tokens of several images may be packed: they may if only plain attentions mix tokens."""
        model = self.model
        reasons = [obstacle_within(model.norm_pre), obstacle_within(model.norm)]
        reasons += [obstacle_within_block(block) for block in model.blocks]
        reasons += [] if model.attn_pool is None else [obstacle_within_pool(model.attn_pool)]
        return reasons.count(None) == len(reasons)

    def _one_by_one(
        self, patches: PackedTokens, grid_size: tuple[int, int], importance: bool, features: Sequence[str]
    ) -> Outputs:
        """Run `_outputs` image by image, so that hooks and foreign modules see (1, N, C). The host waits."""
        outputs = [self._outputs(image, grid_size, importance, features) for image in patches.groups(1)]
        found = {name: [output.features[name] for output in outputs] for name in features}
        return Outputs(
            logits=torch.cat([output.logits for output in outputs]),
            importance=torch.cat([output.importance for output in outputs]) if importance else None,
            features={
                name: PackedTokens.from_sequences([x.values for x in images], [x.positions for x in images])
                for name, images in found.items()
            },
        )

    def _embed(self, patches: PackedTokens, grid_size: tuple[int, int]) -> PackedTokens:
        """timm's patch embedding, position embedding and prefix tokens.

        Modifications: only kept patches are embedded, by a matrix product instead of a convolution.
        """
        model, embed = self.model, self.model.patch_embed
        weight, bias = weights(embed.proj)
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
        tokens = replace(patches, values=embedded).prepend(prefix)
        return tokens if model.pos_embed is None else replace(tokens, values=model.pos_drop(tokens.values))

    def _pooled_tokens(self, block: nn.Module) -> int | None:
        """Return how many of the last block's first tokens the head reads, or None if it may read all tokens."""
        if self.model.global_pool != "token" or type(block) is not Block or type(block.attn) is not Attention:
            return None
        if type(block.attn.qkv) is not nn.Linear or obstacle_within_block(block) or obstacle_within(self.model.norm):
            return None
        return 2 if isinstance(self.model, VisionTransformerDistilled) else 1

    def _head(self, x: Tensor, tokens: PackedTokens) -> Tensor:
        """timm's pooling and classifier. Modifications: packed sequences (T, C) are pooled here."""
        model = self.model
        if x.ndim == 3:
            return model.forward_head(x)
        if model.global_pool == "token":
            first = tokens.cu_seqlens[:-1, None] + torch.arange(model.num_prefix_tokens, device=x.device)
            return model.forward_head(x[first])
        padded, mask = tokens.pad(x)
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
        """Return a context in which weights are cast only once. They must not change while it lasts.

        The weights of matrix products are cast to the compute dtype once, not in every forward pass. On a CPU they are
        also laid out for its products, unless `pack` is False, because torch.compile does not accept that layout. The
        results are the same, but the copies take memory.
        """
        proj = patch_projection(self.model)
        pack = pack and can_pack(self.compute_dtype, proj.weight.device)
        sliced = getattr(getattr(self.model.blocks[-1], "attn", None), "qkv", None)  # its rows are read in parts
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
        if self.compute_dtype == self._weight.dtype:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.compute_dtype)

    def _check_images(self, images: Tensor) -> None:
        weight = self._weight
        if images.ndim != 4 or images.shape[1] != weight.shape[1]:
            raise ValueError(f"images have shape {tuple(images.shape)}, expected (B, {weight.shape[1]}, H, W)")
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}, expected a floating point dtype")
        if images.device != weight.device:
            raise ValueError(f"images are on {images.device}, the model is on {weight.device}")

    def _check_training(self, uniform: bool) -> None:
        """Refuse the random operations of timm's training mode that are not possible on packed tokens.

        The modes of timm's modules count, because `train()` on the timm model does not set the mode of this module.
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


def _with_attention(outputs: Outputs, patches: PackedTokens) -> tuple[Tensor, Tensor]:
    """Return the logits, and importance as (B, K) if images have equally many patches, otherwise packed (T,)."""
    importance = outputs.importance
    return outputs.logits, importance.view(patches.batch_size, patches.max_seqlen) if patches.is_uniform else importance
