"""The errors that a user can meet, and the exit code of each."""

from collections.abc import Collection
from os import listdir
from os.path import exists, isdir, isfile, join

_KINDS = {
    "dataset.json": "a DATASET",
    "cache.json": "a CACHE",
    "run.json": "a RUN",
    "config.json": "an exported folder",
    "results.json": "an ablation",
}
UNFINISHED = "an unfinished folder; the command that began it resumes"


def found_at(path: object) -> str:
    """Return what lies at `path`, for the "found" part of an error about a path."""
    place = str(path)
    if not isdir(place):
        return "a file" if exists(place) else "nothing there"
    kinds = (kind for name, kind in _KINDS.items() if isfile(join(place, name)))
    return next(kinds, UNFINISHED if isdir(join(place, ".run")) else "another folder")


def check_output(path: object, kind: str, own: Collection[str] = ()) -> None:
    """Check that `path` is free for output of `kind`; an unfinished folder passes.

    A folder without .run may hold only `own`: --overwrite would remove other files with the output.

    Raises: UsageError if `path` is a file or holds other files or another kind of output.
    """
    found = found_at(path)
    if found == "another folder":
        names = [name for name in listdir(str(path)) if name not in own]
        if other := sorted(name for name in names if not name.endswith(".partial")):
            found = f"other files, such as {other[0]}"
    if found not in ("nothing there", "another folder", UNFINISHED, kind):
        expected = f"expected {kind} or a new or empty folder"
        raise UsageError(f"{path}: {expected}; found {found}; choose another name")


class McmError(Exception):
    """Base of all errors of this software; the message is one line for the user."""

    exit_code = 1


class Diverged(McmError):
    """Training cannot continue: the loss is not finite, or it falls while the model collapses."""


class UsageError(McmError):
    """The request or its configuration is wrong."""

    exit_code = 2


class TooManyRefused(McmError):
    """More pictures were refused than the budget allows."""

    exit_code = 3


class CorruptionError(McmError):
    """The bytes on disk differ from the committed bytes."""

    exit_code = 4


class IdentityError(McmError):
    """Two things that must be the same differ: cache, weights, run or format version."""

    exit_code = 5


def missing_package(where: str, package: str, extra: str) -> UsageError:
    """Return the error for a package of an extra that is not installed."""
    install = f"run `pip install 'masked-channel-modeling[{extra}]'`"
    return UsageError(f"{where}: expected the package {package}; found none; {install}")


class ResourceError(McmError):
    """A resource is missing: disk, permission, GPU memory or network."""

    exit_code = 7


class Interrupted(McmError):
    """A signal stopped the command at a safe point; running the same command again resumes it."""

    exit_code = 75
