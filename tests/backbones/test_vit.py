"""accelerate(): what keep, view and attention mean, against timm's modules and explicit formulas."""

import copy
import pickle
import types

import pytest
import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

import smi_fast
from smi_fast.inversion.views import apply_view, view_cells
from smi_fast.models import cifar10_vit
from smi_fast.packed import pack_keep


@pytest.fixture
def model(seed) -> VisionTransformer:
    """Two blocks, 8x8 patches, float64, every weight random."""
    model = cifar10_vit(pretrained=False, depth=2, embed_dim=48, num_heads=3, num_classes=7, reg_tokens=2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else 0.5 / parameter.shape[-1] ** 0.5)
    return model.double()


@pytest.fixture
def images(model) -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, dtype=torch.float64)


def random_keep(batch: int, count: int, patches: int = 64) -> torch.Tensor:
    return torch.stack([torch.randperm(patches)[:count] for _ in range(batch)])


def last_attention(model: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """Softmax scores of the last block (B, H, N, N), from timm's own modules."""
    x = model._pos_embed(model.patch_embed(images))
    for block in model.blocks[:-1]:
        x = block(x)
    attn = model.blocks[-1].attn
    qkv = attn.qkv(model.blocks[-1].norm1(x)).unflatten(-1, (3, attn.num_heads, attn.head_dim))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    return (q @ k.transpose(-2, -1) * attn.scale).softmax(-1)


def test_importance_is_the_class_tokens_attention(model, images):
    logits, importance = smi_fast.accelerate(model)(images, return_attention=True)
    expected = last_attention(model, images).mean(1)[:, 0, 3:]
    assert importance.dtype == torch.float32
    torch.testing.assert_close(importance.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(logits, model(images))
    assert not importance.requires_grad


def test_importance_without_class_token_is_attention_received(seed, images):
    model = cifar10_vit(False, depth=2, embed_dim=48, num_heads=3, class_token=False, global_pool="avg").double()
    _, importance = smi_fast.accelerate(model)(images, return_attention=True)
    expected = last_attention(model, images).mean((1, 2))
    torch.testing.assert_close(importance.double(), expected, rtol=1e-5, atol=1e-7)


def test_importance_of_attention_pooling_is_the_querys(seed, images):
    model = cifar10_vit(False, depth=1, embed_dim=48, num_heads=3, class_token=False, global_pool="map", reg_tokens=1)
    model = model.double()
    nn.init.normal_(model.attn_pool.latent)
    _, importance = smi_fast.accelerate(model)(images, return_attention=True)
    pool, x = model.attn_pool, model.forward_features(images)[:, 1:]
    q = pool.q(pool.latent[0]).view(1, 3, 16).transpose(0, 1)
    k = pool.kv(x)[..., :48].unflatten(-1, (3, 16)).transpose(1, 2)
    expected = (q @ k.transpose(-2, -1) * pool.scale).softmax(-1).mean(1)[:, 0]
    torch.testing.assert_close(importance.double(), expected, rtol=1e-5, atol=1e-7)


def test_all_forms_of_keep_name_the_same_patches(model, images):
    fast = smi_fast.accelerate(model)
    keep = random_keep(3, 20).sort(1).values
    mask = torch.zeros(3, 64, dtype=torch.bool).scatter_(1, keep, True)
    logits, importance = fast(images, keep=keep, return_attention=True)
    for form in (keep.int(), mask, list(keep), pack_keep(keep, 3, 64, keep.device)):
        other_logits, other_importance = fast(images, keep=form, return_attention=True)
        assert torch.equal(logits, other_logits)
        assert torch.equal(importance, other_importance)


def test_outputs_are_aligned_to_the_order_of_keep(model, images):
    fast = smi_fast.accelerate(model)
    keep = random_keep(3, 20)
    logits, importance = fast(images, keep=keep, return_attention=True)
    order = torch.randperm(20)
    shuffled_logits, shuffled_importance = fast(images, keep=keep[:, order], return_attention=True)
    torch.testing.assert_close(shuffled_logits, logits)
    torch.testing.assert_close(shuffled_importance, importance[:, order])


def test_ragged_images_give_what_they_give_alone(model, images):
    fast = smi_fast.accelerate(model)
    mask = torch.rand(3, 64) < torch.tensor([[0.1], [0.5], [0.9]])
    mask[:, 0] = True
    logits, importance = fast(images, keep=mask, return_attention=True)
    parts = importance.split(mask.sum(1).tolist())
    for number in range(3):
        keep = mask[number].nonzero().T
        alone, alone_importance = fast(images[number : number + 1], keep=keep, return_attention=True)
        torch.testing.assert_close(logits[number : number + 1], alone)
        torch.testing.assert_close(parts[number], alone_importance[0])


def test_ragged_pruning_goes_on_from_what_the_forward_returned(model, images):
    fast, keep = smi_fast.accelerate(model), None
    for _ in range(3):
        _, attention = fast(images, keep=keep, return_attention=True)
        keep = smi_fast.select_patches(attention, keep, mass=0.7)
    assert max(len(row) for row in keep) < 64 * 0.7
    assert fast(images, keep=keep).isfinite().all()


@pytest.mark.parametrize("per_image", [False, True])
def test_a_view_is_the_rolled_and_mirrored_image(model, images, per_image):
    fast = smi_fast.accelerate(model)
    keep = random_keep(3, 20)
    views = torch.stack((*torch.randint(-40, 41, (2, 3)), torch.randint(0, 2, (3,))), dim=1)
    views = views if per_image else views[:1].expand(3, 3)
    logits, importance = fast(images, keep=keep, view=views if per_image else views[0], return_attention=True)
    seen = torch.cat([apply_view(images[i : i + 1], views[i].tolist()) for i in range(3)])
    cells = view_cells(keep, views[:, None], (8, 8), (4, 4))
    expected_logits, expected_importance = fast(seen, keep=cells, return_attention=True)
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(importance, expected_importance)


def test_patches_alone_give_the_logits_of_their_images(model, images):
    fast = smi_fast.accelerate(model)
    keep = [torch.randperm(64)[:count] for count in (5, 64, 1)]
    patches = torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2)
    packed = smi_fast.PackedTokens.from_sequences([p[k] for p, k in zip(patches, keep, strict=True)], keep)
    torch.testing.assert_close(fast.forward_patches(packed), fast(images, keep=keep))


@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "hooked"])
def test_features_are_what_timms_blocks_give_with_gradients(model, images, hooked):
    """Of packed images too; where a block has a hook, they run one by one."""
    if hooked:
        model.blocks[0].mlp.register_forward_hook(lambda module, args, output: 2 * output)
    keep = [torch.randperm(64)[:count] for count in (5, 64, 1)]
    patches = torch.nn.functional.unfold(images, 4, stride=4).transpose(1, 2)
    packed = smi_fast.PackedTokens.from_sequences([p[k] for p, k in zip(patches, keep, strict=True)], keep)
    packed.values.requires_grad_()
    outputs = smi_fast.accelerate(model).outputs(packed, features=("blocks.0", "blocks.1"))
    assert outputs.features.keys() == {"blocks.0", "blocks.1"}
    torch.testing.assert_close(outputs.logits, smi_fast.accelerate(model)(images, keep=keep))
    for name, tokens in outputs.features.items():
        for image, row, found in zip(images, keep, tokens.sequences(), strict=True):
            x = model._pos_embed(model.patch_embed(image[None]))
            x = x[:, torch.cat((torch.arange(3), row + 3))]
            for block in model.blocks[: int(name[-1]) + 1]:
                x = block(x)
            torch.testing.assert_close(found, x[0])
        (grad,) = torch.autograd.grad(tokens.values.square().sum(), packed.values, retain_graph=True)
        assert (grad.abs().sum(1) > 0).all()


