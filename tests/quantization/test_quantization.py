"""quantize(): Eq. 5 at the places of PSAQ-ViT, against an implementation of its own and against integer arithmetic."""

import copy
import math
import random
import zlib

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import smi_fast
from smi_fast.data.sparse import InvertedDataset
from smi_fast.models import CIFAR10_MEAN, CIFAR10_STD, cifar10_vit
from smi_fast.packed import PackedTokens, pack_keep
from smi_fast.quantization.vit import IntegerLinear, QuantizedViT, Quantizer, quantize


@pytest.fixture
def model(seed) -> nn.Module:
    """Two blocks, 4x4 patches of 8x8 pixels, float64, every weight random."""
    model = cifar10_vit(pretrained=False, patch_size=8, depth=2, embed_dim=48, num_heads=3, num_classes=7)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else 0.5 / parameter.shape[-1] ** 0.5)
    return model.double()


@pytest.fixture
def images(model) -> torch.Tensor:
    return torch.randn(5, 3, 32, 32, dtype=torch.float64)


def random_keep(batch: int, ragged: bool) -> list[torch.Tensor]:
    counts = torch.randint(1, 17, (batch,)).tolist() if ragged else [6] * batch
    return [torch.randperm(16)[:count] for count in counts]


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
        """Of one image (3, 32, 32) and the patches at cells (K,)."""
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
            y = self.at(name + "norm1", block.norm1(x))
            qkv = self.at(name + "qkv", self.linear(attn.qkv, y))
            q, k, v = (part.unflatten(-1, (3, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
            scores = self.at(name + "scores", q @ k.mT / math.sqrt(q.shape[-1]))
            y = self.at(name + "attention", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            x = self.at(name + "sum1", x + self.at(name + "proj", self.linear(attn.proj, y)))
            y = self.at(name + "norm2", block.norm2(x))
            y = self.at(name + "gelu", F.gelu(self.linear(block.mlp.fc1, y)))
            x = self.at(name + "sum2", x + self.at(name + "mlp", self.linear(block.mlp.fc2, y)))
        x = self.at("norm", model.norm(x)[:, 0])
        return self.at("logits", self.linear(model.head, x))[0]

    def batch(self, images: torch.Tensor, keep: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([self.logits(image, cells) for image, cells in zip(images, keep, strict=True)])


# In float64, where no sum comes so near to the middle between two integers that its order decides the rounding.
@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (4, 8), (3, 5), (2, 2)])
def test_logits_and_ranges_equal_those_of_an_implementation_of_eq_5(
    model, images, ragged, weight_bits, activation_bits
):
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


class Recorded:
    """A Quantizer that leaves what it was given, and gave, in `seen`."""

    def __init__(self, quantizer: Quantizer, seen: dict, place: str):
        self.quantizer, self.seen, self.place = quantizer, seen, place

    def __getattr__(self, name: str):
        return getattr(self.quantizer, name)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        given = x.clone()
        self.seen[self.place] = given, self.quantizer(x).clone()
        return self.seen[self.place][1].clone()


@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
def test_every_product_of_the_quantised_model_is_that_of_integers(model, images, ragged):
    """Bit for bit, in float32: inputs and weights are integers in their bounds, and products are those of int64."""
    quantized = quantize(model.float(), images.float())
    products = []

    def check(layer: IntegerLinear, args: tuple, output: torch.Tensor) -> None:
        x, channels = args[0], args[1] if len(args) > 1 else slice(None)
        low, high = sources[layer].bounds
        assert high - low == 255
        assert low <= x.min()
        assert x.max() <= high
        integers, weight = x.long(), layer.weight.long()
        assert torch.equal(integers, x)
        assert torch.equal(weight, layer.weight)
        assert weight.abs().amax() == 127
        expected = integers @ weight[channels].T
        assert torch.equal(output, expected.float())
        products.append(expected.abs().max())

    sources = dict(quantized._layers())
    for layer in sources:
        layer.register_forward_hook(check)
    first, seen = quantized.blocks[0], {}
    first.quantizers["qkv"], first.quantizers["scores"] = (
        Recorded(first.quantizers[place], seen, place) for place in ("qkv", "scores")
    )
    quantized(2 * images.float(), keep=random_keep(5, ragged))  # some of it clipped
    assert len(products) == 1 + 2 * 4 + 1 + 1  # the last block asks for queries on their own
    assert max(products) > 2**15

    (queries, keys, _), scores = seen["qkv"][1], seen["scores"][0]
    assert torch.equal(queries.long(), queries)
    factor = first.quantizers["qkv"].scale ** 2 * first.attention_scale / first.quantizers["scores"].scale
    assert torch.equal(scores, (queries.long() @ keys.long().mT).float() * factor)


@pytest.mark.parametrize("inputs", [64, 520, 1536, 5000])
def test_a_product_is_exact_however_large_its_sum(seed, inputs):
    """Where a float32 sum would pass 2^24 it is split, and rounded once at the end."""
    layer = IntegerLinear(nn.Linear(inputs, 6))
    layer.weight = torch.randint(-127, 128, (6, inputs)).float()
    layer.weight[0] = 127
    layer.weight[1, ::2], layer.weight[1, 1::2] = 127, -127
    layer.split((0, 255))
    x = torch.randint(0, 256, (40, inputs)).float()
    x[0] = 255
    x[1, ::2], x[1, 1::2] = 255, 0
    expected = (x.long() @ layer.weight.long().T).double().float()
    assert torch.equal(layer(x), expected)
    assert (layer.part < inputs) == (127 * 255 * inputs > 2**24)
    assert torch.equal(layer(x[:, None], slice(1, 3)), expected[:, None, 1:3])


def test_more_bits_come_nearer_to_the_float_model(seed):
    model, images = cifar10_vit(), torch.randn(16, 3, 32, 32)
    expected = model(images)
    errors = [(quantize(model, images, bits, bits)(images) - expected).norm() / expected.norm() for bits in (4, 6, 8)]
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.1


def test_an_inverted_dataset_is_normalised_and_fed_sparse(model):
    images, keep = torch.rand(40, 3, 32, 32), random_keep(40, ragged=True)
    dataset = InvertedDataset.from_images(
        images, keep, torch.zeros(40).long(), (8, 8), {"mean": CIFAR10_MEAN, "std": CIFAR10_STD}
    )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CIFAR10_MEAN, CIFAR10_STD))
    model = model.float()
    probe = QuantizedViT(model)
    black = ~torch.stack([torch.zeros(16).index_fill(0, cells, 1).bool() for cells in keep])
    rubbish = black.view(40, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3) * 1e3  # where nothing is kept
    batch = probe.patches((images - mean) / std + rubbish, keep)
    ranges = quantize(model, dataset).ranges
    for place, observed in quantize(model, batch).ranges.items():
        assert ranges[place] == pytest.approx(observed, rel=1e-4, abs=1e-5), place


def test_images_in_all_forms_are_the_same_calibration(model, images):
    expected = quantize(model, images).ranges
    everything = pack_keep(None, 5, 16, images.device)
    for form in ([images], [(images, torch.zeros(5))], QuantizedViT(model).patches(images, everything)):
        assert quantize(model, form).ranges == expected
    halves = quantize(model, iter([images[:1], images[1:]])).ranges
    for place, observed in halves.items():
        assert observed == pytest.approx(expected[place], rel=1e-9), place


def test_quantisation_leaves_the_model_as_it_is(model, images):
    before = copy.deepcopy(model.state_dict())
    logits = model(images)
    quantized = quantize(model, images)
    first = quantized(images)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model(images), logits)
    nn.init.zeros_(model.pos_embed)
    assert torch.equal(quantized(images), first)  # and is not touched by it afterwards
    assert not any(parameter.requires_grad for parameter in quantized.parameters())


