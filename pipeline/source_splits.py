"""Find the splits of a SOURCE: read split names, scan folders, and locate folders and tars.

The name of a folder, tar or parquet file determines its split: `split_name` reads a whole folder
name, and `_tars_by_split` looks for one word in the name of a tar or parquet file. Both use the
table `_SPLIT_OF_WORD`.
A source with unclear splits is an error.
"""

import glob
import json
import os
import re
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

from cache_tools.errors import UsageError, found_at
from cache_tools.images import PICTURES
from cache_tools.records import printable, read_capped

MAX_LISTING_BYTES = 64 << 20  # of classes.txt and of timm's _info.json (20 bytes per tar)
LAYOUTS = "an ImageFolder (train/<class>/*, val/<class>/*, or <class>/*), tars, parquet files"
UNLABELED = "pretraining needs no labels; probes and fine-tuning do"
_PER_SPLIT = "`mcm-cache shard DATASET --train SOURCE --val SOURCE`"
NAME_SPLITS = f"name the splits: {_PER_SPLIT}"
ARCHIVES = {"7z", "arrow", "bz2", "gz", "h5", "hdf5", "lmdb", "mdb", "parquet", "rar", "rec"}
ARCHIVES |= {"tar", "tfrecord", "tgz", "xz", "zip", "zst"}
OTHERS = {"cfg", "cls", "csv", "db", "htm", "html", "ini", "json", "jsonl", "log", "lst", "mat"}
OTHERS |= {"md", "npy", "npz", "pdf", "pkl", "pt", "pth", "py", "rst", "sh", "toml", "tsv", "txt"}
OTHERS |= {"url", "xml", "yaml", "yml"}
_LINKED = {"tar", "parquet"}
_HIDDEN = {"__MACOSX", "@eaDir"}  # folders that macOS and Synology add; none holds user pictures
_SPLIT_OF_WORD = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# Capitals before the word of a split: "MSCOCO" in "MSCOCOval".
_PREFIX = f"[A-Z]{{2,}}(?=(?:{'|'.join(_SPLIT_OF_WORD)})(?:set)?(?![a-z]))"
_FILLER_WORDS = {"data", "image", "images", "img", "imgs", "set", "split"}  # as in "train_images"
_SPLITS = ("train", "val", "test")
Source = str | Path | Mapping[str, str | Path]  # one source, or one per split
Location = tuple[Path, str] | list[Path]  # a root and a folder below it ("" or "name/"), or files


def source_name(source: Source) -> str:
    """Return a source, or every source with its split, for an error message."""
    if isinstance(source, Mapping):
        return ", ".join(f"--{split} {part}" for split, part in source.items())
    return str(source)


