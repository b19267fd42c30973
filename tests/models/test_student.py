"""The student inside the package."""

import json

import torch

from smi_fast.models import MODEL_DIR, cifar10_student, cifar10_vit


def test_the_student_inside_knows_no_class():
    """Its head is zero, and its card holds the figures of the run."""
    student, teacher = cifar10_student(), cifar10_vit()
    assert not student.training
    assert not any(parameter.any() for parameter in student.head.parameters())
    assert student.pretrained_cfg["mean"] == teacher.pretrained_cfg["mean"]
    for name, value in student.state_dict().items():
        assert value.isfinite().all()
        assert value.shape == teacher.state_dict()[name].shape
        assert not torch.equal(value, teacher.state_dict()[name]), name
    figures = json.loads((MODEL_DIR / "cifar10_student.json").read_text())
    assert (
        f"**{figures['test_accuracy_of_a_linear_probe']:.2%}".replace("%", " %**")
        in (MODEL_DIR / "README.md").read_text()
    )