def test_all_forms_of_keep_name_the_same_patches(model, images):
    quantized = quantize(model, images)
    keep = torch.stack(random_keep(5, ragged=False)).sort(1).values
    mask = torch.zeros(5, 16, dtype=torch.bool).scatter_(1, keep, True)
    logits = quantized(images, keep=keep)
    for form in (mask, list(keep), pack_keep(keep, 5, 16, images.device)):
        assert torch.equal(quantized(images, keep=form), logits)
    assert torch.equal(quantized(images), quantized(images, keep=torch.arange(16).repeat(5, 1)))
    assert quantized(images[:0]).shape == (0, 7)


def test_half_precision_weights_are_computed_in_float32(model, images):
    quantized = quantize(model.bfloat16(), images.float())
    assert torch.equal(quantized(images), quantize(model.float(), images.float())(images))


@pytest.mark.parametrize("weight_bits", [8, 4, 3])
def test_a_saved_model_comes_back_with_the_same_bits(seed, tmp_path, weight_bits):
    model = cifar10_vit(depth=2, pretrained=False, num_classes=11, in_chans=1, qkv_bias=False)
    images = torch.randn(4, 1, 32, 32)
    quantized = quantize(model, images, weight_bits, 7)
    quantized.save(tmp_path / "model.safetensors")
    with pytest.raises(FileExistsError, match="exists already"):
        quantized.save(tmp_path / "model.safetensors")
    quantized.save(tmp_path / "model.safetensors", overwrite=True)
    loaded = QuantizedViT.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded(images), quantized(images))
    for name, value in quantized.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.ranges == quantized.ranges
    assert loaded.pretrained_cfg == quantized.pretrained_cfg
    assert (loaded.weight_bits, loaded.activation_bits) == (weight_bits, 7)
    weights = sum(layer.weight.numel() for layer, _ in quantized._layers())
    others = sum(value.numel() for value in quantized.state_dict().values()) - weights
    size = (tmp_path / "model.safetensors").stat().st_size
    assert 0 < size - weights * (1 if weight_bits > 4 else 0.5) - 4 * others < 16_000  # the header


