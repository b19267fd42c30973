"""Downloads that end soon where there is no network."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from smi_fast.data.files import first_line

TIMEOUT = 5.0  # seconds to wait for a server's answer


@contextmanager
def hub() -> Iterator[None]:
    """Let the client of the hub look into its cache only, if the hub cannot be reached.

    The client itself tries again for most of a minute before it gives up, file by file. So the hub is asked once
    beforehand, and if there is no answer or a server's error, the client is told that it is offline.

    Raises:
        ConnectionError: a file is neither in the cache nor can the hub be reached. The message says why.
    """
    from huggingface_hub import constants, utils

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # otherwise each retry prints a line
    was_offline, reason = constants.HF_HUB_OFFLINE, "HF_HUB_OFFLINE is set"
    if not was_offline:
        try:
            answer = utils.get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
            reason = f"{constants.ENDPOINT} answers {answer.status_code}" if answer.status_code >= 500 else None
        except Exception as error:  # the client stands on different libraries, whose errors have no common type
            reason = f"{constants.ENDPOINT} cannot be reached ({first_line(error)})"
    try:
        _set_offline(reason is not None)
        yield
    except (utils.LocalEntryNotFoundError, utils.OfflineModeIsEnabled) as error:
        raise ConnectionError(
            f"{reason or first_line(error)}, and the cache {constants.HF_HUB_CACHE} does not hold them (HF_HOME names "
            "the folder of another cache)"
        ) from error
    finally:
        _set_offline(was_offline)


def _set_offline(offline: bool) -> None:
    from huggingface_hub import constants, utils

    constants.HF_HUB_OFFLINE = offline
    reset = getattr(utils, "reset_sessions", None) or utils.close_session  # before version 1, and since
    reset()  # the session of the client knows what held when it was made


@contextmanager
def impatient() -> Iterator[None]:
    """Let downloads through Python's own sockets fail if a server is silent for some seconds."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
