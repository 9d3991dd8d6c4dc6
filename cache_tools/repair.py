"""`verify --repair`: damaged files move to PATH/.run/quarantine; the same `extract` or `shard` makes them again.

Nothing is rewritten here. A CACHE is a pure function of the request: `extract` redoes a shard without a commit,
finishes a unit without a manifest, and writes cache.json, projection.npy, probe.npy and probe.json where they are
missing. Commits are moved first: whenever this process dies, no commit vouches for a file that is gone.
"""

from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from .dataset import shard_name
from .storage import move_durably, shard_lock, try_lock, work_dir
from .verify import Problem, Report


@dataclass
class Repair:
    """What was moved where (paths below the CACHE or DATASET), what other processes hold, and what to do now."""

    quarantine: str
    moved: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    next: str = ""

    def lines(self) -> list[str]:
        """One line per file and per held shard, then what to do."""
        moved = [f"moved {name} to {self.quarantine}" for name in self.moved]
        return [*moved, *(f"left {name}: a worker holds it" for name in self.held), self.next]


def repair(report: Report) -> Repair:
    """Move what `report` names, and what vouches for it; a shard that a worker holds is left to the worker.

    Raises: OSError. Commits have moved before the files they vouch for; the next repair continues.
    """
    root = Path(report.path)
    quarantine = work_dir(root) / "quarantine"
    target = quarantine / f"{len(list(quarantine.glob('*'))):06d}"
    done = Repair(str(target), next=_what_next(root, {problem.what for problem in report.problems}))
    for (_, split, shard), group in groupby(sorted(report.problems, key=_place), key=_place):
        names = [file.relative_to(root) for file in _leaving(root, list(group))]
        if shard < 0:
            done.moved += [str(name) for name in names if move_durably(root / name, target / name)]
            continue
        with try_lock(shard_lock(root, split, shard)) as held:
            if held:
                done.moved += [str(name) for name in names if move_durably(root / name, target / name)]
            else:
                done.held.append(f"{split} shard {shard}")
    return done


def _place(problem: Problem) -> tuple[str, str, int]:
    return problem.unit or "", problem.split or "", -1 if problem.shard is None else problem.shard


def _leaving(root: Path, problems: list[Problem]) -> list[Path]:
    """Files to move for the problems of one shard or one unit, in order: commit, manifest, the damaged ones."""
    first, files = problems[0], [Path(problem.file) for problem in problems if problem.what != "dataset.json"]
    if first.unit is None:
        return [*files, root / "probe.json"] if any(problem.what == "probe" for problem in problems) else files
    vouching = [root / first.unit / "manifest.json"]
    if first.shard is not None:
        vouching.insert(0, root / first.unit / "commits" / f"{shard_name(first.shard)}.json")
    return list(dict.fromkeys([*vouching, *files]))


def _what_next(root: Path, kinds: set[str]) -> str:
    """What makes the moved files again."""
    if "dataset.json" in kinds:
        return "dataset.json cannot be moved: run `mcm-cache shard` on the original pictures into a new folder"
    if (root / "dataset.json").exists():
        return f"run the same `mcm-cache shard SOURCE {root}` again: it needs the original pictures"
    then = ", then `mcm-cache verify --repair` again" if "cache.json" in kinds else ""
    return f"run the same `mcm-cache extract` again{then}: damaged shards need the DATASET and the teacher"
