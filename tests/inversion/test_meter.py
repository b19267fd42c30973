"""The meter measures speeds of stages without their first calls, and durations that add up to the run's."""

import json
import time
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from smi_fast import Inverter, StoppingSchedule, accelerate
from smi_fast.inversion.inverter import Stage
from smi_fast.inversion.meter import StageCost, StageMeter, confidences, iteration_flops


def speeds(monkeypatch, *runs: list[tuple[Stage, list[float]]]) -> list[float]:
    """Iterations per second of stages whose iterations take these seconds, by a clock that only they advance."""
    now, meter = 100.0, StageMeter(torch.device("cpu"))
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    for stages in runs:
        with meter.batch():
            for stage, durations in stages:
                for iteration, seconds in enumerate(durations, stage.start):
                    now += seconds
                    meter(SimpleNamespace(iteration=iteration, stage=stage))
    return [cost.iterations_per_second for cost in meter.costs.values()]


def vit() -> VisionTransformer:
    model = VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=3).eval()
    model.pretrained_cfg = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "input_size": (3, 16, 16)}
    return model


@pytest.mark.parametrize(
    "cold", [[3.0, 1.0, *[0.2] * 6], [3.0, 0.9, 1.5, 1.5, 0.2, 0.2, 0.2, 0.9]], ids=["cpu", "CUDA graph"]
)
def test_the_first_calls_of_a_stage_are_not_in_its_speed(cold, monkeypatch):
    dense, sparse = Stage(0, 8, 64, 65), Stage(8, 100, 14, 15)
    assert speeds(monkeypatch, [(dense, cold), (sparse, [*[0.7] * 6, *[0.05] * 86])]) == pytest.approx([5, 20])


def test_a_stages_speed_is_over_all_batches(monkeypatch):
    stage, then = Stage(0, 3, 64, 65), Stage(3, 9, 14, 15)
    whole, interrupted = [(stage, [9.0, 3.0, 3.0]), (then, [0.5] * 6)], [(stage, [2.0, 2.0])]
    # all iterations are first calls, so that the median is over all of both batches
    assert speeds(monkeypatch, whole, interrupted) == pytest.approx([1 / 3.0, 1 / 0.5])


def test_durations_add_up_to_the_time_of_the_run(device, seed):
    inverter = Inverter(vit().to(device), stopping=StoppingSchedule({4: 0.5}), iterations=12, progress=False)
    meter, ends = StageMeter(device), []
    before = time.perf_counter()
    with meter.batch():
        inverter.run([0, 1], callback=lambda step: [meter(step), ends.append(step.seconds())])
    elapsed = time.perf_counter() - before
    costs = meter.costs.values()
    assert [cost.iterations for cost in costs] == [4, 8]
    assert min(cost.seconds for cost in costs) > 0
    assert 0.5 * ends[-1] < sum(cost.seconds for cost in costs) < elapsed


def test_an_error_ends_the_stage_that_it_interrupts():
    meter, stage = StageMeter(torch.device("cpu")), Stage(0, 9, 64, 65)

    def run() -> None:
        with meter.batch():
            meter(SimpleNamespace(iteration=0, stage=stage))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        run()
    assert [cost.iterations for cost in meter.costs.values()] == [1]


def test_costs_of_batches_add_up_from_their_records():
    dense, sparse = Stage(0, 8, 64, 65), Stage(8, 100, 14, 15)
    costs = [
        StageCost(sparse, 92, 4.0, 23.0, 10, flops=5, flops_paper=7),
        StageCost(dense, 8, 2.0, 4.0, 30),
        StageCost(sparse, 10, 1.0, 25.0, 20, flops=3, flops_paper=8),
    ]
    assert StageCost.merged(json.loads(json.dumps([cost.record() for cost in costs]))) == [
        StageCost(dense, 8, 2.0, 4.0, 30),
        StageCost(sparse, 102, 5.0, 24.0, 20, flops=5, flops_paper=8),
    ]


def test_a_meter_that_goes_on_has_the_costs_of_before(monkeypatch):
    now, meter, stage = 100.0, StageMeter(torch.device("cpu")), Stage(0, 9, 64, 65)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    for iterations in (range(4), range(4, 9)):
        again = StageMeter(torch.device("cpu"))
        again.load_state_dict(json.loads(json.dumps(meter.state_dict())) if iterations.start else {"times": []})
        with again.batch():
            for iteration in iterations:
                now += 2.0
                again(SimpleNamespace(iteration=iteration, stage=stage))
            meter = again
            saved = meter.state_dict()
    assert [(cost.iterations, cost.seconds) for cost in meter.costs.values()] == [(9, 18.0)]
    assert [len(times["durations"]) for times in saved["times"]] == [9]


@pytest.mark.parametrize("kept", [16, 5])
def test_operations_are_those_of_the_products_counted_by_hand(kept, seed):
    inverter = Inverter(vit(), stopping=StoppingSchedule.dense(), iterations=1, progress=False)
    width, tokens = 32, kept + 1
    block = 12 * width**2 * tokens + 2 * tokens**2 * width  # multiply-adds: linear layers and attention
    last = 2 * width**2 * tokens + 10 * width**2 + 2 * tokens * width  # keys and values of all tokens, the rest of one
    forward = block + last + 48 * width * kept + 3 * width
    backward = forward + 2 * tokens**2 * width + 2 * tokens * width  # the products of attention have two inputs each
    flops = iteration_flops(inverter, Stage(0, 1, kept, tokens), batch_size=3)
    assert flops == pytest.approx(3 * 2 * (forward + backward), rel=0.01)


