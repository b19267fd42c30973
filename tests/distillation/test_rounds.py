"""distill(): the student learns as it would without caches, from the kept patches only, and nothing else changes."""

import copy

import pytest
import torch
from distillation_cases import CLASSES, SIZE, make_dataset, timm_logits, tiny, tiny_cnn
from torch.utils.data import DataLoader, TensorDataset

import smi_fast
from smi_fast.data.sparse import InvertedDataset
from smi_fast.distillation.rounds import distill
from smi_fast.inversion.until import Until
from smi_fast.seeds import batch_seed

QUIET = {"progress": False}


def reference(teacher, student, dataset, steps, linear_probing, temperature=20.0, lr=0.1, momentum=0.9, decay=1e-4):
    """Train on all images in every step without caches: timm's forward pass, Eq. 6 and SGD written out."""
    parameters = list((student.head if linear_probing else student).parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    images, keeps = dataset.images(), [dataset[i][1] for i in range(len(dataset))]
    for _ in range(steps):
        loss = 0
        for image, keep in zip(images.split(1), keeps, strict=True):
            with torch.no_grad():
                p = (timm_logits(teacher, image, keep) / temperature).softmax(1)
            q = (timm_logits(student, image, keep) / temperature).softmax(1)
            loss = loss + temperature**2 * (p * (p.log() - q.log())).sum() / len(images)
        for parameter, v, grad in zip(parameters, velocity, torch.autograd.grad(loss, parameters), strict=True):
            v.mul_(momentum).add_(grad + decay * parameter.detach())
            parameter.data -= lr * v


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("linear_probing", [True, False])
def test_training_equals_a_plain_loop_without_caches(seed, linear_probing, ragged):
    """Teacher and student differ in normalisation, width and depth. Steps see all images, so order has no effect."""
    teacher, student = tiny(), tiny(mean=0.4, std=0.3, embed_dim=48, depth=1)
    expected, dataset = copy.deepcopy(student), make_dataset(ragged=ragged)
    distill(
        teacher,
        student,
        dataset=dataset,
        rounds=2,
        steps=2,
        flip=False,
        linear_probing=linear_probing,
        lr=0.05,
        **QUIET,
    )
    reference(teacher, expected, dataset, 4, linear_probing, lr=0.05)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=1e-3, atol=2e-5, msg=name)


def whole_images(n=12, patch=SIZE):
    images = torch.rand(n, 3, SIZE, SIZE)
    return images, InvertedDataset.from_images(images, None, torch.arange(n) % CLASSES, (patch, patch))


@pytest.mark.parametrize("teacher", [tiny, tiny_cnn])
def test_a_cnn_is_trained_whole_with_the_statistics_of_its_batches(seed, teacher):
    """BatchNorm runs in training mode in the steps and in evaluation mode for the accuracy."""
    teacher, student, evaluated = teacher(), tiny_cnn(mean=0.4, std=0.3, width=6), []
    images, dataset = whole_images(patch=4 if isinstance(teacher, type(tiny())) else SIZE)
    expected, before = copy.deepcopy(student).train(), copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    with torch.no_grad():
        taught = (teacher((images - 0.5) / 0.5) / 3).softmax(1)
    for _ in range(4):
        learnt = (expected((images - 0.4) / 0.3) / 3).log_softmax(1)
        optimizer.zero_grad()
        (9 * (taught * (taught.log() - learnt)).sum(1).mean()).backward()
        optimizer.step()

    def evaluate(student):
        evaluated.append(any(module.training for module in student.modules()))
        return 0.5

    options = {"rounds": 2, "steps": 2, "flip": False, "temperature": 3.0, "lr": 0.05, "evaluate": evaluate}
    distill(teacher, student, dataset=dataset, **options, **QUIET)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert evaluated == [False, False]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_vit_learns_from_a_cnn(seed):
    teacher, student = tiny_cnn(), tiny(num_classes=CLASSES)
    inverter = smi_fast.Inverter(
        teacher, objective=smi_fast.deep_inversion(), stopping="dense", iterations=3, progress=False
    )
    result = distill(teacher, student, inverter=inverter, rounds=2, samples=5, steps=3, **QUIET)
    assert [batch.patch_size for batch in result.batches] == [(SIZE, SIZE)] * 2
    images, data = whole_images()
    reference = copy.deepcopy(student)
    distill(teacher, student, dataset=data, rounds=1, steps=1, flip=False, **QUIET)
    with torch.no_grad():
        taught, x = teacher((images - 0.5) / 0.5) / 20, (images - 0.5) / 0.5
        features = reference.forward_head(reference.forward_features(x), pre_logits=True)
    loss = 400 * (taught.softmax(1) * (taught.log_softmax(1) - (reference.head(features) / 20).log_softmax(1))).sum(1)
    (grad,) = torch.autograd.grad(loss.mean(), reference.head.weight)
    expected = reference.head.weight - 0.1 * (grad + 1e-4 * reference.head.weight)
    torch.testing.assert_close(student.head.weight, expected, rtol=1e-4, atol=1e-5)


