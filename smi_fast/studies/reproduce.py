"""reproduce(): the paper's comparisons on your model and data, written as one page.

Tables and figures have the same numbers as in Hu et al., Sparse Model Inversion, ICML 2024. For each of them, the page
says what was measured, and on how many images. The JSON files of the sections hold the results of each seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from smi_fast.bars import ProgressBar
from smi_fast.inversion.objectives import deep_inversion
from smi_fast.inversion.presets import DEMO, PAPER, InversionSettings
from smi_fast.runs.machine import device_name, versions
from smi_fast.runs.run import EVERY
from smi_fast.studies.ablation import figure8, table7, which_patches
from smi_fast.studies.costs import table1
from smi_fast.studies.downstream import table3, table4, table5
from smi_fast.studies.experiment import Experiment, Settings
from smi_fast.studies.features import figure9
from smi_fast.studies.hallucination import hallucination
from smi_fast.studies.page import Section, write_page
from smi_fast.studies.regions import table2
from smi_fast.studies.removal import removal
from smi_fast.studies.speed import table8

VIT_S = InversionSettings(deep_inversion(tv_l2=1e-3), iterations=100, lr=0.1)  # of a ViT-S/14 of 224 pixels, on a CPU
COSTS = (("resnet18", 32), ("resnet18", 224), ("deit_base_patch16_224", 224))
PRESETS = {
    "paper": Settings(  # a transfer from 14,080 images, as in Table 5
        PAPER,
        dtype=None,
        images=32,
        seeds=3,
        test_images=None,
        rounds=110,
        more_rounds=400,
        samples=128,
        steps=100,
        batch_size=128,
        student_lr=0.1,
        real_images=5000,
        rebirth=4,
        competition=0.2,
        adaptive_seeds=1,
        quantised_images=None,
        ablation_seeds=3,
        ablation_steps=200,
        fractions=(0.1, 0.2, 0.4, 0.5),
        region_images=32,
        removal_images=10_000,
        cost_models=COSTS,
        cost_batch=128,
        speed_batches=(32, 64, 128),
        speed_iterations=50,
        speed_models=("deit_tiny_patch16_224", "deit_base_patch16_224"),
        feature_images=2000,
        cue_images=50_000,
        cue_blocks=3,
    ),
    "vit-s": Settings(
        VIT_S,
        dtype="bfloat16",
        images=32,
        seeds=3,
        test_images=None,
        rounds=4,
        more_rounds=16,
        samples=32,
        steps=300,
        batch_size=32,
        student_lr=0.005,
        real_images=512,
        rebirth=4,
        competition=0.2,
        adaptive_seeds=1,
        quantised_images=300,
        ablation_seeds=2,
        ablation_steps=300,
        fractions=(0.1, 0.2, 0.4, 0.5),
        region_images=10,
        removal_images=500,
        cost_models=COSTS,
        cost_batch=8,
        speed_batches=(8, 32),
        speed_iterations=6,
        speed_models=("deit_tiny_patch16_224", "deit_base_patch16_224"),
        feature_images=300,
        cue_images=3200,
        cue_blocks=3,
    ),
    "demo": Settings(
        DEMO,
        dtype=None,
        images=32,
        seeds=3,
        test_images=2500,
        rounds=4,
        more_rounds=14,
        samples=32,
        steps=200,
        batch_size=64,
        student_lr=0.1,
        real_images=2000,
        rebirth=4,
        competition=10.0,
        adaptive_seeds=1,
        quantised_images=2500,
        ablation_seeds=2,
        ablation_steps=200,
        fractions=(0.15, 0.5),
        region_images=32,
        removal_images=2000,
        cost_models=(*COSTS[:2], ("deit_tiny_patch16_224", 224)),
        cost_batch=8,
        speed_batches=(8, 32),
        speed_iterations=6,
        speed_models=("deit_tiny_patch16_224",),
        feature_images=500,
        cue_images=10_000,
        cue_blocks=3,
    ),
}
SECTIONS: dict[str, Callable[[Experiment], Section]] = {  # in the order of the page
    "table1": table1, "table2": table2, "table3": table3, "table4": table4, "table5": table5, "table7": table7,
    "figure8": figure8, "table8": table8, "figure9": figure9, "hallucination": hallucination,
    "which_patches": which_patches, "removal": removal,
}  # fmt: skip
NEED_STUDENT = ("table4", "table5")
FILES = ("page.md", *(f"{name}.png" for name in SECTIONS))


def reproduce(
    model: nn.Module,
    data: str | Path,
    out: str | Path,
    *,
    root: str | Path | None = None,
    student: nn.Module | None = None,
    student_note: str = "",
    settings: Settings | str = "demo",
    sections: Sequence[str] | None = None,
    progress: bool = True,
    checkpoint_every: float = EVERY,
    overwrite: bool = False,
    command: Sequence[str] | None = None,
) -> Path:
    """Run the paper's comparisons and write `out/page.md` and its pictures.

    A section is saved as soon as it is finished, and the page with it. Inverted images are saved batch by batch, and
    figures one by one. If the function is called again with the same arguments, it goes on where it was interrupted: a
    batch or an evaluation in progress from its last checkpoint. What was damaged since is a warning, and is made again.

    Args:
        model: a timm model that `quantize` takes. It is also the teacher.
        data, root: labelled images, as `load_data` takes them. Real images for calibration or transfer come from the
            split "train". All accuracies are measured on the split "test".
        out: the folder of the results. It is created if it does not exist.
        student: the model whose copies the transfers teach by linear probing, with the model's classes and patches.
            Without one, transfers are left out.
        student_note: a sentence for the page about what the student has learnt so far.
        settings: "paper", "vit-s", "demo", or settings of your own.
        sections: names from `SECTIONS`. None means all of them.
        progress: whether to show progress bars.
        checkpoint_every: the minutes between two checkpoints.
        overwrite: begin anew in a folder that holds results or other files.
        command: the arguments of the command that begins the run, for its `--resume`.

    Returns:
        The path of the page.

    Raises:
        ValueError: a preset or a section is unknown, `out` is in use or holds something else or results of other
            arguments, or `load_data`, `quantize` or `distill` raises it.
        Stopped: Ctrl-C or SIGTERM has asked for an end. What was finished is in `out`.
    """
    if isinstance(settings, str):
        if settings not in PRESETS:
            raise ValueError(f"the preset must be one of {', '.join(PRESETS)}, got {settings!r}")
        settings = PRESETS[settings]
    names = list(SECTIONS if sections is None else sections)
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise ValueError(f"there is no section {unknown[0]!r}: they are {', '.join(SECTIONS)}")
    if student is None:
        names = [name for name in names if name not in NEED_STUDENT]
    run = Experiment(model, student, data, root, Path(out), settings, progress)
    with run.begin(command, files=FILES, overwrite=overwrite, checkpoint_every=checkpoint_every):
        for name in ProgressBar(names, "reproducing", shown=progress, unit="section"):
            run.section(name, SECTIONS[name])
            write(run, student_note)
        return write(run, student_note)


def write(run: Experiment, student_note: str) -> Path:
    """Write the page with all finished sections, and return its path."""
    sections = {name: section for name in SECTIONS if (section := run.finished(name)) is not None}
    about, minutes = run.about, sum(section.seconds for section in sections.values()) / 60
    libraries = ", ".join(f"{name} {version}" for name, version in versions().items())
    learner = f"The student is {about['student']}. {student_note} " if about["student"] else ""
    introduction = (
        f"These are the comparisons of Hu et al. (ICML 2024). The model that is inverted is {about['model']}, and the "
        f"data are {Path(run.data).name}. {learner}The sections took {minutes:.0f} minutes on "
        f"{device_name(run.device)} with {libraries}. Tables show the mean ± standard deviation over the seeds. The "
        "figures of each seed are in `sections/`, and the settings in `run.json`."
    )
    page = run.out / "page.md"
    write_page(page, "Sparse Model Inversion, reproduced", introduction, sections)
    return page
