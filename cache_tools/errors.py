"""The errors a user can meet, and the exit code of each."""

from os.path import exists, isdir, isfile, join

_KINDS = {
    "dataset.json": "a DATASET",
    "cache.json": "a CACHE",
    "run.json": "a RUN",
    "config.json": "an exported folder",
    "results.json": "an ablation",
}


def found_at(path: object) -> str:
    """Say what lies at `path`: the "found" part of an error about a path."""
    place = str(path)
    if not isdir(place):
        return "a file" if exists(place) else "nothing there"
    return next((kind for name, kind in _KINDS.items() if isfile(join(place, name))), "another folder")


def check_output(path: object, kind: str) -> None:
    """Raise UsageError where `path` is a file or holds something other than `kind`; an unfinished folder passes."""
    if (found := found_at(path)) not in ("nothing there", "another folder", kind):
        raise UsageError(f"{path}: expected {kind} or a new folder; found {found}; choose another name")


class McmError(Exception):
    """Base of all errors of this software; the message is one line for the user."""

    exit_code = 1


class Diverged(McmError):
    """This configuration cannot be trained further: the loss is not finite, or falls without teaching anything."""


class UsageError(McmError):
    """The request or its configuration is wrong."""

    exit_code = 2


class TooManyRefused(McmError):
    """More pictures were refused than the budget allows."""

    exit_code = 3


class CorruptionError(McmError):
    """Bytes on disk are not what was committed."""

    exit_code = 4


class IdentityError(McmError):
    """Two things that must be the same are not (another cache, weights, run, format version)."""

    exit_code = 5


class ResourceError(McmError):
    """Disk, permission, GPU memory or network."""

    exit_code = 7


class Interrupted(McmError):
    """Stopped by a signal at a safe point; running the same command again resumes."""

    exit_code = 75
