"""Writes that are killed: the file is the old one or the new one, whole, and what is left beside it can be removed."""

import os
import resource
import signal
import sys

import pytest
import torch
from dataset_cases import assert_identical, make

from smi_fast.data.files import PARTIAL, read_json, remove_partials, write_json
from smi_fast.data.sparse import InvertedDataset
from smi_fast.models import cifar10_vit
from smi_fast.quantization import QuantizedViT, quantize

SYSTEM_CALLS = {"open", "os.mkdir", "os.chmod", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir"}


def in_child(work) -> int:
    """Run `work` in a forked process. Return its exit code, or the negative number of the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(moment: int, write) -> bool:
    """Run `write` in a process that gets SIGKILL before its system call number `moment`, or before or after an fsync of
    that number in the common count. Return False if it came to its end before that moment."""

    def work():
        count, fsync = 0, os.fsync

        def passes():
            nonlocal count
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        def counted_fsync(file):
            passes()
            fsync(file)
            passes()

        os.fsync = counted_fsync
        sys.addaudithook(lambda event, _: passes() if event in SYSTEM_CALLS else None)
        write()

    code = in_child(work)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def killed_half_written(size: int, write) -> None:
    """Run `write` in a process that the system kills when a file of it grows beyond `size` bytes."""

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        write()

    assert in_child(work) == -signal.SIGXFSZ


class OfDatasets:
    """Each writer makes an old or a new content, writes it, and compares what it reads with a content."""

    name = "images.safetensors"

    def content(self, seed):
        return make(seed, n=20)

    def write(self, content, path):
        content.save(path, overwrite=True)

    def is_whole(self, content, path):
        read = InvertedDataset.load(path)
        read.verify()
        return torch.equal(read.patches, content.patches)


class OfReports:
    name = "report.json"

    def content(self, seed):
        return {"seed": seed, "losses": list(range(seed % 7, 2000))}

    def write(self, content, path):
        write_json(path, content)

    def is_whole(self, content, path):
        return read_json(path) == content


class OfQuantizedModels:
    name = "model.safetensors"

    def content(self, seed):
        torch.manual_seed(seed)
        model = cifar10_vit(False, patch_size=16, depth=1, embed_dim=12, num_heads=1)
        return quantize(model, torch.randn(2, 3, 32, 32))

    def write(self, content, path):
        content.save(path, overwrite=True)

    def is_whole(self, content, path):
        read = QuantizedViT.load(path).state_dict()
        return all(torch.equal(value, read[name]) for name, value in content.state_dict().items())


class OfPictures:
    name = "pictures"

    def content(self, seed):
        return make(seed, n=2)

    def write(self, content, path):
        content.export(path)

    def is_whole(self, content, path):
        read = InvertedDataset.from_image_folder(path, content.patch_size)
        return torch.equal((content.images() * 255).round(), (read.images() * 255).round())


WRITERS = [OfDatasets(), OfReports(), OfQuantizedModels(), OfPictures()]
of_every_kind = pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: type(writer).__name__)


def left_by_a_kill(path, writer, old, new):
    """Check what lies in the folder of `path` after a kill. Return whether it is the "old", the "new" or nothing."""
    beside = sorted(name for name in os.listdir(path.parent) if name != path.name)
    assert all(PARTIAL.fullmatch(name) for name in beside), beside
    assert [found.name for found in remove_partials(path.parent)] == beside
    assert os.listdir(path.parent) == ([path.name] if path.exists() else [])
    if not path.exists():
        return None
    whole = {"old": old is not None and writer.is_whole(old, path), "new": writer.is_whole(new, path)}
    assert sum(whole.values()) == 1
    return max(whole, key=whole.get)


@pytest.mark.parametrize(
    ("writer", "replaces"),
    [(writer, False) for writer in WRITERS] + [(writer, True) for writer in WRITERS[:-1]],  # export replaces nothing
    ids=lambda value: value if isinstance(value, bool) else type(value).__name__,
)
def test_a_write_killed_at_any_moment_leaves_the_old_file_or_the_new(seed, tmp_path, writer, replaces):
    path, new, old = tmp_path / writer.name, writer.content(seed + 1), writer.content(seed) if replaces else None
    found, moment, killed = [], 0, True
    while killed:
        if path.is_dir():
            path.rename(tmp_path.parent / f"{tmp_path.name} {moment}")
        path.unlink(missing_ok=True)
        if old is not None:
            writer.write(old, path)
        killed = killed_at(moment, lambda: writer.write(new, path))
        found.append(left_by_a_kill(path, writer, old, new))
        moment += 1
    before = None if old is None else "old"
    first = found.index("new")
    assert found == [before] * first + ["new"] * (len(found) - first)
    assert first >= 5  # the folder, the file, its content, its mode and its fsync come before its name
    assert len(found) - first >= 3  # and the folder's fsync after it


@of_every_kind
def test_a_half_written_file_never_has_its_name(seed, tmp_path, writer):
    path, old, new = tmp_path / writer.name, writer.content(seed), writer.content(seed + 1)
    writer.write(old, path)
    size = max(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
    if path.is_dir():
        path.rename(tmp_path.parent / f"{tmp_path.name} old")
        old = None
    before = left_by_a_kill(path, writer, old, new)
    for part in (0, size // 3, size * 2 // 3):
        killed_half_written(part, lambda: writer.write(new, path))
        assert left_by_a_kill(path, writer, old, new) == before


def test_only_the_litter_of_killed_writes_is_removed(tmp_path):
    litter, link = tmp_path / f".{'0a' * 16}.partial", tmp_path / f".{'1b' * 16}.partial"
    (tmp_path / "mine").mkdir()
    (litter / "new").mkdir(parents=True)
    link.symlink_to(tmp_path / "mine")
    (tmp_path / f".{'2c' * 16}.partial").write_text("a file, as earlier versions left it")
    kept = [".partial", ".0a.partial", f"{'0a' * 16}.partial", f".{'0A' * 16}.partial", f".{'0a' * 16}.partial.png"]
    kept += [f".{'0a' * 17}.partial", f".{'0a' * 16}.partial\n", f"mine/.{'0a' * 16}.partial"]
    for name in kept:
        (tmp_path / name).write_text("mine")
    assert remove_partials(tmp_path) == sorted([litter, link, tmp_path / f".{'2c' * 16}.partial"])
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"mine", *kept}


def test_a_write_that_fails_after_the_rename_is_whole(seed, tmp_path, monkeypatch):
    path, fsync = tmp_path / "images.safetensors", os.fsync
    make(seed).save(path)

    def failing(file):
        if os.path.samestat(os.fstat(file), tmp_path.stat()):
            raise OSError(5, "Input/output error")
        fsync(file)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match=r"Input/output error: '.*images\.safetensors'"):
        make(seed + 1).save(path, overwrite=True)
    assert_identical(InvertedDataset.load(path), make(seed + 1))
    assert os.listdir(tmp_path) == [path.name]


def test_a_file_is_written_through_before_its_name_and_its_folder_after_it(tmp_path, monkeypatch):
    fsync, replace, order = os.fsync, os.replace, []

    def watched_fsync(file):
        place = os.readlink(f"/proc/self/fd/{file}")
        order.append("folder" if place == str(tmp_path) else "file")
        fsync(file)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", lambda *names: order.append("rename") or replace(*names))
    write_json(tmp_path / "report.json", {})
    assert order == ["file", "rename", "folder"]
    order.clear()
    make(0, n=3).export(tmp_path / "pictures")
    assert order == ["file"] * (3 + 3 + 1) + ["rename", "folder"]  # pictures, the folders of classes, their folder
