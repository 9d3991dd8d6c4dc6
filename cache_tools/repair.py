"""`verify --repair`: damaged files move to PATH/.run/quarantine; the same `extract` or `shard` makes them again.

Nothing is mended here. A CACHE is a pure function of the request: without its commit a shard counts as never made, and
without its manifest a unit is unfinished, which `extract` finishes with every zarr.json; cache.json, projection.npy,
probe.npy and probe.json it writes where they are missing. Commits leave first: whatever moment this dies at, no commit
vouches for a file that is gone, and a damaged file left behind is overwritten or found again.
"""

from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from .dataset import shard_name
from .storage import move_durably, new_folder, run_folder, shard_lock, try_lock
from .verify import Problem, Report

_NEXT = {
    "cache.json": "run the same `mcm-cache extract` again, then `mcm-cache verify --repair` for what it could not see",
    "dataset.json": "it cannot be moved: shard the original pictures into a new folder by the same request",
}


@dataclass
class Repair:
    """What was moved where (paths below the CACHE or DATASET), what others are working on, and what to do now."""

    quarantine: str | None = None
    moved: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    next: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For a person."""
        moved = [f"moved {name} to {self.quarantine}" for name in self.moved]
        return [*moved, *(f"left {name}: a worker holds it" for name in self.held), *self.next]


def repair(report: Report) -> Repair:
    """Move what `report` names, and what vouches for it; shards that a worker holds are left to it.

    Raises: OSError, when nothing but what was named first may have moved; doing it again goes on.
    """
    root, done = Path(report.path), Repair()
    problems = sorted(report.problems, key=_place)
    target: Path | None = None
    for (_, split, shard), group in groupby(problems, key=_place):
        files = _leaving(root, list(group))
        if not any(file.exists() for file in files):
            continue
        target = target or new_folder(run_folder(root) / "quarantine")
        if shard < 0:
            done.moved += _move(root, files, target)
            continue
        with try_lock(shard_lock(root, split, shard)) as held:
            if held:
                done.moved += _move(root, files, target)
            else:
                done.held.append(f"{split} shard {shard}")
    done.quarantine = str(target) if target else None
    done.next = _what_next(root, problems)
    return done


def _place(problem: Problem) -> tuple[str, str, int]:
    return problem.unit or "", problem.split or "", -1 if problem.shard is None else problem.shard


def _leaving(root: Path, problems: list[Problem]) -> list[Path]:
    """Files that leave for the problems of one shard or of one unit, in order: commit, manifest, the damaged ones."""
    first, files = problems[0], [Path(problem.file) for problem in problems if problem.what != "dataset.json"]
    if first.unit is None:
        return [*files, root / "probe.json"] if any(problem.what == "probe" for problem in problems) else files
    manifest = root / first.unit / "manifest.json"
    commit = root / first.unit / "commits" / f"{shard_name(first.shard)}.json" if first.shard is not None else manifest
    return list(dict.fromkeys([commit, manifest, *files]))


def _move(root: Path, files: list[Path], target: Path) -> list[str]:
    names = [file.relative_to(root) for file in files]
    return [str(name) for name in names if move_durably(root / name, target / name)]


def _what_next(root: Path, problems: list[Problem]) -> list[str]:
    """One line for each thing the user has to do, the sources it needs named."""
    kinds = {problem.what for problem in problems}
    lines = [f"{kind}: {text}" for kind, text in _NEXT.items() if kind in kinds]
    if (root / "dataset.json").exists() and kinds - {"dataset.json"}:
        lines.append(f"run the same `mcm-cache shard SOURCE {root}` again: it needs the original pictures")
    elif any(problem.shard is not None for problem in problems):
        lines.append("run the same `mcm-cache extract` again: the shards need the DATASET and the teacher")
    elif kinds - {"dataset.json", "cache.json"}:
        lines.append("run the same `mcm-cache extract` again: all of it follows from the request, no shard is redone")
    return lines
