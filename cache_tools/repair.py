"""`verify --repair`: move damaged files to PATH/.run/quarantine.

The same `extract` or `shard` command then writes the files again. `extract` recomputes a shard
without a commit and finishes a unit without a manifest. It also writes a missing cache.json,
projection.npy, probe.npy or probe.json.

Commits are moved first: even if this process dies, no commit refers to a file that was moved.
"""

from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from .dataset import shard_name
from .storage import move_durably, try_lock, work_dir
from .verify import Problem, Report
from .writer import shard_lock


@dataclass
class Repair:
    """The result of a repair.

    `moved` lists paths relative to the CACHE or DATASET. `held` lists the shards that another
    process has locked. `next` is the command to run next.
    """

    quarantine: str
    moved: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    next: str = ""

    def lines(self) -> list[str]:
        """Return one line per moved file and per held shard, and the next command."""
        moved = [f"moved {name} to {self.quarantine}" for name in self.moved]
        held = [f"left {name} in place: a worker holds it" for name in self.held]
        return [*moved, *held, self.next]


def repair(report: Report) -> Repair:
    """Move the damaged files of `report` and their commits and manifests to the quarantine.

    A shard that a worker has locked is left in place.

    Raises: OSError if a file cannot be moved; the next repair continues from there.
    """
    root = Path(report.path)
    quarantine = work_dir(root) / "quarantine"
    target = quarantine / f"{len(list(quarantine.glob('*'))):06d}"
    kinds = {problem.what for problem in report.problems}
    result = Repair(str(target), next=_next_command(root, kinds))
    for (_, split, shard), group in groupby(sorted(report.problems, key=_place), key=_place):
        files = _files_to_move(root, list(group))
        if shard < 0:
            result.moved += _move(root, target, files)
            continue
        with try_lock(shard_lock(root, split, shard)) as locked:
            if locked:
                result.moved += _move(root, target, files)
            else:
                result.held.append(f"{split} shard {shard}")
    return result


def _place(problem: Problem) -> tuple[str, str, int]:
    return problem.unit or "", problem.split or "", -1 if problem.shard is None else problem.shard


def _move(root: Path, target: Path, files: list[Path]) -> list[str]:
    names = [file.relative_to(root) for file in files]
    return [str(name) for name in names if move_durably(root / name, target / name)]


def _files_to_move(root: Path, problems: list[Problem]) -> list[Path]:
    """Return the commit, the manifest and the damaged files of one shard or unit, in this order."""
    files = [Path(problem.file) for problem in problems if problem.what != "dataset.json"]
    unit, shard = problems[0].unit, problems[0].shard
    if unit is None:
        probe = any(problem.what == "probe" for problem in problems)
        return [*files, root / "probe.json"] if probe else files
    records = [root / unit / "manifest.json"]
    if shard is not None:
        records.insert(0, root / unit / "commits" / f"{shard_name(shard)}.json")
    return list(dict.fromkeys([*records, *files]))


def _next_command(root: Path, kinds: set[str]) -> str:
    """Return the command that writes the moved files again."""
    if "dataset.json" in kinds:
        return "dataset.json cannot be made again: shard the original pictures into a new folder"
    if (root / "dataset.json").exists():
        return f"run the same `mcm-cache shard SOURCE {root}` again; it needs the original pictures"
    return "run the same `mcm-cache extract` again, and then `mcm-cache verify --repair`"
