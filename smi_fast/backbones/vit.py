"""accelerate(): timm's ViT and DeiT on packed, pruned batches.

The result is a timm model with the same modules and weights. Only the forward pass is replaced, by the functions of
`embedding.py` and `timm_blocks.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from types import MappingProxyType, MethodType, SimpleNamespace
from typing import Any

import torch
from timm.data import resolve_data_config
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smi_fast import kernels
from smi_fast.backbones.attend import Attend
from smi_fast.backbones.base import Outputs, autocast_to, check_dtype, compute_dtype
from smi_fast.backbones.casting import cast_weights
from smi_fast.backbones.embedding import embed
from smi_fast.backbones.features import parts_of_blocks
from smi_fast.backbones.heads import head, pooled_tokens
from smi_fast.backbones.importance import pooling_attention, pools_by_attention
from smi_fast.backbones.pruning import Drop, Merge, Prune, check_prune
from smi_fast.backbones.stream import Stream, normalise
from smi_fast.backbones.support import (
    PLAIN,
    SEQUENTIAL,
    UnsupportedModelError,
    block_obstacle,
    call,
    changed_method,
    check_bypassed,
    check_called,
    check_embeds_patches,
    check_supported,
    embedding_obstacle,
    has_random_patches,
    num_channels,
    obstacle,
    obstacle_within,
    obstacle_within_block,
    obstacle_within_pool,
)
from smi_fast.backbones.timm_blocks import any_block, block_of_first_tokens
from smi_fast.backbones.tracing import leaf_functions, trace_as_timms
from smi_fast.grid import PatchGrid
from smi_fast.kernels.backend import FLOATS
from smi_fast.packed import Keep, PackedTokens, all_patches, check_patches, pack_keep


def accelerate(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    prune: Prune | None = None,
    *,
    inplace: bool = False,
) -> AcceleratedViT:
    """Make a timm VisionTransformer or DeiT fast on pruned batches, without changing its numbers.

    The result is a timm model: its class derives from the class of `model`, so that it has timm's attributes, methods
    and state_dict. It has the same modules and parameters, and `model` stays as it was. The two share what lies in
    modules and parameters: training one trains the other. They do not share attributes and hooks of the models
    themselves and of their patch embeddings: after `reset_classifier`, `set_input_size`, `load_state_dict(assign=True)`
    or a new hook on one of them, the other is as it was.

    With `prune` the forward pass itself drops patches, as EViT does (Liang et al., 2022), or merges them, as ToMe does
    (Bolya et al., 2023), without retraining. Before block b it drops the patches to which the class token attends least
    in block b - 1, averaged over heads, or merges those with similar keys in block b - 1. Both happen within block
    b - 1, between its attention and its MLP, if all parts of that block are plain or if they are defined there,
    otherwise after it. The patches that are left go on as a packed batch.

    Hooks, wrapped or subclassed modules and patched methods act as they do in timm, and may come and go at any time. A
    module that is not one of timm's plain modules is called as it is, on tokens (B, N, C) of the kept patches, which
    may be slower. If the images of a batch keep different numbers of patches, they then run one by one, as (1, N, C).
    A changed patch embedding is called on whole images. The forward pass raises UnsupportedModelError for changes that
    it would have to ignore: global module hooks, replaced methods of timm's classes, and a changed attention in a block
    that measures importance or prunes. torch.compile looks for hooks when it compiles. It looks for later ones only if
    `torch._dynamo.config.skip_nnmodule_hook_guards` is False.

    Args:
        model: a model from timm's modules `vision_transformer` or `deit`. Its weights are shared, not copied.
        dtype: the dtype of the matrix products: torch.float32, bfloat16 or float16. None means the weights' own dtype
            if that is not float32, bfloat16 on GPUs that have it in hardware, and float32 elsewhere.
        backend: "auto" (Triton on CUDA, plain torch elsewhere), "triton" or "torch".
        prune: maps the number of a block, from 1 to the last, to what is pruned before it. A fraction in (0, 1) leaves
            int(n * (1 - fraction)) of n patches, at least one. An integer is the number of patches that stay. `Mass(p)`
            leaves the fewest patches that hold a share p of the attention, and their number can differ between images.
            A function of (tokens, positions, importance) returns scores, and the patches of positive score stay. `Drop`
            combines these and has EViT's rounding and fused token. `Merge(r)` merges r patches into others.
        inplace: turn the given object itself, and return it. `restore` turns it back.

    Raises:
        UnsupportedModelError: the model has a part that is not known, has no class token whose attention could decide
            what is pruned, or cannot fuse or merge in a block. The message names the part.
        ValueError: the backend is unknown, the weights do not allow the dtype, or a value in `prune` is out of range.
            The message names the block and the value.
    """
    if isinstance(model, AcceleratedViT):
        raise UnsupportedModelError("the model is accelerated already: for other settings, pass its .model")
    check_supported(model)
    parameter = next(model.parameters())
    kernels.resolve_backend(backend, parameter.device)
    check_dtype(parameter, dtype)
    settings = {"_prune": check_prune(model, prune or {}), "_backend": backend, "_dtype": dtype}
    fast = model
    if not inplace:
        fast = _with_same_modules(model)
        fast.patch_embed = _with_same_modules(model.patch_embed)  # set_input_size changes it
    fast.__class__ = ACCELERATED[type(model)]
    fast.__dict__.update(settings)
    return fast


def restore(model: AcceleratedViT) -> VisionTransformer:
    """Turn an accelerated model back into timm's, in place, and return it.

    Raises:
        TypeError: the model is not accelerated.
    """
    if type(model) not in TIMM_CLASSES:
        kind = type(model)
        raise TypeError(f"the model is a {kind.__module__}.{kind.__qualname__}, not one that accelerate has made")
    model.__class__ = TIMM_CLASSES[type(model)]
    for setting in SETTINGS:
        model.__dict__.pop(setting, None)
    return model


def _with_same_modules(module: nn.Module) -> nn.Module:
    """Return another module of the same class, with the same parameters, submodules and hooks in dicts of its own."""
    copy = object.__new__(type(module))
    copy.__dict__ = {
        name: value.copy() if isinstance(value, (dict, set)) else value for name, value in module.__dict__.items()
    }
    for name, value in copy.__dict__.items():
        if isinstance(value, MethodType) and value.__self__ is module:  # a method that was set on the object
            copy.__dict__[name] = MethodType(value.__func__, copy)
    copy._compiled_call_impl = None  # what model.compile() has made of the other one
    return copy


class AcceleratedViT(VisionTransformer):
    """timm's VisionTransformer with a forward pass that computes only on kept patches, made by `accelerate`.

    Everything but the forward pass is timm's: attributes, methods, parameters and the keys of the state_dict.
    """

    # The settings, which `accelerate` writes into the object and `restore` takes out of it.
    _backend: str = "auto"
    _prune: Mapping[int, Drop | Merge] = MappingProxyType({})
    _dtype: torch.dtype | None = None

    @property
    def model(self) -> VisionTransformer:
        """An object of timm's own class with the same modules, parameters and hooks, and with the attributes of now.

        Raises:
            UnsupportedModelError: something, such as a parametrisation of the model itself, has changed the class.
        """
        if type(self) not in TIMM_CLASSES:
            raise UnsupportedModelError(f"the model has become a {type(self).__name__}, which is not a class of timm's")
        model = object.__new__(TIMM_CLASSES[type(self)])
        model.__dict__ = {name: value for name, value in self.__dict__.items() if name not in SETTINGS}
        model._compiled_call_impl = None
        return model

    @property
    def backend(self) -> str:
        """The backend of the kernels: "auto", "triton" or "torch"."""
        return self._backend

    @property
    def prune(self) -> Mapping[int, Drop | Merge]:
        """What is dropped or merged before which block. A new value is checked as `accelerate` checks it."""
        return MappingProxyType(self._prune)

    @prune.setter
    def prune(self, prune: Prune | None) -> None:
        self._prune = check_prune(self, prune or {})

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._parameter.device

    @property
    def _parameter(self) -> nn.Parameter:
        """A parameter, which has the model's device and dtype."""
        for parameter in self._parameters.values():  # without the search through all modules, if possible
            if parameter is not None:
                return parameter
        return next(self.parameters())

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the matrix products on the device where the weights are now."""
        return compute_dtype(self._parameter, self._dtype)

    @property
    def patch_dtype(self) -> torch.dtype:
        """The dtype of the patches that the inversion loop hands over."""
        return self.compute_dtype

    @property
    def is_plain(self) -> bool:
        """Whether all modules are timm's and torch's own, without hooks or methods of others."""
        model, *parts = self.modules()
        return obstacle(model, tuple(TIMM_CLASSES)) is None and all(obstacle(part, PLAIN) is None for part in parts)

    @property
    def num_channels(self) -> int:
        """The number of channels of an image."""
        return num_channels(self.patch_embed)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels of the images that the model was made for."""
        return tuple(self.patch_embed.img_size or resolve_data_config(model=self)["input_size"][1:])

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean by which images are normalised, one number per channel, from timm's data config of the model."""
        return tuple(resolve_data_config(model=self)["mean"])

    @property
    def std(self) -> tuple[float, ...]:
        """The standard deviation by which images are normalised, in the same form as `mean`."""
        return tuple(resolve_data_config(model=self)["std"])

    def grid(self, image_size: Sequence[int]) -> PatchGrid:
        """Return the patch grid of images of (H, W) pixels.

        Raises:
            ValueError: the patches do not divide the images, or the model takes only images of another size.
        """
        embed = self.patch_embed
        grid = PatchGrid.of(image_size, embed.patch_size)
        if embed.strict_img_size and embed.img_size is not None and tuple(embed.img_size) != grid.image_size:
            expected = "x".join(map(str, embed.img_size))
            raise ValueError(f"images have {'x'.join(map(str, image_size))} pixels, the model takes {expected}")
        return grid

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        keep: Keep | None = None,
        view: Tensor | None = None,
        return_attention: bool = False,
        features: Sequence[str] = (),
    ) -> Tensor | tuple:
        """Compute the logits of each image from its kept patches.

        Args:
            x: images (B, C, H, W), floating point, normalised as the model wants it.
            attn_mask, is_causal: timm's restrictions of attention. With them timm's own forward pass runs.
            keep: the patches to keep: indices (B, K), a boolean mask (B, N), or a list of B index tensors. None: all.
            view: integers (dy, dx, flip) on the images' device, (3,) for one view of the whole batch or (B, 3) for one
                of each image. The model sees images rolled by (dy, dx) pixels and then, if flip is 1, mirrored
                left-right. `keep` and the attention refer to the plain images.
            return_attention: whether to return the importance of the kept patches too.
            features: the names of tokens to return too, with gradients; see `outputs`.

        Returns:
            The logits (B, num_classes) as timm's model gives them. With `return_attention` also the importance of the
            kept patches, float32, (B, K) aligned to `keep`, or packed (T,) if images keep different numbers. Importance
            is the class token's attention in the last block, averaged over heads. Without a class token, it is the mean
            attention that a patch receives there, or the pooling query's attention if the model pools by attention. It
            carries no gradient. Patches that the forward pass has pruned have importance 0. With `features` also a dict
            from their full names to `PackedTokens`.

        Raises:
            ValueError: images or `keep` do not fit the model or each other, or a feature is unknown. The message names
                the value.
            UnsupportedModelError: timm's own forward pass has to run, and cannot do what is asked; a block does not
                have a feature; or see `accelerate`.
        """
        options = {"keep": keep, "view": view, "return_attention": return_attention, "features": features}
        if isinstance(x, torch.fx.Proxy):
            options = trace_as_timms(self, x, options)
        reason = self._needs_timm(x, attn_mask, is_causal)
        if reason is not None:
            self._check_plain(reason, **options)
            with self._timms_context(x):
                return super().forward(x, attn_mask, is_causal)
        patches, kept, grid, whole = self._patches(x, keep, view)
        outputs = self._outputs(patches, grid.size, return_attention, features, whole=whole)
        if not return_attention and not features:
            return outputs.logits
        results = _with_attention(outputs, kept) if return_attention else (outputs.logits,)
        return (*results, outputs.features) if features else results

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Compute timm's features: the normalised tokens (B, N, C) of the last block, prefix tokens first. With `prune`
        they are the tokens that are left.

        Raises:
            ValueError: the images do not fit the model, or pruning has left different numbers of tokens.
        """
        reason = self._needs_timm(x, attn_mask, is_causal)
        if reason is not None:
            self._check_plain(reason)
            with self._timms_context(x):
                return super().forward_features(x, attn_mask, is_causal)
        patches, _, grid, whole = self._patches(x)
        with self._autocast():
            features, *_ = self._features(patches, grid.size, all_tokens=True, whole=whole)
        if features.ndim != 3:
            raise ValueError("the images are left with different numbers of tokens, which have no (B, N, C) features")
        return features

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """timm's intermediate features. `get_intermediate_layers` calls this too. Modifications: the embedding and the
        blocks are ours, unless attention is restricted.

        Raises:
            ValueError: the images do not fit the model.
            UnsupportedModelError: the model prunes, and maps need all patches.
        """
        if self._prune:
            raise UnsupportedModelError("the model prunes, and maps need all patches: call its .model to go without")
        if self._needs_timm(x) is not None:
            with self._timms_context(x):
                return super().forward_intermediates(x, *args, **kwargs)
        patches, _, grid, whole = self._patches(x)
        with self._autocast():
            tokens = embed(self, patches, grid.size, whole)
            attend = Attend(tokens, self.has_class_token, self.num_prefix_tokens, self.backend)

            def embedded(_: Tensor) -> Tensor:
                return tokens.batch_or_values()

            def run(block: nn.Module, number: int, x: Tensor, **restriction: Any) -> Tensor:
                attend.enter(number)
                if restriction:
                    return block(x, **restriction)
                return any_block(block, Stream(x), attend).batch(attend.tokens).sum()

            embedded.dynamic_feat_size = self.patch_embed.dynamic_feat_size
            model = SimpleNamespace(
                patch_embed=embedded,
                _pos_embed=nn.Identity(),
                patch_drop=nn.Identity(),
                norm_pre=self.norm_pre,
                blocks=[partial(run, block, number) for number, block in enumerate(self.blocks)],
                norm=self.norm,
                num_prefix_tokens=self.num_prefix_tokens,
                grad_checkpointing=self.grad_checkpointing,
            )
            return VisionTransformer.forward_intermediates(model, x, *args, **kwargs)

    def __prepare_scriptable__(self) -> VisionTransformer:
        """Let torch.jit.script compile timm's own model."""
        self._check_plain("torch.jit.script compiles timm's own forward pass")
        return self.model

    def _needs_timm(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> str | None:
        """Say why timm's own forward pass has to run, on all patches; None if it need not."""
        if isinstance(x, torch.fx.Proxy):
            return "torch.fx traces timm's own forward pass"
        if attn_mask is not None or is_causal:
            kind = getattr(attn_mask, "dtype", type(attn_mask).__name__)
            if attn_mask is not None and not (isinstance(kind, torch.dtype) and kind in MASK_DTYPES):
                raise ValueError(f"attn_mask is {kind}, expected bool or floating point; is it meant as keep=?")
            return "attn_mask and is_causal are left to timm's own forward pass"
        if torch.jit.is_tracing():
            return "torch.jit.trace records timm's own forward pass"
        if has_random_patches(self):
            return "patch_drop drops random patches while training, in timm's own forward pass"
        changed = changed_method(self, "forward_features")
        return None if changed is None else f"the model{changed}"

    def _check_plain(self, reason: str, **options: Any) -> None:
        """Raise UnsupportedModelError if something is asked that timm's own forward pass does not do."""
        if self._prune:
            raise UnsupportedModelError(f"{reason}, which does not prune: call its .model to go without")
        for name, value in options.items():
            if not (value is None or value is False or (isinstance(value, Sequence) and len(value) == 0)):
                raise UnsupportedModelError(f"{reason}, which does not take {name}")

    def _patches(
        self, images: Tensor, keep: Keep | None = None, view: Tensor | None = None
    ) -> tuple[PackedTokens, PackedTokens, PatchGrid, Tensor | None]:
        """Return the patches at their cells, what is kept, the grid, and the whole images as the view shows them if the
        embedding needs them."""
        check_bypassed(self)
        self._check_images(images)
        grid = self.grid(images.shape[-2:])

        def seen(kept: PackedTokens) -> PackedTokens:
            patches, cells = kernels.gather_patches(
                images, kept.positions, kept.cu_seqlens, view, patch_size=grid.patch_size, backend=self.backend
            )
            return replace(kept, values=patches, positions=cells)

        kept = pack_keep(keep, images.shape[0], grid.num_patches, images.device)
        whole = None
        if embedding_obstacle(self) is not None:
            whole = images
            if view is not None:
                every = seen(all_patches(images.shape[0], grid.num_patches, images.device))
                whole = grid.scatter(every.values, every, torch.empty_like(images))
        return seen(kept), kept, grid, whole

    def forward_patches(
        self, patches: PackedTokens, *, grid_size: tuple[int, int] | None = None, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the logits of images that are given as patches only, such as a batch of an `InvertedDataset`.

        Args:
            patches: values (T, C * patch height * patch width), normalised pixels in (C, height, width) order, at their
                positions in the grid.
            grid_size: (rows, columns) of the patch grid. None: the model's own.
            return_attention: see `forward`.

        Raises:
            ValueError: the patches do not fit the model or the grid, or a patch is named twice.
        """
        grid_size = tuple(grid_size or self.patch_embed.grid_size)
        check_patches(patches, patches.positions, grid_size[0] * grid_size[1])
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
            features: the names of tokens that are returned, prefix tokens included, at their positions in the grid that
                the model sees. "blocks.N", with N from 0, are the tokens (T', C) that block N hands on, after what is
                pruned before block N + 1. "blocks.N.attn" and "blocks.N.mlp" are what its attention and its MLP return,
                (T', C), "blocks.N.attn.heads" is the attention before its norm and projection, and "blocks.N.attn.keys"
                are the keys as they enter the scores, (T', H, D). A block that prunes may do so before its MLP. The
                names "block", "attn", "mlp", "heads" and "keys" stand for those of all blocks. Features that are not
                requested cost nothing.

        Raises:
            ValueError: the patches do not fit the model, or a feature is unknown.
            UnsupportedModelError: a block does not have a feature that was asked for: it has no such part or several,
                or it runs by its own forward, of which only the output is known.
        """
        check_bypassed(self)
        check_called(self)
        rows, columns = grid_size or self.patch_embed.grid_size
        ph, pw = self.patch_embed.patch_size
        grid, whole = self.grid((rows * ph, columns * pw)), None
        if embedding_obstacle(self) is not None:
            check_embeds_patches(self.patch_embed)
            images = patches.values.new_zeros(patches.batch_size, self.num_channels, *grid.image_size)
            whole = grid.scatter(patches.values, patches, images)
        return self._outputs(patches, grid.size, importance, features, whole=whole)

    def _outputs(
        self,
        patches: PackedTokens,
        grid_size: tuple[int, int],
        importance: bool,
        features: Sequence[str] = (),
        *,
        whole: Tensor | None = None,
    ) -> Outputs:
        """Compute `outputs` after the model and the names have been checked. A changed embedding takes the whole images
        (B, C, H, W)."""
        uniform = patches.is_uniform and all(isinstance(how, Merge) or how.equal_counts for how in self._prune.values())
        if not uniform and patches.batch_size > 1 and not self._packs():
            return self._one_by_one(patches, grid_size, importance, features, whole)
        with self._autocast():
            x, attend = self._features(patches, grid_size, importance, features, whole=whole)
            logits = head(self, x, attend.tokens)
        measured = self._importance(attend.rows().mean(0), patches, attend.tokens, grid_size) if importance else None
        return Outputs(logits, measured, {name: tokens for name, (tokens,) in attend.found.items()}, self.backend)

    def _features(
        self,
        patches: PackedTokens,
        grid_size: tuple[int, int],
        importance: bool = False,
        features: Sequence[str] = (),
        *,
        all_tokens: bool = False,
        whole: Tensor | None = None,
    ) -> tuple[Tensor, Attend]:
        """Run all blocks and the last norm. Return the tokens that the head needs or, with `all_tokens`, all; and the
        state of the batch."""
        if any(number >= len(self.blocks) for number in self._prune):
            raise ValueError(f"prune names block {max(self._prune)}, and the model has {len(self.blocks)} blocks now")
        wanted = parts_of_blocks(features, len(self.blocks))
        tokens = embed(self, patches, grid_size, whole)
        x = call(self.norm_pre, tokens.batch_or_values())
        attend = Attend(tokens, self.has_class_token, self.num_prefix_tokens, self.backend)
        reason = obstacle(self.blocks, SEQUENTIAL)
        if reason is not None:
            if importance or features or self._prune:
                raise UnsupportedModelError(f"blocks{reason}, so it runs as one, and nothing within it can be measured")
            return self.norm(self.blocks(x)), attend
        stream, (*blocks, last) = Stream(x), self.blocks
        for number, block in enumerate(blocks):
            attend.enter(number, wanted[number], prune=self._prune.get(number + 1))
            stream = self._run(any_block, block, stream, attend)
        attend.enter(len(blocks), wanted[-1], measures=importance and not pools_by_attention(self))
        queries = pooled_tokens(self, last) if not all_tokens and wanted[-1] <= {"keys"} else None
        if queries is None or (queries > 1 and not attend.tokens.is_uniform):
            stream = self._run(any_block, last, stream, attend)
        else:
            stream = self._run(partial(block_of_first_tokens, count=queries), last, stream, attend)
        _, x = normalise(stream.batch(attend.tokens), self.norm, self.backend)
        if importance and pools_by_attention(self):
            reason = obstacle_within_pool(self.attn_pool)
            if reason is not None:
                raise UnsupportedModelError(f"attn_pool{reason}, so the attention within it cannot be measured")
            attend.measured = [pooling_attention(self, x, attend.tokens)[None]]
        return x, attend

    def _run(self, run: Callable[..., Stream], block: nn.Module, stream: Stream, attend: Attend) -> Stream:
        """Run a block, and again in the backward pass if timm's gradient checkpointing is on."""
        if not self.grad_checkpointing:
            return run(block, stream, attend=attend)
        before, states = attend.as_entered(), iter((attend,))

        def run_again(x: Tensor) -> Tensor:
            return run(block, Stream(x), attend=next(states, None) or before.as_entered()).sum()

        return Stream(checkpoint(run_again, stream.sum(), use_reentrant=False))

    def _importance(
        self, importance: Tensor, patches: PackedTokens, tokens: PackedTokens, grid_size: tuple[int, int]
    ) -> Tensor:
        """Map the importance (T',) of the tokens that are left, prefix tokens included, to the patches given."""
        prefix = self.num_prefix_tokens
        if tokens.is_uniform and not self._prune:
            return importance.view(-1, tokens.max_seqlen)[:, prefix:].flatten()
        # The cells of the grid connect the patches that are left with the patches that were given.
        before = prefix + 1  # prefix tokens and fused tokens lie before the grid
        cells = before + grid_size[0] * grid_size[1]
        given, left = (packed.owners() * cells + packed.positions + before for packed in (patches, tokens))
        return importance.new_zeros(patches.batch_size * cells).index_copy(0, left, importance)[given]

    def _packs(self) -> bool:
        """Return whether tokens of several images may be packed: they may if only plain attentions mix tokens."""
        reasons = [changed_method(self, "forward_head", "pool"), obstacle(self.blocks, SEQUENTIAL)]
        reasons += [obstacle_within(self.norm_pre), obstacle_within(self.norm)]
        reasons += [obstacle_within_block(block) or block_obstacle(block) for block in self.blocks]
        reasons += [] if self.attn_pool is None else [obstacle_within_pool(self.attn_pool)]
        return reasons.count(None) == len(reasons)

    def _one_by_one(
        self,
        patches: PackedTokens,
        grid_size: tuple[int, int],
        importance: bool,
        features: Sequence[str],
        whole: Tensor | None,
    ) -> Outputs:
        """Run `_outputs` image by image, so that hooks and foreign modules see (1, N, C). The host waits."""
        images = [None] * patches.batch_size if whole is None else whole.split(1)
        outputs = [
            self._outputs(one, grid_size, importance, features, whole=image)
            for one, image in zip(patches.groups(1), images, strict=True)
        ]
        found = {name: [output.features[name] for output in outputs] for name in outputs[0].features}
        return Outputs(
            logits=torch.cat([output.logits for output in outputs]),
            importance=torch.cat([output.importance for output in outputs]) if importance else None,
            features={
                name: PackedTokens.from_sequences([x.values for x in images], [x.positions for x in images])
                for name, images in found.items()
            },
            backend=self.backend,
        )

    def cast_weights(self, *, pack: bool = True) -> AbstractContextManager[None]:
        """Return a context in which weights are cast and laid out only once; see `casting.cast_weights`."""
        return cast_weights(self, self.compute_dtype, pack=pack)

    def _autocast(self) -> AbstractContextManager[None]:
        """Return the context that casts to the compute dtype. If no dtype was given, the caller's autocast counts."""
        return autocast_to(self._parameter, self._dtype)

    def _timms_context(self, x: Tensor | torch.fx.Proxy) -> AbstractContextManager[None]:
        """Return the context in which timm's own forward pass runs."""
        if not isinstance(x, torch.fx.Proxy):
            return self._autocast()
        if self.compute_dtype != self._parameter.dtype:
            raise UnsupportedModelError(f"torch.fx cannot trace autocast: cast the weights to {self.compute_dtype}")
        return leaf_functions(x.tracer)

    def _check_images(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(f"images are a {type(images).__name__}, expected a tensor (B, C, H, W)")
        channels, device = self.num_channels, self.device
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"images have shape {tuple(images.shape)}, expected (B, {channels}, H, W)")
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}, expected a floating point dtype")
        if images.device != device:
            raise ValueError(f"images are on {images.device}, the model is on {device}")


class AcceleratedDistilledViT(AcceleratedViT, VisionTransformerDistilled):
    """timm's VisionTransformerDistilled, a DeiT with a distillation token, as an `AcceleratedViT`."""


SETTINGS = ("_prune", "_backend", "_dtype")
MASK_DTYPES = (torch.bool, *FLOATS)
ACCELERATED = {VisionTransformer: AcceleratedViT, VisionTransformerDistilled: AcceleratedDistilledViT}
TIMM_CLASSES = {fast: timm for timm, fast in ACCELERATED.items()}


def _with_attention(outputs: Outputs, patches: PackedTokens) -> tuple[Tensor, Tensor]:
    """Return the logits, and importance as (B, K) if images have equally many patches, otherwise packed (T,)."""
    importance = outputs.importance
    return outputs.logits, importance.view(patches.batch_size, patches.max_seqlen) if patches.is_uniform else importance