KINDS = {"cnn": (tiny_cnn, tiny_cnn, "dense"), "vit": (tiny, tiny, {2: 0.5}), "mixed": (tiny, tiny_cnn, "dense")}


@pytest.mark.parametrize("kind", KINDS)
def test_adaptive_images_compete_with_the_student_as_it_is_in_each_round(seed, kind):
    teacher, student, stopping = KINDS[kind]
    teacher, student = teacher(), student(mean=0.4)
    states = [copy.deepcopy(student.state_dict())]
    inverter = smi_fast.Inverter(
        teacher, objective=smi_fast.deep_inversion(), iterations=4, stopping=stopping, progress=False
    )
    result = distill(
        teacher, student, inverter=inverter, rounds=2, samples=6, steps=3, seed=3, adaptive=10.0, js="exact",
        linear_probing=False, callback=lambda *_: states.append(copy.deepcopy(student.state_dict())), **QUIET,
    )  # fmt: skip
    weight = next(iter(states[0]))
    assert not torch.equal(states[0][weight], states[1][weight])
    for number, (batch, state) in enumerate(zip(result.batches, states, strict=False)):
        student.load_state_dict(state)
        competing = inverter.with_objective(smi_fast.competition(inverter.objective, student, 10.0, "exact"))
        targets = [i % CLASSES for i in range(6 * number, 6 * number + 6)]
        alone = competing.run(targets, seed=batch_seed(3, number))
        assert torch.equal(batch.images(), alone.images)
        assert not torch.equal(batch.images(), inverter.run(targets, seed=batch_seed(3, number)).images)


def test_linear_probing_moves_the_head_only(seed):
    teacher, student = tiny(), tiny()
    before = copy.deepcopy((teacher.state_dict(), student.state_dict()))
    student.train()
    student.blocks[0].eval()
    student.cls_token.requires_grad_(False)
    modes = [m.training for model in (teacher, student) for m in model.modules()]
    asks = [p.requires_grad for model in (teacher, student) for p in model.parameters()]
    distill(teacher, student, dataset=make_dataset(), rounds=1, steps=3, **QUIET)
    assert [m.training for model in (teacher, student) for m in model.modules()] == modes
    assert [p.requires_grad for model in (teacher, student) for p in model.parameters()] == asks
    assert all(p.grad is None for model in (teacher, student) for p in model.parameters())
    for model, state in zip((teacher, student), before, strict=True):
        for name, value in model.state_dict().items():
            moves = model is student and name.startswith("head.")
            assert torch.equal(value, state[name]) != moves, name


def test_a_student_learns_the_teachers_answers(seed):
    teacher = tiny()
    student = copy.deepcopy(teacher)
    torch.nn.init.zeros_(student.head.weight)
    torch.nn.init.zeros_(student.head.bias)
    dataset = make_dataset(n=64)
    result = distill(teacher, student, dataset=dataset, rounds=4, steps=250, **QUIET)
    losses = [round.loss for round in result.history]
    assert losses == sorted(losses, reverse=True)
    images = [(dataset.images([i]), dataset[i][1]) for i in range(64)]
    with torch.no_grad():
        taught, learnt = (torch.cat([timm_logits(m, *image) for image in images]) for m in (teacher, student))
    taught, learnt = (logits - logits.mean(1, keepdim=True) for logits in (taught, learnt))
    assert (taught - learnt).square().sum() < 0.1 * taught.square().sum()  # 1 before the transfer, 0.013 at worst after


def inverter_of(teacher, kind=smi_fast.Inverter):
    return kind(teacher, iterations=4, stopping=smi_fast.StoppingSchedule({2: 0.5}), progress=False)


def test_the_pool_grows_from_round_to_round(seed):
    teacher, student, told = tiny(), tiny(), []
    inverter = inverter_of(teacher)
    labels = torch.randint(CLASSES, (40,))
    data = [(images, labels[:20]) for images in torch.randn(1, 20, 3, SIZE, SIZE)]
    result = distill(
        teacher, student, inverter=inverter, rounds=3, samples=7, steps=5, evaluate=data, seed=3,
        callback=lambda *args: told.append(args), **QUIET,
    )  # fmt: skip
    assert [(r.number, r.samples, r.iterations, r.steps) for r in result.history] == [
        (1, 7, 4, 5),
        (2, 14, 8, 10),
        (3, 21, 12, 15),
    ]
    assert told == list(zip(result.history, result.batches, strict=True))
    assert torch.cat([batch.targets for batch in result.batches]).tolist() == [i % CLASSES for i in range(21)]
    first, second, third = (batch.images() for batch in result.batches)
    assert not any(torch.equal(a, b) for a, b in ((first, second), (second, third)))
    assert all(len(batch[0][1]) == 8 for batch in result.batches)  # half of 16 patches
    alone = inverter.run([number % CLASSES for number in range(7, 14)], seed=batch_seed(3, 1))
    assert torch.equal(second, alone.images)
    assert all(r.inversion_seconds > 0 and r.transfer_seconds > 0 for r in result.history)


