"""Ctrl-C and SIGTERM at random moments: a command ends with a checkpoint, and a second signal ends it at once."""

import random
import signal

from fault_cases import FAULTS

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def test_a_signal_at_any_moment_ends_a_run_without_losing_an_iteration(command, folder, whole, chain, seed):
    draw = random.Random(seed)
    while chain.record.moments < FAULTS:
        process, number = chain.start(), draw.choice(SIGNALS)
        sent = process.send(number, draw.uniform(0, whole.seconds))
        code = process.wait()
        if code == 0 or not sent:
            chain.finished(process)
            continue
        assert code == 128 + number, process.text
        going_on = f"to go on: smi-fast {command.name} --resume {folder}"
        early = {event for event, *_ in process.events} <= {"started", "ended"}  # perhaps before the options were read
        lines = [going_on, "nothing was written"] if early else [going_on]
        assert process.text.splitlines()[-1] in [f"smi-fast: interrupted; {line}" for line in lines]
        chain.interrupted(process)
    chain.finish("--resume", str(folder)) if (folder / "run.json").exists() else chain.finish()
    assert max(chain.record.iterations) == 0
    print(f"{command.name}: {chain.record}")


def test_a_second_signal_ends_a_run_at_once_with_every_file_whole(command, folder, whole, chain, seed):
    draw = random.Random(seed)
    while chain.record.moments < FAULTS:
        process = chain.start()
        sent = process.send(draw.choice(SIGNALS), draw.uniform(0, whole.seconds))
        sent = sent and process.send(draw.choice(SIGNALS), draw.uniform(0, 0.05))
        code = process.wait()
        if code == 0 or not sent:
            chain.finished(process) if code == 0 else chain.interrupted(process)
            continue
        if "smi-fast: interrupted" not in process.text:  # else the command was over, but for Python's own end
            assert code in (130, 143), process.text
            assert "Traceback" not in process.text
        chain.interrupted(process)
    chain.finish()
    print(f"{command.name}: {chain.record}")
