"""The competition with a student: its value and its gradient, whatever teacher and student are and whatever is kept."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from backbone_cases import small_vit
from distillation_cases import tiny_cnn
from torch.distributions import Categorical, kl_divergence

import smi_fast
from smi_fast import Inverter, competition, deep_inversion
from smi_fast.backbones.base import Outputs
from smi_fast.backbones.conversion import as_backbone
from smi_fast.inversion.competition import jensen_shannon
from smi_fast.packed import PackedTokens

MEANS = (0.1, 0.5, 0.4), (0.5, 0.3, 0.2)
STDS = (0.5, 0.2, 0.3), (0.25, 0.4, 0.3)


def vit(of: int, **options):
    """A ViT in float64 for images of 12 x 16 pixels, in the normalisation of the teacher (0) or the student (1)."""
    model = small_vit(**options).eval()
    model.head.weight.data *= 8  # it is sure of its classes, so that two models disagree
    model.pretrained_cfg = {"input_size": (3, 12, 16), "mean": MEANS[of], "std": STDS[of]}
    return model


def divergence(student, teacher, js):
    """(B,) by torch's own distributions and its own KL divergence."""
    if js == "exact":
        p, q = Categorical(logits=student / 3), Categorical(logits=teacher / 3)
        m = Categorical(probs=(p.probs + q.probs) / 2)
        return (kl_divergence(p, m) + kl_divergence(q, m)) / 2
    p, q = (student / 3).softmax(1), (teacher / 3).softmax(1)
    m = ((p + q) / 2).clamp(0.01, 0.99)
    terms = [F.kl_div(x.clamp(0.01, 0.99).log(), m, reduction="none").sum(1) for x in (p, q)]
    return sum(terms) / 2


def timm_logits(model, images, keep):
    """Logits of images whose kept patches are given as rows of indices, by timm's own modules."""
    x, rows = model._pos_embed(model.patch_embed(images)), []
    for tokens, row in zip(x, keep, strict=True):
        tokens = torch.cat((tokens[:1], tokens[1:][row.long()]))[None]
        rows.append(model.forward_head(model.norm(model.blocks(model.norm_pre(tokens)))))
    return torch.cat(rows)


KEPT = {
    "dense": [torch.arange(12)] * 3,
    "sparse": [torch.tensor([3, 0, 7]), torch.tensor([5, 11, 2]), torch.tensor([0, 1, 2])],
    "ragged": [torch.tensor([3]), torch.tensor([5, 11, 2, 8]), torch.tensor([0, 1])],
}


@pytest.mark.parametrize("norm", ["batch", "image"])
@pytest.mark.parametrize("js", ["published", "exact"])
@pytest.mark.parametrize("kept", KEPT)
def test_value_and_gradient_equal_a_definition(kept, js, norm, seed):
    teacher, student = vit(0), vit(1, embed_dim=24, depth=1, num_heads=3)
    fast, keep, targets = smi_fast.accelerate(teacher), KEPT[kept], torch.tensor([4, 0, 1])
    images = torch.randn(3, 3, 12, 16, dtype=torch.float64).requires_grad_()
    grid, packed = fast.grid((12, 16)), PackedTokens.from_sequences(None, keep)

    patches = grid.gather(images, packed)
    tokens = PackedTokens(patches, packed.positions, packed.cu_seqlens, packed.max_seqlen)
    outputs = fast.outputs(tokens, grid_size=grid.size)
    outputs = Outputs(outputs.logits, patches=tokens, grid=grid, mean=MEANS[0], std=STDS[0])
    found = competition(deep_inversion(norm=norm), student, weight=7.0, js=js).loss(outputs, targets)

    (mean, other_mean), (std, other_std) = (
        [torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in values] for values in (MEANS, STDS)
    )
    theirs = timm_logits(teacher, images, keep)
    own = timm_logits(student, (images * std + mean - other_mean) / other_std, keep)
    j = divergence(own, theirs, js)
    assert j.min() > 1e-3
    terms = 1 - (j.mean() if norm == "batch" else j).clamp(0, 1)
    expected = F.cross_entropy(theirs, targets, reduction="mean" if norm == "batch" else "sum") + 7 * terms.sum()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    grads = (torch.autograd.grad(loss, images)[0] for loss in (found, expected))
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-10)


def cnn(of: int):
    return tiny_cnn(MEANS[of], STDS[of], size=(12, 16)).double()