def test_an_inversion_that_ends_early_counts_what_it_ran(seed):
    """Of a model that is sure of anything after a check."""
    teacher, student = tiny(), tiny()
    inverter = smi_fast.Inverter(teacher, stopping="dense", iterations=90, until=Until(1e-9, every=10), progress=False)
    result = distill(teacher, student, inverter=inverter, rounds=2, samples=3, steps=1, **QUIET)
    ran = len(inverter.run([0], 0).losses)
    assert ran < 90
    assert [r.iterations for r in result.history] == [ran, 2 * ran]


def test_the_inverters_own_bar_is_hidden(seed, capsys):
    teacher = tiny()
    inverter = inverter_of(teacher)
    inverter.progress = True
    distill(teacher, tiny(), inverter=inverter, rounds=1, samples=2, steps=1, **QUIET)
    assert capsys.readouterr().err == ""
    assert inverter.progress


def test_accuracy_is_measured_after_each_round(seed):
    """timm's own count equals that of a loader (whose features are kept in linear probing) and that of a function."""
    teacher, start, dataset = tiny(), tiny(), make_dataset(n=20)
    images, labels = torch.randn(40, 3, SIZE, SIZE), torch.randint(CLASSES, (40,))
    loader = DataLoader(TensorDataset(images, labels), batch_size=16)

    def by_timm(student):
        assert not student.training
        return (student(images).argmax(1) == labels).float().mean().item()

    for linear_probing in (True, False):
        students = copy.deepcopy(start), copy.deepcopy(start)
        a, b = (
            distill(
                teacher, student, dataset=dataset, rounds=3, samples=5, steps=5, linear_probing=linear_probing,
                evaluate=evaluate, lr=0.05, **QUIET,
            )
            for student, evaluate in zip(students, (loader, by_timm), strict=True)
        )  # fmt: skip
        assert [r.samples for r in a.history] == [5, 10, 15]
        assert [r.accuracy for r in a.history] == pytest.approx([r.accuracy for r in b.history])
        assert b.history[-1].accuracy == by_timm(students[1])
        reached = a.history[1].accuracy
        assert a.reaching(reached) == next(r for r in a.history if r.accuracy >= reached)
        assert a.reaching(1.1) is None


def test_a_dataset_is_drawn_without_replacement(seed):
    dataset = make_dataset(n=10)
    result = distill(tiny(), tiny(), dataset=dataset, rounds=4, samples=4, steps=1, **QUIET)
    assert [r.samples for r in result.history] == [4, 8, 10, 10]
    assert [r.iterations for r in result.history] == [0] * 4
    drawn = [sample[0] for batch in result.batches for sample in batch]
    assert sorted(patches.sum().item() for patches in drawn) == sorted(sample[0].sum().item() for sample in dataset)


