"""Models and tokenizers that are named by a local folder or by their name on the hub."""

from __future__ import annotations


def not_there(what: str, name: object, why: Exception | str = "") -> str:
    """What to say of a model or tokenizer that could not be read.

    Args:
        what: it is, such as "language model", or the configuration key that names it.
        name: folder or hub name.
        why: as transformers says; its first line is quoted.
    """
    message = (
        f"{what} {str(name)!r}: not there: give a local folder or a hub name that can be reached"
    )
    return f"{message} ({str(why).splitlines()[0]})" if str(why) else message