def test_other_grids_resample_positions_as_timm_does(seed):
    model = timm.create_model("test_vit", pretrained=False).double().eval()
    images = torch.randn(2, 3, 96, 128, dtype=torch.float64)
    torch.testing.assert_close(smi_fast.accelerate(model)(images), model(images))


def test_bfloat16_logits_are_near_those_of_float32(seed):
    model = cifar10_vit(pretrained=False).eval()
    images = torch.randn(4, 3, 32, 32)
    keep = random_keep(4, 20)
    exact = smi_fast.accelerate(model, dtype=torch.float32)(images, keep=keep)
    rounded = smi_fast.accelerate(model, dtype=torch.bfloat16)(images, keep=keep)
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_an_empty_batch_has_empty_outputs(model, images):
    for prune in (None, {1: 0.3}):
        logits, importance = smi_fast.accelerate(model, prune=prune)(images[:0], return_attention=True)
        assert logits.shape == model(images[:0]).shape == (0, 7)
        assert importance.shape == (0, 64)


def test_weights_are_shared_with_the_model(model, images):
    fast = smi_fast.accelerate(model)
    before = fast(images)
    with torch.no_grad():
        model.head.bias += 1
    torch.testing.assert_close(fast(images), before + 1)
    own = {model, model.patch_embed}
    assert all(
        ours is theirs for ours, theirs in zip(fast.modules(), model.modules(), strict=True) if theirs not in own
    )


