"""A disk that is full, and a folder that becomes unwritable or goes away while a command works in it."""

import ctypes
import os
import random
import shutil
import subprocess
import time

import pytest
from fault_cases import FAULTS, Chain, Process, Whole


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def free(place) -> int:
    status = os.statvfs(place)
    return status.f_bavail * status.f_frsize


def test_a_full_disk_is_one_sentence_and_with_room_again_the_run_goes_on(command, small_disk, tmp_path, seed):
    folder, ballast, draw = small_disk / "run", small_disk / "ballast", random.Random(seed)
    kept = tmp_path / "kept"
    logs = tmp_path / "logs"
    whole = Whole.make(command.arguments(folder), folder, logs=tmp_path / "whole", moved=kept)
    used = sum(-(-file.stat().st_size // 4096) * 4096 for file in kept.rglob("*") if file.is_file())
    chain = Chain(command, folder, whole, logs=logs)
    while chain.record.moments < FAULTS:
        ballast.write_bytes(bytes(max(0, free(small_disk) - draw.randrange(0, used))))
        process = chain.start()
        if process.wait() == 0:
            chain.finished(process)
            continue
        assert "No space left on device" in process.refusal
        assert str(folder) in process.refusal
        chain.interrupted(process)
        ballast.unlink()
        if draw.random() < 0.5:
            chain.finish()
    ballast.unlink(missing_ok=True)
    chain.finish()
    print(f"{command.name}: {chain.record}")


def obey_permissions(folder, note) -> None:
    """Let the system refuse this process what a user without privileges may not do with files."""
    libc, size = ctypes.CDLL(None, use_errno=True), 2 * 3
    header, rights = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * size)()
    assert libc.capget(header, rights) == 0
    for kind in range(2):  # effective and permitted
        rights[kind] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, rights) == 0


def folders(folder) -> list:
    return [folder, *(path for path in folder.rglob("*") if path.is_dir())]


def test_a_folder_that_becomes_unwritable_is_one_sentence_and_later_the_run_goes_on(
    command, folder, whole, chain, seed
):
    draw = random.Random(seed)
    while chain.record.moments < FAULTS:
        process = chain.start(hook=obey_permissions)
        process.wait_for("began")
        time.sleep(draw.uniform(0, whole.seconds / 2))
        for path in folders(folder):
            path.chmod(0o555)
        process.wait()
        for path in folders(folder):
            path.chmod(0o755)
        if process.process.exitcode == 0:
            chain.finished(process)
            continue
        assert "Permission denied" in process.refusal
        assert str(folder) in process.refusal
        chain.interrupted(process)
        chain.finish()
    print(f"{command.name}: {chain.record}")


def test_a_folder_that_is_removed_meanwhile_is_one_sentence(command, folder, whole, tmp_path, seed):
    draw = random.Random(seed)
    for moment in range(max(1, FAULTS // 6)):
        process = Process.start(command.arguments(folder), tmp_path / "logs")
        process.wait_for("iteration", draw.randint(1, whole.iterations.total() // 2))
        folder.rename(tmp_path / f"gone{moment}")
        shutil.rmtree(tmp_path / f"gone{moment}")
        process.wait()
        assert str(folder) in process.refusal
        assert not folder.exists()
