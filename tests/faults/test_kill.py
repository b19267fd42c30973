"""Commands that are killed at random moments, and within each of their writes, go on with the same bits."""

import random
import shutil
import signal
from dataclasses import replace

from fault_cases import ALWAYS, FAULTS, Chain, EachChange, Whole, is_one_run, moments


def test_a_run_that_is_killed_at_any_moment_goes_on_with_the_same_bits(command, whole, chain, seed):
    draw = random.Random(seed)
    while chain.record.moments < FAULTS:
        process = chain.start()
        sent = process.send(signal.SIGKILL, draw.uniform(0, whole.seconds))
        if process.wait() == -signal.SIGKILL and sent:
            chain.interrupted(process)
        else:
            chain.finished(process)
    chain.finish()
    print(f"{command.name}: {chain.record}; a whole run takes {whole.seconds:.2f} s")


def test_a_run_that_is_killed_within_any_write_goes_on_with_the_same_bits(command, folder):
    short = replace(command, options=f"{command.options} {command.short}")
    whole = Whole.make(short.arguments(folder, every=ALWAYS), folder, EachChange())
    chain = Chain(short, folder, whole, ALWAYS)
    for moment in moments(whole.changes):
        process = chain.start(hook=EachChange(moment))
        assert process.wait() == -signal.SIGKILL, process.text
        chain.interrupted(process)
        chain.finish()
    print(f"{command.name}: {chain.record} of {whole.changes} changes of the folder")


def test_overwriting_never_leaves_files_of_two_runs_wherever_it_is_killed(command, folder, tmp_path):
    template = tmp_path / "old"
    short = replace(command, options=f"{command.options} {command.short}")
    old = Whole.make(short.arguments(folder, *command.other.split()), folder, moved=template)
    shutil.copytree(template, folder)
    whole = Whole.make(short.arguments(folder, "--overwrite", every=ALWAYS), folder, EachChange())
    for moment in moments(whole.changes):
        shutil.copytree(template, folder)
        chain = Chain(short, folder, whole, ALWAYS)
        process = chain.start("--overwrite", hook=EachChange(moment))
        assert process.wait() == -signal.SIGKILL, process.text
        chain.count(process)
        begun = is_one_run(folder, old, whole)
        chain.finish(*(() if begun else ("--overwrite",)))
    print(f"{command.name}: killed at {len(moments(whole.changes))} of {whole.changes} changes of the folder")