def test_the_original_and_the_accelerated_model_change_apart(model, images):
    """What replaces an attribute of one of them, or compiles it, leaves the other as it was."""
    other = copy.deepcopy(model)
    expected = model(images)
    model.compile(backend="eager")
    fast = smi_fast.accelerate(model)
    torch.testing.assert_close(fast(images, keep=torch.arange(64).expand(3, -1)), expected)
    for change in (
        lambda m: m.set_input_size((16, 16)),
        lambda m: m.reset_classifier(3),
        lambda m: m.load_state_dict({name: -value for name, value in m.state_dict().items()}, assign=True),
        lambda m: setattr(m, "forward_head", lambda x: x),
    ):
        change(model)
    fast.load_state_dict(other.state_dict())
    torch.testing.assert_close(fast(images), expected)
    for change in (lambda m: m.set_input_size((16, 16)), lambda m: m.reset_classifier(3), lambda m: m.compile()):
        change(fast)
    assert fast.model(images[..., :16, :16]).shape == (3, 3)
    torch.testing.assert_close(other(images), expected)


def test_a_method_of_the_object_is_that_of_the_new_object(model, images):
    def doubled(self, x, pre_logits=False):
        return self.head(2 * x[:, 0])

    model.forward_head = types.MethodType(doubled, model)
    fast = smi_fast.accelerate(model)
    torch.testing.assert_close(fast(images), model(images))
    fast.reset_classifier(3)
    assert fast(images).shape == (3, 3)


def test_prune_can_be_set_and_is_checked(model, images):
    fast = smi_fast.accelerate(model)
    fast.prune = {1: 0.3}
    torch.testing.assert_close(fast(images), smi_fast.accelerate(model, prune={1: 0.3})(images))
    for wrong, error in ((0.3, TypeError), ({5: 0.3}, ValueError)):
        with pytest.raises(error, match="prune"):
            fast.prune = wrong
    with pytest.raises(smi_fast.UnsupportedModelError, match="already"):
        smi_fast.accelerate(fast)
    fast.prune_intermediate_layers([0], prune_head=False)
    with pytest.raises(ValueError, match="prune names block 1, and the model has 1 blocks now"):
        fast(images)
    fast.prune = None
    torch.testing.assert_close(fast(images), fast.model(images))


def test_patches_that_do_not_fit_the_grid_are_refused(model):
    fast = smi_fast.accelerate(model)
    for positions, options, message in (
        ([64, 3], {}, "row 0 holds patch 64"),
        ([-1, 3], {}, "row 0 holds patch -1"),
        ([3, 3], {}, "names patch 3 twice"),
        ([1, 3], {"grid_size": (4, 4)}, "16x16 pixels, the model takes 32x32"),
    ):
        patches = smi_fast.PackedTokens.from_batch(torch.zeros(1, 2, 48).double(), torch.tensor(positions))
        with pytest.raises(ValueError, match=message):
            fast.forward_patches(patches, **options)


