"""Errors of a DataLoader's workers, as the ones that were raised there."""

from __future__ import annotations


def has_traceback(error: Exception) -> bool:
    """Whether an error comes from a worker, whose traceback it carries as text."""
    return "Original Traceback" in str(error)


def without_traceback(error: Exception) -> Exception:
    """An error of a worker without the text of its traceback, if it is about input or files."""
    if not has_traceback(error) or not isinstance(error, ValueError | OSError):
        return error
    # the last line of the traceback is the error itself
    return type(error)(str(error).strip().splitlines()[-1].partition(": ")[2])
