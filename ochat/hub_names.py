"""Names of the Hugging Face hub: what to load for one, without minutes of retries where the hub does not answer.

Whoever loads a model or a tokenizer by name asks `located` first.
"""

import logging
from functools import cache
from pathlib import Path
from threading import Thread

from ochat.errors import ConfigError, first_line

log = logging.getLogger(__name__)

PATIENCE_S = 5


@cache
def located(name: str) -> str:
    """What to load: a folder or a hub's name as it is; where the hub does not answer, the name's folder in its cache.

    ConfigError when it is none of these.
    """
    folder = Path(name)
    if folder.exists():
        return name
    if folder.is_absolute() or name.count("/") != 1 or folder.parent.exists():
        raise ConfigError(
            f"{name}: no such folder, and no name of a hub's (OWNER/NAME). Check the path; it is relative to where you "
            f"are."
        )
    problem = hub_problem()
    if not problem:
        return name
    from huggingface_hub import snapshot_download

    try:
        cached = snapshot_download(name, local_files_only=True)
    except (OSError, ValueError) as exc:  # not there; or no name that a hub would take
        raise ConfigError(
            f"{name}: no such folder, not in the hub's cache, and the hub does not answer ({problem}). Fetch it where "
            f"there is a network (`hf download {name}`), or give a folder that holds it."
        ) from exc
    log.info("%s: the hub does not answer (%s); reading what it cached, %s", name, problem, cached)
    return cached


@cache
def hub_problem() -> str:
    """Why the hub does not answer, in a few words; empty when it does. Asked once in a process.

    Through the hub library's own client, so that its proxies, certificates and HF_HUB_OFFLINE count here as well.
    """
    answers: list[str] = []
    # A thread, because names that do not resolve and addresses that swallow packets have their own, longer patience.
    thread = Thread(target=lambda: answers.append(_ask()), daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    return answers[0] if answers else f"silent for {PATIENCE_S} s"


def _ask() -> str:
    from huggingface_hub import constants, get_session

    try:
        response = get_session().head(constants.ENDPOINT, timeout=PATIENCE_S)
    except Exception as exc:  # noqa: BLE001 (offline mode, DNS, TLS, proxies, malformed addresses: no base shared)
        return first_line(exc)
    return f"it answers {response.status_code}" if response.status_code >= 500 else ""