def test_random_patches_need_images(seed):
    fast = smi_fast.accelerate(cifar10_vit(False, depth=1, patch_drop_rate=0.5).train())
    with pytest.raises(smi_fast.UnsupportedModelError, match="drops random patches while training"):
        fast.forward_patches(smi_fast.PackedTokens.from_batch(torch.zeros(1, 2, 48), torch.tensor([1, 2])))


def test_weights_moved_to_another_dtype_than_that_of_the_products_are_refused(model, images):
    fast = smi_fast.accelerate(model.float(), dtype=torch.float32)
    images = images.float()
    expected = fast(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fast(images), expected)  # a dtype that was asked for is not the caller's autocast's
    with pytest.raises(ValueError, match=r"the weights are torch.bfloat16 now"):
        fast.bfloat16()(images.bfloat16())


def test_cast_weights_heed_their_module(model, images):
    """Within the context too, weights that ask for gradients get them, and another dtype has its own copies."""
    model, images = model.float(), images.float()
    fast = smi_fast.accelerate(model)
    loss = fast(images).square().sum()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    with fast.cast_weights():
        for ours, theirs in zip(
            torch.autograd.grad(fast(images).square().sum(), list(model.parameters())), expected, strict=True
        ):
            torch.testing.assert_close(ours, theirs)
        model.requires_grad_(False)
        other = smi_fast.accelerate(model, dtype=torch.bfloat16)
        assert (other(images) - fast(images)).abs().max() < 0.1 * loss.sqrt()
        torch.testing.assert_close(copy.deepcopy(fast)(images), fast(images))
        pickle.dumps(fast)


def test_weights_train_as_through_timms_model(model, images):
    fast = smi_fast.accelerate(model.train())
    weights = torch.randn(3, 7, dtype=torch.float64)
    expected = torch.autograd.grad((model(images) * weights).sum(), list(model.parameters()))
    got = torch.autograd.grad((fast(images) * weights).sum(), list(model.parameters()))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (torch.tensor([[0, 1], [2, 64], [3, 4]]), r"row 1 holds patch 64, outside \[0, 64\)"),
        (torch.tensor([[0, 1], [2, 3], [-1, 4]]), r"row 2 holds patch -1"),
        (torch.tensor([[0, 1], [5, 5], [3, 4]]), "row 1 names patch 5 twice"),
        (torch.zeros(3, 0, dtype=torch.long), "no patch in row 0"),
        (torch.zeros(3, 2), "float32"),
        (torch.zeros(2, 2, dtype=torch.long), r"shape \(2, 2\)"),
        (torch.ones(3, 63, dtype=torch.bool), "63 patches"),
        (torch.arange(3)[:, None].expand(3, 64) > 0, "no patch in row 0"),
        ([torch.arange(2), torch.tensor([], dtype=torch.long), torch.arange(2)], "no patch in row 1"),
        ([torch.arange(2), torch.arange(2)], "lists 2 images"),
        ([torch.arange(2), torch.arange(2), torch.tensor([7, 70])], "row 2 holds patch 70"),
        ([torch.arange(2), torch.arange(2), torch.tensor([7.0])], "row 2 has dtype torch.float32"),
    ],
)
def test_a_wrong_keep_is_refused_with_its_row_and_value(model, images, keep, message):
    with pytest.raises(ValueError, match=message):
        smi_fast.accelerate(model)(images, keep=keep)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 3, 30, 32), "not divided"),
        ((3, 3, 64, 64), "64x64"),
        ((3, 1, 32, 32), r"\(3, 1, 32, 32\)"),
        ((3, 32), "shape"),
    ],
)
def test_images_that_do_not_fit_are_refused_by_size(model, shape, message):
    with pytest.raises(ValueError, match=message):
        smi_fast.accelerate(model)(torch.zeros(shape, dtype=torch.float64))