def gflop_by_the_paper(model: nn.Module, patches: int, batch_size: int, **options) -> str:
    inverter = Inverter(model, stopping="dense", progress=False, **options)
    stage = Stage(0, 1, patches, patches + inverter.backbone.num_prefix_tokens)
    return f"{iteration_flops(inverter, stage, batch_size, flops='paper') / 1e9:.2f}"


@pytest.mark.parametrize(
    ("name", "patches", "printed"),
    [
        ("deit_tiny_patch16_224", 196, "414.20"),
        ("deit_tiny_patch16_224", 46, "107.32"),
        ("deit_base_patch16_224", 196, "6475.63"),
        ("deit_base_patch16_224", 46, "1578.97"),
    ],
)
def test_the_papers_count_is_that_of_its_table_3(name, patches, printed):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert gflop_by_the_paper(model, patches, batch_size=128) == printed


@pytest.mark.parametrize(("side", "printed"), [(32, "0.11"), (224, "5.47")])
def test_the_papers_count_is_that_of_its_table_1_for_one_image(side, printed):
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    assert gflop_by_the_paper(model, 1, batch_size=1, image_size=(side, side)) == printed


@pytest.mark.parametrize("kept", [16, 5])
def test_the_papers_count_of_any_vit_is_that_by_hand(kept, seed):
    model = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=3, mlp_ratio=3, reg_tokens=2,
        pre_norm=True, qk_norm=True, global_pool="avg", fc_norm=True,
    )  # fmt: skip
    modes, inverter = [module.training for module in model.modules()], Inverter(model, stopping="dense", progress=False)
    width, tokens = 32, kept + 3
    block = (3 + 1 + 3 + 3) * width**2 * tokens + 4 * (2 + 2) * width * tokens  # norms of the tokens, keys and queries
    forward = 16 * 48 * width + 4 * width * tokens + 2 * block + 4 * width + 3 * width  # fc_norm sees the pooled token
    assert iteration_flops(inverter, Stage(0, 1, kept, tokens), batch_size=5, flops="paper") == 5 * 3 * forward
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_papers_count_of_a_cnn_is_that_by_hand():
    layers = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=3),
        nn.BatchNorm2d(6, affine=False), nn.Flatten(), nn.Linear(6 * 16, 4),
    )  # fmt: skip
    inverter = Inverter(layers, image_size=(8, 8), progress=False)
    forward = 64 * 6 * 27 + 4 * 64 * 6 + 16 * 6 * 18 + 2 * 16 * 6 + 6 * 16 * 4
    assert iteration_flops(inverter, Stage(0, 1, 1, 1), batch_size=2, flops="paper") == 2 * 3 * forward


def test_a_stage_at_half_resolution_is_counted_at_half_resolution():
    layers = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    inverter = Inverter(layers, image_size=(8, 8), pooling={0: 2, 3: 1}, iterations=6, progress=False)
    half, full = ({flops: iteration_flops(inverter, stage, 2, flops) for flops in ("torch", "paper")}
                  for stage in inverter.stages)  # fmt: skip
    assert half == {"torch": 2 * 2 * 2 * 16 * 6 * 27, "paper": 2 * 3 * (16 * 6 * 27 + 4 * 16 * 6)}
    assert full == {flops: 4 * count for flops, count in half.items()}


def test_another_count_is_refused():
    inverter = Inverter(vit(), stopping="dense", progress=False)
    with pytest.raises(ValueError, match="flops must be one of torch, paper, got 'thop'"):
        iteration_flops(inverter, Stage(0, 1, 5, 6), 1, flops="thop")


@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
def test_confidences_are_timms_on_the_kept_patches(ragged, device, seed):
    model, images, targets = vit().to(device), torch.rand(2, 3, 16, 16), torch.tensor([2, 0])
    keep = [torch.tensor([1, 5, 9]), torch.tensor([2, 3, 11][: 2 if ragged else 3])]
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    expected = []
    for image, kept in zip(((images - mean) / std).to(device), keep, strict=True):
        tokens = model.patch_embed(image[None])[:, kept] + model.pos_embed[:, 1:][:, kept]
        prefix = model.cls_token + model.pos_embed[:, :1]
        logits = model.forward_head(model.norm(model.blocks(torch.cat((prefix, tokens), 1))))
        expected.append(logits.softmax(1)[0].detach().cpu())
    fast, given = accelerate(model, dtype=torch.float32), keep if ragged else torch.stack(keep)
    got, predicted = confidences(fast, images, given, targets, mean.flatten().tolist(), std.flatten().tolist())
    torch.testing.assert_close(got, torch.stack([p[t] for p, t in zip(expected, targets, strict=True)]))
    assert predicted.tolist() == [int(p.argmax()) for p in expected]
