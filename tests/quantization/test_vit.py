"""QuantizedViT: Eq. 5 at the places of PSAQ-ViT, against a second implementation and against integer arithmetic."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from smi_fast.models import cifar10_vit
from smi_fast.packed import pack_keep
from smi_fast.quantization import QuantizedViT, quantize
from smi_fast.quantization.layers import IntegerLinear
from smi_fast.quantization.observers import Scaled


class Eq5:
    """Eq. 5 written out: each image alone, timm's own modules where they fit, everything dequantised."""

    def __init__(self, model: nn.Module, weight_bits: int, activation_bits: int):
        self.model, self.weight_bits, self.levels = model, weight_bits, 2**activation_bits - 1
        self.ranges, self.quantised = {}, False

    def weight(self, w: torch.Tensor) -> torch.Tensor:
        if not self.quantised:
            return w
        largest = 2 ** (self.weight_bits - 1) - 1
        scale = w.abs().flatten(1).amax(1).view(-1, *[1] * (w.ndim - 1)) / largest
        return scale * torch.clip(torch.round(w / scale), -largest, largest)

    def at(self, place: str, x: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        if not self.quantised:
            low, high = self.ranges.get(place, (0.0, 0.0))
            seen = x if seen is None else seen
            self.ranges[place] = min(low, seen.min().item()), max(high, seen.max().item())
            return x
        low, high = self.ranges[place]
        scale = (high - low) / self.levels
        zero_point = round(-low / scale)
        return scale * (torch.clip(torch.round(x / scale) + zero_point, 0, self.levels) - zero_point)

    def linear(self, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight(layer.weight), layer.bias)

    @torch.no_grad()
    def logits(self, image: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """The logits of one image (3, 32, 32) and its patches at cells (K,)."""
        model, proj = self.model, self.model.patch_embed.proj
        kept = image.unfold(1, 8, 8).unfold(2, 8, 8).flatten(1, 2)[:, cells]  # [3, K, 8, 8]
        pixels = self.at("input", image[None], kept)
        x = F.conv2d(pixels, self.weight(proj.weight), proj.bias, proj.stride).flatten(2).transpose(1, 2)[:, cells]
        x = self.at("patch_embed", x)
        x = self.at("tokens", torch.cat((model.cls_token, x), 1))
        rows = torch.cat((torch.zeros(1, dtype=torch.long), cells + 1))
        x = self.at("embedded", x + self.at("pos_embed", model.pos_embed)[:, rows])
        for number, block in enumerate(model.blocks):
            name, attn = f"blocks.{number}.", block.attn
            y = self.at(name + "attn.norm", block.norm1(x))
            qkv = self.at(name + "attn.qkv", self.linear(attn.qkv, y))
            q, k, v = (part.unflatten(-1, (3, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
            scores = self.at(name + "attn.scores", q @ k.mT / math.sqrt(q.shape[-1]))
            y = self.at(name + "attn.attention", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            x = self.at(name + "attn.sum", x + self.at(name + "attn.proj", self.linear(attn.proj, y)))
            y = self.at(name + "mlp.norm", block.norm2(x))
            y = self.at(name + "mlp.act", F.gelu(self.linear(block.mlp.fc1, y)))
            x = self.at(name + "mlp.sum", x + self.at(name + "mlp.fc2", self.linear(block.mlp.fc2, y)))
        x = self.at("norm", model.norm(x)[:, 0])
        return self.at("logits", self.linear(model.head, x))[0]

    def batch(self, images: torch.Tensor, keep: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([self.logits(image, cells) for image, cells in zip(images, keep, strict=True)])


# In float64, where no sum comes so near to the middle between two integers that its order decides the rounding.
@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (4, 8), (3, 5), (2, 2)])
def test_logits_and_ranges_are_those_of_eq_5(model, images, random_keep, ragged, weight_bits, activation_bits):
    reference = Eq5(model, weight_bits, activation_bits)
    everything = [torch.arange(16)] * 5
    torch.testing.assert_close(reference.batch(images, everything), model(images))  # it is the float model, at first
    reference.ranges.clear()
    calibration, keep = torch.randn_like(images), random_keep(5, ragged)
    reference.batch(calibration, keep)
    reference.quantised = True

    probe = QuantizedViT(model)
    batches = [probe.patches(calibration[:2], keep[:2]), (probe.patches(calibration[2:], keep[2:]), torch.zeros(3))]
    quantized = quantize(model, batches, weight_bits, activation_bits)
    assert quantized.ranges.keys() == reference.ranges.keys()
    for place, observed in reference.ranges.items():
        assert quantized.ranges[place] == pytest.approx(observed, rel=1e-9, abs=1e-12), place
    for kept in (everything, random_keep(5, False), random_keep(5, True)):
        logits, expected = quantized(images, keep=kept), reference.batch(images, kept)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        assert expected.std() > 0.01  # not all clipped


@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
def test_every_product_is_that_of_integers(model, images, random_keep, ragged):
    """Bit for bit, in float32: inputs and weights are integers in their bounds, and products are those of int64."""
    quantized = quantize(model.float(), images.float())
    products, seen = [], {}

    def check(layer: IntegerLinear, args: tuple, output: Scaled) -> None:
        x, channels = args[0].values, args[1] if len(args) > 1 else slice(None)
        assert max(x.max(), 0) - min(x.min(), 0) <= 255
        integers, weight = x.long(), layer.weight.long()
        assert torch.equal(integers, x)
        assert torch.equal(weight, layer.weight)
        assert weight.abs().amax() == 127
        expected = integers @ weight[channels].T
        assert torch.equal(output.values, expected.float())
        products.append(expected.abs().max())

    for layer in quantized.layers():
        layer.register_forward_hook(check)
    first, keep = quantized.blocks[0], random_keep(5, ragged)
    first.attn.qkv_out.register_forward_hook(lambda _, __, output: seen.update(qkv=output.values.clone()))
    first.attn.scores.register_forward_pre_hook(lambda _, args: seen.update(scores=args[0].values.clone()))
    quantized(2 * images.float(), keep=keep)  # some of it clipped
    assert len(products) == 1 + 2 * 4 + 1 + 1  # the last block asks for queries on their own
    assert max(products) > 2**15

    lengths = [1 + len(cells) for cells in keep]
    for tokens, scores in zip(seen["qkv"].flatten(0, -2).split(lengths), seen["scores"], strict=True):
        assert torch.equal(tokens.long(), tokens)
        queries, keys, _ = tokens.long().unflatten(1, (3, 3, 16)).permute(1, 2, 0, 3)  # [H, N, D] each
        assert torch.equal(scores[:, : len(tokens), : len(tokens)], (queries @ keys.mT).float())


def test_float_model_until_calibration_ends(model, images, random_keep):
    quantized, keep = QuantizedViT(model), random_keep(5, True)
    torch.testing.assert_close(quantized(images), model(images))
    torch.testing.assert_close(quantized(images, keep=keep), Eq5(model, 8, 8).batch(images, keep))


def test_nothing_is_written_until_calibration_ends(model, tmp_path):
    quantized = QuantizedViT(model)
    for write in (lambda: quantized.save(tmp_path / "model.safetensors"), quantized.export):
        with pytest.raises(ValueError, match="calibrated"):
            write()
    assert not list(tmp_path.iterdir())


def test_model_stays_as_it_is(model, images):
    before = copy.deepcopy(model.state_dict())
    logits = model(images)
    quantized = quantize(model, images)
    first = quantized(images)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model(images), logits)
    nn.init.zeros_(model.pos_embed)
    assert torch.equal(quantized(images), first)  # and is not touched by it afterwards
    assert not any(parameter.requires_grad for parameter in quantized.parameters())


def test_all_forms_of_keep_name_the_same_patches(model, images, random_keep):
    quantized = quantize(model, images)
    keep = torch.stack(random_keep(5, ragged=False)).sort(1).values
    mask = torch.zeros(5, 16, dtype=torch.bool).scatter_(1, keep, True)
    logits = quantized(images, keep=keep)
    for form in (mask, list(keep), pack_keep(keep, 5, 16, images.device)):
        assert torch.equal(quantized(images, keep=form), logits)
    assert torch.equal(quantized(images), quantized(images, keep=torch.arange(16).repeat(5, 1)))
    assert quantized(images[:0]).shape == (0, 7)


def test_half_precision_is_computed_in_float32(model, images):
    quantized = quantize(model.bfloat16(), images.float())
    assert torch.equal(quantized(images), quantize(model.float(), images.float())(images))


def test_large_batch_gives_the_numbers_of_its_parts(model):
    """On a CPU a batch is evaluated as many images at a time as its caches hold."""
    images = torch.randn(1100, 3, 32, 32)
    keep = [torch.randperm(16)[:count] for count in torch.randint(1, 17, (1100,)).tolist()]
    quantized = quantize(model, images[:8])
    expected = [quantized(images[i : i + 10], keep=keep[i : i + 10]) for i in range(0, 1100, 10)]
    torch.testing.assert_close(quantized(images, keep=keep), torch.cat(expected))


def test_in_float32_every_integer_is_the_nearest_to_its_real_number(seed):
    """Place by place, from the integers of the places before: float32 rounding decides only near the middle."""
    model, seen = cifar10_vit(), {}
    quantized = quantize(model, torch.randn(8, 3, 32, 32))
    for name, place in quantized.quantizers.items():
        place.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output.values.clone()}))
    quantized(1.2 * torch.randn(3, 3, 32, 32))

    def value(place: str) -> torch.Tensor:
        return seen[place].double() * quantized.quantizers[place].unit

    def dense(layer: IntegerLinear, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, layer.weight.double() * layer.weight_scale.double()[:, None], layer.bias.double())

    def check(place: str, real: torch.Tensor) -> None:
        rounding, integers = quantized.quantizers[place].rounding, seen[place]
        nearest = (real.double() / rounding.scale).clamp(rounding.lowest, rounding.highest)
        assert (integers.double() - nearest).abs().max() < 0.5 + 1e-3, place

    for number in range(1, 5):  # the last block gives the class token alone
        block, exact, at = quantized.blocks[number], copy.deepcopy(model.blocks[number]).double(), f"blocks.{number}."
        x = value(f"blocks.{number - 1}.mlp.sum")
        check(at + "attn.norm", exact.norm1(x))
        check(at + "attn.qkv", dense(block.attn.qkv, value(at + "attn.norm")))
        q, k, v = value(at + "attn.qkv").view(3, 65, 3, 3, 64).permute(2, 0, 3, 1, 4)  # [B, H, N, D] each
        check(at + "attn.scores", q @ k.mT / 8)
        check(at + "attn.attention", (value(at + "attn.scores").softmax(-1) @ v).transpose(1, 2).flatten(2))
        check(at + "attn.proj", dense(block.attn.proj, value(at + "attn.attention")))
        check(at + "attn.sum", x + value(at + "attn.proj"))
        check(at + "mlp.norm", exact.norm2(value(at + "attn.sum")))
        check(at + "mlp.act", F.gelu(dense(block.mlp.fc1, value(at + "mlp.norm"))))
        check(at + "mlp.fc2", dense(block.mlp.fc2, value(at + "mlp.act")))
        check(at + "mlp.sum", value(at + "attn.sum") + value(at + "mlp.fc2"))