def rewrite(path, change, checksum: bool = True) -> None:
    """Change the header's text; the checksum is that of the changed text, or left out."""
    with safe_open(path, "pt") as file:
        text = change(file.metadata()["smi_fast_quantized"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    value = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        described = f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        value = zlib.crc32(described + tensor.numpy().tobytes(), value)
    save_file(tensors, path, {"smi_fast_quantized": text} | ({"checksum": str(value)} if checksum else {}))


@pytest.mark.parametrize("weight_bits", [8, 4])
def test_every_flipped_bit_of_a_saved_model_is_found(seed, tmp_path, weight_bits):
    path = tmp_path / "model.safetensors"
    quantize(cifar10_vit(pretrained=False, depth=1), torch.randn(2, 3, 32, 32), weight_bits, 8).save(path)
    data = path.read_bytes()
    generator = random.Random(seed)
    header = 8 + int.from_bytes(data[:8], "little")
    places = [generator.randrange(header) for _ in range(40)] + [generator.randrange(len(data)) for _ in range(60)]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        print(f"byte {place} of {len(data)}, header {header}: {data[place]} became {damaged[place]}")
        with pytest.raises(ValueError, match=r"model\.safetensors: "):
            QuantizedViT.load(path)


def test_a_model_of_format_version_1_which_has_no_checksum_is_read(model, images, tmp_path):
    path = tmp_path / "model.safetensors"
    quantized = quantize(model, images)
    quantized.save(path)
    rewrite(path, lambda text: text.replace('"format_version": 2', '"format_version": 1'), checksum=False)
    assert torch.equal(QuantizedViT.load(path)(images), quantized(images))


def test_what_is_no_quantised_model_is_refused(model, images, tmp_path):
    path = tmp_path / "model.safetensors"
    quantize(model, images).save(path)
    data = path.read_bytes()
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        quantize(model, images).save(tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        QuantizedViT.load(tmp_path / "other.safetensors")
    path.write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a complete quantised model"):
        QuantizedViT.load(path)
    path.write_bytes(data)
    rewrite(path, lambda text: text.replace('"format_version": 2', '"format_version": 9'))
    with pytest.raises(ValueError, match="format version 9 is newer than 2"):
        QuantizedViT.load(path)
    rewrite(path, lambda text: text.replace('": 9', '": 2').replace("gelu", "relu"))
    with pytest.raises(ValueError, match=r"not a quantised model that is understood .*gelu"):
        QuantizedViT.load(path)
    path.write_bytes(data.replace(b'"checksum"', b'"checksun"'))
    with pytest.raises(ValueError, match=r"not a quantised model that is understood .*no checksum"):
        QuantizedViT.load(path)
    keep = torch.zeros(5, 1).long()
    InvertedDataset.from_images(torch.rand(5, 3, 32, 32), keep, keep[:, 0], (8, 8)).save(path, overwrite=True)
    with pytest.raises(ValueError, match="so it is not a quantised model"):
        QuantizedViT.load(path)


@pytest.mark.parametrize("name", ["weight_bits", "activation_bits"])
@pytest.mark.parametrize("bits", [1, 9, 0, -8, 8.0, True, None, "8"])
def test_bits_out_of_range_are_refused(model, images, name, bits):
    with pytest.raises(ValueError, match=f"{name} must be an integer from 2 to 8, got {bits!r}"):
        quantize(model, images, **{name: bits})


def test_a_calibration_set_that_is_empty_or_does_not_fit_is_refused(model, images):
    for empty in ([], iter([]), images[:0]):
        with pytest.raises(ValueError, match="the calibration set is empty"):
            quantize(model, empty)
    with pytest.raises(TypeError, match="must hold images or PackedTokens, not str"):
        quantize(model, ["images"])
    with pytest.raises(ValueError, match=r"images are \(5, 3, 16, 32\)"):
        quantize(model, images[:, :, :16])
    with pytest.raises(ValueError, match="patches have 7 values each, the model's have 192"):
        quantize(model, PackedTokens.from_batch(torch.zeros(1, 2, 7), torch.arange(2)))
    with pytest.raises(ValueError, match=r"activations from (nan|.* to nan)"):
        quantize(model, images.index_fill(0, torch.tensor(3), torch.nan))

    def dataset(**options) -> InvertedDataset:
        options = dict(size=32, patch=8, metadata={}) | options
        keep = torch.zeros(1, 1).long()
        blank = torch.zeros(1, 3, options["size"], options["size"])
        return InvertedDataset.from_images(blank, keep, keep[:, 0], (options["patch"],) * 2, options["metadata"])

    quantize(model, dataset())
    for options, message in (
        (dict(size=64), r"images of \(3, 64, 64\) .* the model takes \(3, 32, 32\)"),
        (dict(patch=4), r"patches of \(4, 4\), the model takes .* in \(8, 8\)"),
        (dict(metadata={"mean": [0.5] * 3}), r"mean.*0\.5, 0\.5, 0\.5.*0\.4914, 0\.4822, 0\.4465"),
        (dict(metadata={"std": [1] * 3}), r"std.*1, 1, 1.*0\.247, 0\.2435, 0\.2616"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(model, dataset(**options))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (dict(class_token=False, global_pool="avg"), "fc_norm"),
        (dict(global_pool="avg", fc_norm=False), "global_pool='avg'"),
        (dict(reg_tokens=2), "reg_token"),
        (dict(pre_norm=True), "norm_pre"),
        (dict(no_embed_class=True), "no_embed_class=True"),
        (dict(pos_embed="none"), "pos_embed"),
        (dict(init_values=1e-5), r"blocks\[0\].ls1 is a LayerScale"),
        (dict(qk_norm=True), r"blocks\[0\].attn.q_norm"),
        (dict(scale_mlp_norm=True), r"blocks\[0\].mlp.norm"),
        (dict(act_layer="relu"), r"blocks\[0\].mlp.act is a ReLU"),
        (dict(act_layer="gelu_tanh"), r"blocks\[0\].mlp.act"),
        (dict(norm_layer="rmsnorm"), "LayerNorm"),
        (dict(num_classes=0), "head is a Identity"),
        (dict(block_fn=smi_fast.vit.ResPostBlock), r"blocks\[0\] is a ResPostBlock"),
    ],
)
def test_a_model_that_the_scheme_does_not_cover_is_refused(seed, options, part):
    model = cifar10_vit(pretrained=False, depth=1, embed_dim=24, **options)
    with pytest.raises(smi_fast.UnsupportedModelError, match=part):
        quantize(model, torch.zeros(1, 3, 32, 32))
    with pytest.raises(smi_fast.UnsupportedModelError, match="the model is a Linear"):
        quantize(nn.Linear(2, 2), torch.zeros(1, 3, 32, 32))


def test_the_exported_program_holds_int8_weights_and_gives_the_same_numbers(model, images, tmp_path):
    """The same scheme in PT2E's operators; float32 sums in another order may round an activation to its neighbour."""
    quantized = quantize(model.float(), images.float(), 8, 8)
    path = tmp_path / "model.pt2"
    torch.export.save(quantized.export(), path)
    program = torch.export.load(path)
    dtypes = [value.dtype for name, value in program.state_dict.items() if name.endswith("weight") and value.ndim == 2]
    assert dtypes == [torch.int8] * 10
    fresh = torch.randn(9, 3, 32, 32)
    logits, expected = program.module()(fresh), quantized(fresh)
    step = quantized.quantizers["logits"].scale
    torch.testing.assert_close(logits, expected, rtol=0, atol=3 * step)
    assert (logits - expected).abs().mean() < 0.2 * step


def test_a_large_batch_gives_the_numbers_of_its_parts(model, images, monkeypatch):
    """On a CPU a batch is evaluated as many images at a time as its caches hold."""
    quantized, keep = quantize(model, images), random_keep(5, ragged=True)
    expected = torch.cat([quantized(image[None], keep=[cells]) for image, cells in zip(images, keep, strict=True)])
    for values in (1, 8000, 10**9):
        monkeypatch.setattr("smi_fast.quantization.CACHED_VALUES", values)
        torch.testing.assert_close(quantized(images, keep=keep), expected)


def test_in_float32_every_integer_is_the_nearest_to_its_real_number(seed):
    """Place by place, from the integers of the places before: float32 rounding decides only near the middle."""
    model, seen = cifar10_vit(), {}
    quantized = quantize(model, torch.randn(8, 3, 32, 32))
    for block, prefix in zip(quantized.blocks, range(6), strict=True):
        block.quantizers |= {place: Recorded(q, seen, f"{prefix}.{place}") for place, q in block.quantizers.items()}
    quantized(1.2 * torch.randn(3, 3, 32, 32))

    def value(place: str) -> torch.Tensor:
        number, name = place.split(".")
        return seen[place][1].double() * quantized.blocks[int(number)].quantizers[name].scale

    def dense(layer: IntegerLinear, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, layer.weight.double() * layer.weight_scale.double()[:, None], layer.bias.double())

    def check(place: str, real: torch.Tensor) -> None:
        number, name = place.split(".")
        quantizer, integers = quantized.blocks[int(number)].quantizers[name], seen[place][1]
        nearest = (real.double() / quantizer.scale).clamp(*quantizer.bounds)
        assert (integers.double() - nearest.reshape(integers.shape)).abs().max() < 0.5 + 1e-3, place

    for number in range(1, 5):  # the last block gives the class token alone
        block, exact, at = quantized.blocks[number], copy.deepcopy(model.blocks[number]).double(), f"{number}."
        x = value(f"{number - 1}.sum2")
        check(at + "norm1", exact.norm1(x))
        qkv = dense(block.qkv, value(at + "norm1")).view(3, 65, 3, 3, 64).permute(2, 0, 3, 1, 4)  # [3, B, H, N, D]
        check(at + "qkv", qkv)
        q, k, v = value(at + "qkv")
        check(at + "scores", q @ k.mT / 8)
        check(at + "attention", (value(at + "scores").softmax(-1) @ v).transpose(1, 2))
        check(at + "proj", dense(block.proj, value(at + "attention").view(195, 192)))
        check(at + "sum1", x + value(at + "proj"))
        check(at + "norm2", exact.norm2(value(at + "sum1")))
        check(at + "gelu", F.gelu(dense(block.fc1, value(at + "norm2"))))
        check(at + "mlp", dense(block.fc2, value(at + "gelu")))
        check(at + "sum2", value(at + "sum1") + value(at + "mlp"))