@pytest.mark.parametrize(
    ("teacher", "student"),
    [(cnn, cnn), (cnn, vit), (vit, cnn), (vit, lambda of: vit(of, patch_size=2))],
    ids=["cnn-cnn", "cnn-vit", "vit-cnn", "other-patches"],
)
def test_a_student_of_another_kind_sees_the_whole_images(teacher, student, seed):
    """Also where the view has moved the patches to other cells."""
    teacher, student, targets = teacher(0), student(1), torch.tensor([4, 0, 1])
    backbone = as_backbone(teacher)
    images, grid = torch.randn(3, 3, 12, 16, dtype=torch.float64).requires_grad_(), backbone.grid((12, 16))
    cells = torch.stack([torch.randperm(grid.num_patches) for _ in range(3)])
    packed = PackedTokens.from_batch(None, cells)
    tokens = PackedTokens(grid.gather(images, packed), packed.positions, packed.cu_seqlens, packed.max_seqlen)
    outputs = backbone.outputs(tokens, grid_size=grid.size)
    outputs = Outputs(outputs.logits, patches=tokens, grid=grid, mean=MEANS[0], std=STDS[0])
    found = competition(deep_inversion(), student, 7, "exact").loss(outputs, targets)

    (mean, other_mean), (std, other_std) = (
        [torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in values] for values in (MEANS, STDS)
    )
    theirs, own = teacher(images), student((images * std + mean - other_mean) / other_std)
    j = divergence(own, theirs, "exact").mean()
    assert j > 1e-3
    expected = F.cross_entropy(theirs, targets) + 7 * (1 - j)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    grads = (torch.autograd.grad(loss, images)[0] for loss in (found, expected))
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-10)


def test_both_models_get_gradients(seed):
    """Each of the two divergences moves the images against the student and against the teacher."""
    student, teacher = torch.randn(2, 4, 6, dtype=torch.float64).requires_grad_().unbind()
    for js in ("published", "exact"):
        grads = torch.autograd.grad(jensen_shannon(student, teacher, js).sum(), (student, teacher))
        assert all(grad.abs().max() > 1e-3 for grad in grads)
        swapped = jensen_shannon(teacher, student, js)
        torch.testing.assert_close(jensen_shannon(student, teacher, js), swapped)


def test_disagreement_beyond_the_clamp_has_no_gradient_as_published():
    student, teacher = (one_hot[None].requires_grad_() for one_hot in 900 * torch.eye(10, dtype=torch.float64)[:2])
    published, exact = (jensen_shannon(student, teacher, js) for js in ("published", "exact"))
    assert published.item() == pytest.approx(1.61, abs=0.01)
    assert exact.item() == pytest.approx(math.log(2))
    assert torch.autograd.grad(published.clamp(0, 1), student)[0].eq(0).all()


def test_the_exact_divergence_is_at_most_ln_2_and_finite_for_any_logits(seed):
    student, teacher = (10.0 ** torch.randint(-3, 5, (2, 200, 1)) * torch.randn(2, 200, 8)).requires_grad_().unbind()
    found = jensen_shannon(student, teacher, "exact")
    assert found.min() >= -1e-6
    assert found.max() <= math.log(2) + 1e-6
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(found.sum(), (student, teacher)))
    torch.testing.assert_close(jensen_shannon(teacher, teacher, "exact"), torch.zeros(200), rtol=0, atol=1e-6)


def inverter(teacher, objective, **options):
    options = {"stopping": "dense", "iterations": 6, "jitter": 0, "flip": 0, "lr": 0.05} | options
    return Inverter(teacher, objective=objective, progress=False, **options)


def test_a_run_minimises_it_as_a_function_of_ones_own(seed):
    """Dense and without views, a plain function can run the student on the images itself."""
    teacher, student = vit(0).float(), vit(1, depth=1).float()
    mean, other_mean, std, other_std = (torch.tensor(v).view(3, 1, 1) for v in (*MEANS, *STDS))

    def by_hand(logits, images, targets):
        own = student((images * std + mean - other_mean) / other_std)
        return F.cross_entropy(logits, targets) + 5 * (1 - divergence(own, logits, "exact").mean().clamp(0, 1))

    prior = deep_inversion(1e-3).prior
    expected = inverter(teacher, by_hand, prior=prior).run([1, 2], seed)
    found = inverter(teacher, competition(deep_inversion(1e-3), student, 5, "exact")).run([1, 2], seed)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-4, atol=1e-4)
    plain = inverter(teacher, deep_inversion(1e-3))
    again = plain.with_objective(competition(plain.objective, student, 5, "exact"))
    assert torch.equal(again.run([1, 2], seed).losses, found.losses)
    assert plain.objective == deep_inversion(1e-3)


def test_a_student_that_a_callback_changes_competes_as_it_is_now(seed):
    """The rest of the run is that of a run which goes on from there with the changed student."""
    teacher, student, states = vit(0).float(), vit(1, depth=1).float(), []
    changed = copy.deepcopy(student)
    torch.nn.init.normal_(changed.head.weight)

    def change(step):
        if step.iteration == 3:
            states.append(step.state_dict())
            student.load_state_dict(changed.state_dict())

    options = {"stopping": {2: 0.5}, "jitter": 0.2}
    found = inverter(teacher, competition(deep_inversion(), student), **options).run([1, 2], seed, change)
    rest = inverter(teacher, competition(deep_inversion(), changed), **options).run([1, 2], seed, state=states[0])
    assert torch.equal(found.losses, rest.losses)
    kept = inverter(teacher, competition(deep_inversion(), vit(1, depth=1).float()), **options).run([1, 2], seed)
    assert not torch.equal(found.losses[4:], kept.losses[4:])


