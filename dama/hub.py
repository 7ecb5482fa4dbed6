"""Whether Hugging Face's hub answers, asked once in a process."""

from __future__ import annotations

from pathlib import Path

from dama.console import log

TIMEOUT_S = 10.0
_asked: list[str] = []  # at most one name: what the hub was asked for


def go_offline_without_hub(source: str) -> None:
    """Where the hub does not answer, work with its local cache from here on.

    Its library would try every file of every model six times, with pauses: minutes till the first error.

    Args:
        source: folder or hub name of what is to be loaded; for a folder nothing is asked.
    """
    from huggingface_hub import constants, model_info
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if constants.HF_HUB_OFFLINE or _asked or Path(source).is_dir():
        return
    _asked.append(source)
    try:
        model_info(source, timeout=TIMEOUT_S)
    except (HfHubHTTPError, HFValidationError):  # it answered, or the name is none: loading says which
        return
    except Exception as error:  # of whatever lies between here and there: names, proxies, certificates
        constants.HF_HUB_OFFLINE = True
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log(f"warning: {constants.ENDPOINT} does not answer ({reason}); only what its local cache holds can be loaded")