def _name_words(name: str) -> list[str]:
    """Return the words of a name in lower case, each without a final "set".

    A word is a run of letters. A capital letter begins a new word after a small letter, and before
    one: "COCOValSet01" gives ["coco", "val", "set"], and "trainset" gives ["train"].
    """
    words = re.findall(f"{_PREFIX}|[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return [word.lower().removesuffix("set") or "set" for word in words]


def split_name(name: str) -> str | None:
    """Return the split that a folder is named after, or None.

    The first word must name a split and every other word must be a filler: "Train", "val2017",
    "test_images".
    """
    first, *rest = _name_words(name) or [""]
    return None if set(rest) - _FILLER_WORDS else _SPLIT_OF_WORD.get(first)


def locate_splits(source: Source, notes: list[str]) -> dict[str, Location]:
    """Return where each split of `source` lies, in the order of `_SPLITS`."""
    found: dict[str, Location] = {}
    if isinstance(source, Mapping):
        for split, part in source.items():
            parts = _find(str(part), notes, named=True)
            if len(parts) > 1:
                found_names = ", ".join(parts)
                raise UsageError(f"--{split} {part}: expected one split; found {found_names}")
            found[split] = next(iter(parts.values()))
        _check_apart(found)
    else:
        found = _find(str(source), notes)
    return {split: found[split] for split in _SPLITS if split in found}


def _check_apart(locations: Mapping[str, Location]) -> None:
    """Raise UsageError when two splits share or nest a folder or tar."""
    roots = {
        split: {Path(p).resolve() for p in (at if isinstance(at, list) else [at[0] / at[1]])}
        for split, at in locations.items()
    }
    for split, other in permutations(roots, 2):
        if shared := [p for p in roots[split] if not roots[other].isdisjoint((p, *p.parents))]:
            first = f"--{split} {shared[0]}"
            raise UsageError(f"{first}: expected pictures of its own; it is also in --{other}")


def _find(source: str, notes: list[str], named: bool = False) -> dict[str, Location]:
    """Return the splits of one source.

    With `named`, the user states the split of the source, and its folders are classes.
    """
    root = Path(source)
    if (there := found_at(root)) in ("a DATASET", "a CACHE", "a RUN"):
        raise UsageError(f"{root}: expected pictures to shard; found {there}; give its pictures")
    if (root / "_info.json").is_file():
        return _info_tars(root / "_info.json")
    if root.is_dir():
        return _find_in_folder(root, notes, named)
    if root.is_file():
        if root.suffix.lower() not in (".tar", ".parquet"):
            raise UsageError(f"{root}: expected {LAYOUTS}; found another file; unpack an archive")
        return _tars_by_split([root])
    if not (glob.has_magic(source) or "{" in source):
        raise UsageError(f"{root}: expected {LAYOUTS}; found nothing there")
    return _tars_by_split(_expand(source))


def _expand(pattern: str) -> list[Path]:
    """Return the tars or parquet files that a glob or brace pattern names.

    A part that exists as a file is that file, because a folder may be called "old [1]".
    """
    from webdataset.shardlists import expand_urls

    try:
        parts = {
            part: [part] if os.path.exists(part) else sorted(glob.glob(part))
            for part in expand_urls(pattern)
        }
    except Exception as error:
        expected = "expected a pattern of files such as {0000..0031}.tar"
        raise UsageError(f"{pattern}: {expected}; {error}") from error
    if missing := [part for part, found in parts.items() if not found]:
        raise UsageError(f"{pattern}: expected tars or parquet files; found no {missing[0]}")
    return [Path(path) for found in parts.values() for path in found]


def _tars_by_split(tars: list[Path]) -> dict[str, Location]:
    """Return the tars of each split.

    A word in the name of a tar gives its split; without one, the name of its folder does. When no
    tar names a split, all tars are split train.
    """
    splits: dict[str, list[Path]] = {}
    for tar in tars:
        named = {_SPLIT_OF_WORD[word] for word in _name_words(tar.stem) if word in _SPLIT_OF_WORD}
        if len(named) > 1:
            found = " and ".join(sorted(named))
            raise UsageError(f"{tar}: expected the name of one split; found {found}; rename it")
        split = named.pop() if named else split_name(tar.absolute().parent.name) or ""
        splits.setdefault(split, []).append(tar)
    if "" in splits and len(splits) > 1:
        others = ", ".join(split for split in splits if split)
        first = f"{splits[''][0]}: expected a split in its name, like the files of {others}"
        raise UsageError(f"{first}; {NAME_SPLITS}")
    if "" in splits:
        _check_word_ends(tars)
    return {split or "train": tars for split, tars in splits.items()}


def _check_word_ends(tars: list[Path]) -> None:
    """Raise UsageError when words end like two splits: "cocotrain" beside "cocoval"."""
    ends: dict[str, Path] = {}
    for tar in tars:
        for word in _name_words(tar.stem):
            ends |= {name: tar for end, name in _SPLIT_OF_WORD.items() if word.endswith(end)}
    if len(ends) > 1:
        found = ", ".join(sorted(tar.name for tar in ends.values()))
        wanted = "expected the split as a word of its own, such as coco-train.tar"
        raise UsageError(f"{tars[0].parent}: {wanted}; found {found}; {NAME_SPLITS}")


def _find_in_folder(root: Path, notes: list[str], named: bool) -> dict[str, Location]:
    """Return the splits of a folder: its tars or parquet files, its split folders, or itself."""
    if tars := _tars_in(root) or _tars_in(root := _in_snapshot(root)):
        return _tars_by_split(tars)
    here = scan_folder(root, no_links=True)
    splits = {} if named else {name: s for name in here.folders if (s := split_name(name))}
    found: dict[str, Location] = {}
    for name, split in splits.items():
        if split in found:
            first = next(other for other in splits if splits[other] == split)
            both = f"expected one folder of split {split}; found {first}/ and {name}/"
            raise UsageError(f"{root}: {both}; {NAME_SPLITS}")
        found[split] = _tars_in(root / name) or (root, f"{name}/")
    others = [f"{name}/" for name in here.folders if name not in splits]
    if splits and others and not ("train" in found and len(found) > 1):
        both = f"found {', '.join(splits)} beside {printable(others[0])}"
        raise UsageError(f"{root}: expected folders of splits or classes; {both}; {NAME_SPLITS}")
    if splits and (beside := others + here.files + here.links + here.hidden):
        names = ", ".join(map(printable, beside[:5]))
        notes.append(f"left out beside the splits: {names} ({len(beside)} in all)")
    words = [] if named else [word for name in others for word in _name_words(name)]
    if not splits and len({_SPLIT_OF_WORD[word] for word in words if word in _SPLIT_OF_WORD}) > 1:
        names = ", ".join(map(printable, others[:4]))
        raise UsageError(f"{root}: expected train/, val/ or classes; found {names}; {NAME_SPLITS}")
    return found or {split_name(os.path.basename(os.path.abspath(root))) or "train": (root, "")}


def _in_snapshot(root: Path) -> Path:
    """Return `root`, or its only folder if that one has parquet files, as data/ on a hub has."""
    inner = [root / name for name in scan_folder(root).folders]
    if len(inner) == 1:
        splits = [inner[0] / name for name in scan_folder(inner[0]).folders if split_name(name)]
        files = (name for folder in (*inner, *splits) for name in scan_folder(folder).files)
        if any(file_extension(name) == "parquet" for name in files):
            return inner[0]
    return root


def _tars_in(folder: Path) -> list[Path]:
    """Return the tars directly in a folder, or else its parquet files.

    Raises: UsageError when the folder also holds other folders, pictures or archives.
    """
    here = scan_folder(folder)
    tars = [name for name in here.files if file_extension(name) == "tar"]
    # img2dataset writes tables beside the tars.
    tars = tars or [name for name in here.files if file_extension(name) == "parquet"]
    kinds = PICTURES | ARCHIVES - {"tar", "parquet"}
    others = [f"{name}/" for name in here.folders]
    others += [name for name in here.files if file_extension(name) in kinds]
    if tars and others:
        raise UsageError(
            f"{folder}: expected files of one kind; found both, {printable(tars[0])} and "
            f"{printable(others[0])}; give one kind, as '{folder}/*.tar' or {_PER_SPLIT}"
        )
    return [folder / name for name in tars]


def _info_tars(info: Path) -> dict[str, Location]:
    """Return the tars of each split that timm's _info.json lists (timm's reader_wds.py)."""
    found: dict[str, Location] = {}
    try:
        splits = json.loads(read_capped(info, MAX_LISTING_BYTES, UsageError))["splits"]
        listed = {key: [info.parent / tar for tar in splits[key]["filenames"]] for key in splits}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{info}: expected timm's splits.<name>.filenames; {error!r}") from error
    for name, tars in listed.items():
        shown = printable(name)
        if (split := split_name(name)) is None:
            raise UsageError(f"{info}: expected the splits train, val or test; found {shown!r}")
        if split in found:
            expected = f"expected one entry of split {split}"
            raise UsageError(f"{info}: {expected}; found a second one, {shown!r}")
        below = info.parent
        if outside := [tar for tar in tars if ".." in tar.parts or not tar.is_relative_to(below)]:
            shown = printable(str(outside[0]))
            raise UsageError(f"{info}: expected tars in its folder or below; found {shown}")
        if missing := [tar for tar in tars if not tar.is_file()]:
            raise UsageError(f"{info}: expected the tars that it names; {missing[0]} is not there")
        found[split] = tars
    return found


class FolderNames(NamedTuple):
    """The sorted names in a folder; `links` also holds FIFOs, devices and sockets."""

    folders: list[str]
    files: list[str]
    links: list[str]
    hidden: list[str]


def file_extension(name: str) -> str:
    """Return the part behind the last dot in lower case, or "" without a dot."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def is_hidden(path: str) -> bool:
    """Return whether the last part of a path is hidden, or is a folder that no user made."""
    name = path.rpartition("/")[2]
    return name.startswith(".") or name in _HIDDEN


def scan_folder(path: Path, no_links: bool = False) -> FolderNames:
    """Return the names in a folder.

    Links to pictures and folders are not followed. A link to a tar or parquet file counts as a
    file, as in a Hugging Face Hub snapshot. With `no_links`, a link to a folder raises UsageError.
    """
    here = FolderNames([], [], [], [])
    with os.scandir(path) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                here.hidden.append(entry.name)
            elif entry.is_dir(follow_symlinks=False):
                here.folders.append(entry.name)
            elif entry.is_file(follow_symlinks=False) or file_extension(entry.name) in _LINKED:
                here.files.append(entry.name)
            elif no_links and entry.is_dir():
                raise UsageError(
                    f"{path / entry.name}: expected a folder; found a link to one; links are never "
                    f"followed; copy it with `cp -rL`, or {NAME_SPLITS}"
                )
            else:
                here.links.append(entry.name)
    for names in here:
        names.sort()
    return here


def refuse_splits(folder: Path, names: list[str]) -> None:
    """Raise UsageError when the subfolders of a split or class are named like splits.

    One class may have the name of a split, such as "train".
    """
    splits = {name: split for name in names if (split := split_name(name))}
    if splits and (len(splits) == len(names) or len({*splits.values()}) > 1):
        found = ", ".join(f"{name}/" for name in splits)
        found += f"; give this folder as SOURCE, or {NAME_SPLITS}"
        raise UsageError(f"{folder}: expected classes or pictures; found {found}")