@pytest.mark.parametrize("linear_probing", [True, False])
def test_the_seed_decides_every_bit_and_torchs_state_stays(seed, linear_probing):
    teacher, start = tiny(), tiny(proj_drop_rate=0.1)
    heads = []
    for of in (0, 0, 1):
        student = copy.deepcopy(start)
        state = torch.get_rng_state()
        distill(
            teacher, student, inverter=inverter_of(teacher), rounds=2, samples=6, steps=3, batch_size=4, seed=of,
            linear_probing=linear_probing, **QUIET,
        )  # fmt: skip
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(1)  # so that the next run starts from another state
        heads.append(student.head.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_all_64_bits_of_the_seed_decide_dropout(seed):
    """One image and no flips, so that nothing but dropout is random."""
    teacher, start, dataset = tiny(), tiny(proj_drop_rate=0.5), make_dataset(n=1)
    heads = []
    for of in (5, 5, 5 + 2**32):
        student = copy.deepcopy(start)
        options = dict(rounds=1, steps=2, flip=False, linear_probing=False, seed=of)
        distill(teacher, student, dataset=dataset, **options, **QUIET)
        heads.append(student.head.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("linear_probing", [True, False])
@pytest.mark.parametrize("where", ["inverting", "evaluating"])
def test_an_interrupt_leaves_the_finished_rounds(seed, linear_probing, where):
    teacher, student, states = tiny(), tiny(), []

    class Interrupted(smi_fast.Inverter):
        """Ctrl-C is pressed in the second iteration of the third round."""

        def run(self, targets, seed=0, callback=None):
            def interrupt(step):
                callback(step)
                if where == "inverting" and len(states) == 2 and step.iteration == 1:
                    raise KeyboardInterrupt

            return super().run(targets, seed=seed, callback=interrupt)

    def evaluate(_):
        if where == "evaluating" and len(states) == 2:
            raise KeyboardInterrupt
        states.append(copy.deepcopy(student.state_dict()))
        return 0.0

    result = distill(
        teacher, student, inverter=inverter_of(teacher, Interrupted), rounds=5, samples=4, steps=3, evaluate=evaluate,
        linear_probing=linear_probing, **QUIET,
    )  # fmt: skip
    assert result.interrupted
    assert len(result.history) == len(result.batches) == len(states) == 2
    assert all(torch.equal(value, states[-1][name]) for name, value in student.state_dict().items())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_an_error_leaves_modes_and_gradients_as_they_were(seed):
    teacher, student = tiny(), tiny().train()
    with pytest.raises(ZeroDivisionError):
        distill(teacher, student, dataset=make_dataset(), steps=1, callback=lambda *_: 1 / 0, **QUIET)
    assert all(module.training for module in student.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in student.parameters())


def test_what_does_not_fit_is_named(seed):
    teacher, dataset = tiny(), make_dataset()

    def refused(match, student=None, teacher=teacher, error=ValueError, **arguments):
        arguments = {"dataset": dataset, **QUIET} | arguments
        with pytest.raises(error, match=match):
            distill(teacher, student or tiny(), **arguments)

    refused("the teacher has classes 5, the student 7", tiny(num_classes=7))
    refused("sparse in patches of 4x4, the student takes patches of 8x8", tiny(patch_size=8))
    refused("images have 16x16 pixels, the model takes 32x32", tiny(img_size=32))
    refused("the same model", teacher)
    refused("the same model", smi_fast.accelerate(teacher))
    refused("no classes", tiny(num_classes=0), tiny(num_classes=0))
    refused("either an inverter or a dataset", dataset=None)
    refused("either an inverter or a dataset", inverter=inverter_of(teacher))
    refused("linear_probing must be False", tiny_cnn(), dataset=whole_images()[1], linear_probing=True)
    refused("sparse in patches of 4x4, the student takes patches of 16x16", tiny_cnn())
    refused("sparse in patches of 4x4", tiny_cnn(), dataset=None, inverter=inverter_of(teacher))
    refused("adaptive is a setting of an inversion", adaptive=10.0)
    refused("inversion_batch_size is a setting of an inversion", inversion_batch_size=2)
    adapting = {"dataset": None, "inverter": inverter_of(teacher)}
    refused("weight must be at least 0 and finite, got -1", adaptive=-1, **adapting)
    refused("js must be one of published, exact, got 'other'", adaptive=1, js="other", **adapting)
    refused("another model than the teacher", dataset=None, inverter=inverter_of(tiny()))
    refused("mean", dataset=make_dataset(metadata={"mean": [0.4] * 3, "std": [0.5] * 3}))
    refused("std", dataset=make_dataset(metadata={"mean": [0.5] * 3, "std": [0.6] * 3}))
    coarse = InvertedDataset.from_images(torch.rand(1, 3, SIZE, SIZE), torch.tensor([[0]]), torch.tensor([0]), (8, 8))
    refused("sparse in patches of 8x8, the teacher takes patches of 4x4", dataset=coarse)
    grey = InvertedDataset.from_images(torch.rand(1, 1, SIZE, SIZE), torch.tensor([[0]]), torch.tensor([0]), (4, 4))
    refused("the dataset has channels 1, the teacher 3", dataset=grey)
    for name in ("rounds", "samples", "steps", "batch_size", "inversion_batch_size"):
        refused(f"{name} must be at least 1, got 0", **{name: 0})
        refused(f"{name} must be an integer, got 2.0", error=TypeError, **{name: 2.0})
    for name, value in (("temperature", 0), ("lr", -1), ("momentum", 1), ("weight_decay", -0.1)):
        refused(f"{name}.*{value}", **{name: value})


def test_the_students_normalisation_may_differ(seed):
    dataset = make_dataset(metadata={"mean": [0.5] * 3, "std": [0.5] * 3})
    assert distill(tiny(), tiny(mean=0.1), dataset=dataset, rounds=1, steps=1, **QUIET).history


def test_a_loss_that_is_not_finite_warns(seed):
    with pytest.warns(UserWarning, match=r"the loss is (nan|inf) in round 1; lr 1e\+30 is too high"):
        distill(tiny(), tiny(), dataset=make_dataset(), rounds=1, steps=9, lr=1e30, **QUIET)