def test_integer_images_are_refused(model):
    with pytest.raises(ValueError, match="uint8"):
        smi_fast.accelerate(model)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_refused_models_name_the_part_in_the_way(seed):
    class OwnBlock(Block):
        pass

    with pytest.raises(smi_fast.UnsupportedModelError, match=r"blocks\[0\] is a .*OwnBlock"):
        smi_fast.accelerate(cifar10_vit(False, depth=1, block_fn=OwnBlock))
    with pytest.raises(smi_fast.UnsupportedModelError, match=r"the model is a .*ResNet"):
        smi_fast.accelerate(timm.create_model("test_resnet", pretrained=False))
    with pytest.raises(smi_fast.UnsupportedModelError, match="dynamic_img_pad"):
        smi_fast.accelerate(cifar10_vit(False, depth=1, dynamic_img_pad=True))
    with pytest.raises(smi_fast.UnsupportedModelError, match=r"blocks\[0\] has a head_dim of 12"):
        smi_fast.accelerate(cifar10_vit(False, depth=1, num_heads=16))


@pytest.mark.parametrize("prune", [None, {1: 0.3}, {1: smi_fast.Merge(5)}], ids=str)
def test_checkpointed_blocks_run_again_as_they_ran(model, images, prune):
    """They give the same numbers and gradients, also of a feature within a block, and keep fewer tensors for them."""
    fast, kept, results = smi_fast.accelerate(model, prune=prune), [], []
    images.requires_grad_()
    for enable in (False, True):
        fast.set_grad_checkpointing(enable)
        kept.append(0)

        def count(x):
            kept[-1] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            logits, importance, found = fast(images, return_attention=True, features=("blocks.0.mlp",))
        loss = logits.square().sum() + found["blocks.0.mlp"].values.sin().sum()
        results.append((logits, importance, *torch.autograd.grad(loss, (images, *model.blocks[0].parameters()))))
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)
    assert kept[1] < 0.5 * kept[0]


def test_dropping_attention_in_training_is_timms(seed):
    """The attention that drops runs as timm's own module, image by image where they keep different numbers."""
    model = cifar10_vit(False, depth=2, attn_drop_rate=0.3).train()
    fast, images = smi_fast.accelerate(model), torch.randn(2, 3, 32, 32)
    torch.manual_seed(3)
    expected = model(images)
    torch.manual_seed(3)
    torch.testing.assert_close(fast(images), expected)
    assert not torch.equal(fast(images, keep=[torch.arange(9), torch.arange(5)]), fast.eval()(images))


def test_without_position_embedding_no_token_is_dropped(seed, images):
    model = cifar10_vit(False, depth=1, embed_dim=48, num_heads=3, pos_embed="none", pos_drop_rate=0.5).double().train()
    torch.testing.assert_close(smi_fast.accelerate(model)(images), model(images))


def test_wrong_backends_and_dtypes_are_refused(model):
    with pytest.raises(ValueError, match="metal"):
        smi_fast.accelerate(model, backend="metal")
    with pytest.raises(ValueError, match="float64"):
        smi_fast.accelerate(model, dtype=torch.bfloat16)  # the weights are float64
    with pytest.raises(ValueError, match="int8"):
        smi_fast.accelerate(cifar10_vit(False), dtype=torch.int8)


def test_the_triton_backend_gives_the_numbers_of_plain_torch(seed, device):
    model = cifar10_vit(False, depth=2, embed_dim=48, num_heads=3, reg_tokens=1).to(device)
    images = torch.randn(2, 3, 32, 32, device=device, requires_grad=True)
    keep, view = random_keep(2, 17).to(device), torch.tensor([3, -5, 1], device=device)
    for kept in (keep, [keep[0, :4], keep[1]], None):
        outputs = []
        for backend in ("torch", "triton"):
            fast = smi_fast.accelerate(model, dtype=torch.float32, backend=backend)
            logits, importance = fast(images, keep=kept, view=view, return_attention=True)
            outputs.append((logits, importance, *torch.autograd.grad(logits.square().sum(), images)))
        for ours, theirs in zip(*outputs, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