def test_the_student_is_frozen_and_restored_also_after_an_error(seed):
    teacher, student = vit(0), vit(1, drop_path_rate=0.5).train()
    student.blocks[0].eval()
    student.cls_token.requires_grad_(False)
    before = copy.deepcopy(student.state_dict())
    modes, asks = ([m.training for m in student.modules()], [p.requires_grad for p in student.parameters()])
    run = inverter(teacher, competition(deep_inversion(), student))

    def check(step):
        assert not any(m.training for m in (*student.blocks.modules(), *student.head.modules()))
        assert not any(p.requires_grad for p in student.parameters())
        if step.iteration == 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run.run([0], seed, check)
    assert modes == [m.training for m in student.modules()]
    assert asks == [p.requires_grad for p in student.parameters()]
    assert all(p.grad is None for p in student.parameters())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


class OfFeatures:
    """An objective that reads a place within the model, and has a prior of its own."""

    features, prior = ("blocks.0",), smi_fast.inversion.priors.ImagePrior(1e-2)

    def loss(self, outputs, targets):
        return outputs.features["blocks.0"].values.square().mean()


def test_the_wrapped_objective_keeps_its_features_and_its_prior(seed):
    teacher, wrapped = vit(0), competition(OfFeatures(), vit(1), weight=0.0)
    assert (wrapped.features, wrapped.prior) == (OfFeatures.features, OfFeatures.prior)
    found, expected = (inverter(teacher, objective).run([3], seed) for objective in (wrapped, OfFeatures()))
    torch.testing.assert_close(found.losses, expected.losses)


def test_an_objective_with_a_norm_of_its_own_kind_gets_the_mean(seed):
    class Scaled:
        norm = 2.0

        def loss(self, outputs, targets):
            return outputs.logits.sum() * self.norm

    tokens = smi_fast.accelerate(vit(0)).grid((12, 16))
    packed = PackedTokens.from_batch(torch.randn(3, 12, 48, dtype=torch.float64), torch.arange(12))
    outputs = smi_fast.accelerate(vit(0)).outputs(packed, grid_size=tokens.size)
    outputs = Outputs(outputs.logits, patches=packed, grid=tokens, mean=MEANS[0], std=STDS[0])
    student = as_backbone(vit(1))
    term = competition(Scaled(), student, 7.0).loss(outputs, None) - outputs.logits.sum() * 2
    batch = competition(deep_inversion(), student, 7.0).loss(outputs, torch.tensor([4, 0, 1]))
    torch.testing.assert_close(term, batch - F.cross_entropy(outputs.logits, torch.tensor([4, 0, 1])))


def test_what_does_not_fit_is_named(seed):
    teacher, student = vit(0), vit(1)

    def refused(match, error=ValueError, objective=None, **options):
        with pytest.raises(error, match=match):
            competition(objective or deep_inversion(), **{"student": student} | options)

    refused("weight must be at least 0 and finite, got -1", weight=-1)
    refused("weight must be at least 0 and finite, got nan", weight=math.nan)
    refused("temperature must be positive and finite, got 0", temperature=0)
    refused("js must be one of published, exact, got 'other'", js="other")
    refused("a method loss, got <function", TypeError, objective=F.cross_entropy)
    refused("a method loss, got <class", TypeError, objective=deep_inversion)
    refused("Linear", smi_fast.UnsupportedModelError, student=torch.nn.Linear(3, 5))
    for other, match in (
        (vit(1, num_classes=7), "the student's num_classes is 7, the inverted model's is 5"),
        (vit(1, in_chans=1), "the student's num_channels is 1, the inverted model's is 3"),
        (vit(1, img_size=8), "images have 12x16 pixels, the model takes 8x8"),
        (vit(1).to("meta"), "the student's device is meta, the inverted model's is cpu"),
    ):
        with pytest.raises(ValueError, match=match):
            inverter(teacher, competition(deep_inversion(), other))
    coarse = competition(deep_inversion(), vit(1, patch_size=2))
    with pytest.raises(ValueError, match=r"2x2 pixels and the inverted model of 4x4: .* needs whole images"):
        inverter(teacher, coarse, stopping={2: 0.5})
    with pytest.raises(ValueError, match="images of 6x8 pixels are not divided by patches of 4x4"):
        inverter(cnn(0), competition(deep_inversion(), student), pooling={0: 2, 1: 1})
    student.head.weight.data[0, :2] = math.nan
    with pytest.raises(ValueError, match=r"the objective's AcceleratedViT's weight head\.weight holds 2 values"):
        inverter(teacher, competition(deep_inversion(), student)).run([0])
