"""List the candidate pictures of a SOURCE, with their labels: an ImageFolder or WebDataset tars.

An ImageFolder has one folder per split with class folders inside, class folders alone, or pictures
alone (label -1). Tars are one file, a glob, a quoted brace pattern, or a folder of tars, with or
without timm's _info.json. They are scanned once and never extracted.

The name of a folder or tar determines its split: `split_name` reads a whole folder name, and
`_tars_by_split` looks for one word in the name of a tar. Both use the table `_SPLIT_OF_WORD`.
A source with unclear splits or classes is an error. Hidden files, files of known other kinds, and
links to pictures or folders are left out and counted; a tar may be a link.
"""

import glob
import io
import json
import os
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

from cache_tools.errors import UsageError, found_at
from cache_tools.records import printable, read_capped, sha256_hex

from .candidates import Candidates, Sources

MAX_LABEL = 1_000_000
MAX_LABEL_BYTES = 1 << 20  # of a .cls or .json member
MAX_LISTING_BYTES = 64 << 20  # of classes.txt and of timm's _info.json (20 bytes per tar)
MAX_HEADER_BYTES = 64 << 10  # of a long name or extended header in a tar
_LAYOUTS = "an ImageFolder (train/<class>/*, val/<class>/*, or <class>/*) or WebDataset tars"
_UNLABELLED = "pretraining needs no labels; probes and fine-tuning do"
_PER_SPLIT = "`mcm-cache shard DATASET --train SOURCE --val SOURCE`"
_NAME_SPLITS = f"name the splits: {_PER_SPLIT}"
# gif, bmp and tiff files are listed so that each one is refused by name instead of left out.
_PICTURES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}
_ARCHIVES = {"7z", "arrow", "bz2", "gz", "h5", "hdf5", "lmdb", "mdb", "parquet", "rar", "rec"}
_ARCHIVES |= {"tar", "tfrecord", "tgz", "xz", "zip", "zst"}
_OTHERS = {"cfg", "cls", "csv", "db", "htm", "html", "ini", "json", "jsonl", "log", "lst", "mat"}
_OTHERS |= {"md", "npy", "npz", "pdf", "pkl", "pt", "pth", "py", "rst", "sh", "toml", "tsv", "txt"}
_OTHERS |= {"url", "xml", "yaml", "yml"}
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
_Location = tuple[Path, str] | list[Path]  # a root and a folder below it ("" or "name/"), or tars


def list_sources(source: Source, val: float = 0.0, max_refused: float = 0.01) -> Sources:
    """Return every candidate picture of `source`, or of one source per split.

    `val` is the share of split train that becomes split val. `max_refused` is the largest share of
    links, which are left out.

    Raises: UsageError when the source is empty, ambiguous or of another kind, or when its labels
    contradict each other.
    """
    sources = Sources()
    locations = _locations(source, sources.notes)
    tars = {split: place for split, place in locations.items() if isinstance(place, list)}
    folders = {split: place for split, place in locations.items() if not isinstance(place, list)}
    if tars and folders:
        found = f"tars ({', '.join(tars)}) and folders of pictures ({', '.join(folders)})"
        where = source_name(source)
        raise UsageError(f"{where}: expected one kind of source; found {found}; use one kind")
    if tars:
        root = next(iter(source.values())) if isinstance(source, Mapping) else source
        _add_tars(Path(root), tars, sources)
    else:
        _add_folders(folders, sources, max_refused)
    if val:
        _hold_out(sources, val)
    for split, candidates in sources.splits.items():
        if not len(candidates):
            where, found = source_name(source), f"found no picture in split {split!r}"
            raise UsageError("; ".join([f"{where}: expected {_LAYOUTS}", found, *sources.notes]))
    return sources


def source_name(source: Source) -> str:
    """Return a source, or every source with its split, for an error message."""
    if isinstance(source, Mapping):
        return ", ".join(f"--{split} {part}" for split, part in source.items())
    return str(source)


def _hold_out(sources: Sources, share: float) -> None:
    """Split train into train and val by a hash of each name.

    Adding or deleting other pictures never moves a picture to the other split.
    """
    if sources.splits.keys() != {"train"}:
        found = ", ".join(sources.splits)
        raise UsageError(f"--val {share}: expected a source of split train alone; found {found}")
    train = sources.splits["train"]
    hashes = (sha256_hex(os.fsencode(train[i].name))[:8] for i in range(len(train)))
    held_out = [int(digits, 16) < share * (1 << 32) for digits in hashes]
    rest = train.part([not held for held in held_out])
    sources.splits = {"train": rest, "val": train.part(held_out)}


# Which splits a source holds


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


def _split_of_folder(folder: Path) -> str | None:
    return split_name(os.path.basename(os.path.abspath(folder)))


def _locations(source: Source, notes: list[str]) -> dict[str, _Location]:
    """Return where each split of `source` lies, in the order of `_SPLITS`."""
    found: dict[str, _Location] = {}
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


def _check_apart(locations: Mapping[str, _Location]) -> None:
    """Raise UsageError when two splits share or nest a folder or tar."""
    roots = {
        split: {Path(p).resolve() for p in (at if isinstance(at, list) else [at[0] / at[1]])}
        for split, at in locations.items()
    }
    for split, other in permutations(roots, 2):
        if shared := [p for p in roots[split] if not roots[other].isdisjoint((p, *p.parents))]:
            first = f"--{split} {shared[0]}"
            raise UsageError(f"{first}: expected pictures of its own; it is also in --{other}")


def _find(source: str, notes: list[str], named: bool = False) -> dict[str, _Location]:
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
        if root.suffix.lower() != ".tar":
            raise UsageError(f"{root}: expected {_LAYOUTS}; found another file; unpack an archive")
        return _tars_by_split([root])
    if not (glob.has_magic(source) or "{" in source):
        raise UsageError(f"{root}: expected {_LAYOUTS}; found nothing there")
    return _tars_by_split(_expand(source))


def _expand(pattern: str) -> list[Path]:
    """Return the tars that a glob or brace pattern names.

    A part that exists as a file is that file, because a folder may be called "old [1]".
    """
    from webdataset.shardlists import expand_urls

    try:
        parts = {
            part: [part] if os.path.exists(part) else sorted(glob.glob(part))
            for part in expand_urls(pattern)
        }
    except Exception as error:
        expected = "expected a pattern of tars such as {0000..0031}.tar"
        raise UsageError(f"{pattern}: {expected}; {error}") from error
    if missing := [part for part, found in parts.items() if not found]:
        raise UsageError(f"{pattern}: expected tars; found no file {missing[0]}")
    return [Path(path) for found in parts.values() for path in found]


def _tars_by_split(tars: list[Path]) -> dict[str, _Location]:
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
        first = f"{splits[''][0]}: expected a split in its name, like the tars of {others}"
        raise UsageError(f"{first}; {_NAME_SPLITS}")
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
        raise UsageError(f"{tars[0].parent}: {wanted}; found {found}; {_NAME_SPLITS}")


def _find_in_folder(root: Path, notes: list[str], named: bool) -> dict[str, _Location]:
    """Return the splits of a folder: its tars, its split folders, or the folder itself."""
    if tars := _tars_in(root):
        return _tars_by_split(tars)
    here = _scan(root, no_links=True)
    splits = {} if named else {name: s for name in here.folders if (s := split_name(name))}
    found: dict[str, _Location] = {}
    for name, split in splits.items():
        if split in found:
            first = next(other for other in splits if splits[other] == split)
            both = f"expected one folder of split {split}; found {first}/ and {name}/"
            raise UsageError(f"{root}: {both}; {_NAME_SPLITS}")
        found[split] = _tars_in(root / name) or (root, f"{name}/")
    others = [f"{name}/" for name in here.folders if name not in splits]
    if splits and others and not ("train" in found and len(found) > 1):
        both = f"found {', '.join(splits)} beside {printable(others[0])}"
        raise UsageError(f"{root}: expected folders of splits or classes; {both}; {_NAME_SPLITS}")
    if splits and (beside := others + here.files + here.links + here.hidden):
        names = ", ".join(map(printable, beside[:5]))
        notes.append(f"left out beside the splits: {names} ({len(beside)} in all)")
    words = [] if named else [word for name in others for word in _name_words(name)]
    if not splits and len({_SPLIT_OF_WORD[word] for word in words if word in _SPLIT_OF_WORD}) > 1:
        names = ", ".join(map(printable, others[:4]))
        raise UsageError(f"{root}: expected train/, val/ or classes; found {names}; {_NAME_SPLITS}")
    return found or {_split_of_folder(root) or "train": (root, "")}


def _tars_in(folder: Path) -> list[Path]:
    """Return the tars directly in a folder.

    Raises: UsageError when the folder also holds other folders, pictures or archives.
    """
    here = _scan(folder)
    tars = [name for name in here.files if _extension(name) == "tar"]
    kinds = _PICTURES | _ARCHIVES - {"tar", "parquet"}  # img2dataset writes tables beside the tars
    others = [f"{name}/" for name in here.folders]
    others += [name for name in here.files if _extension(name) in kinds]
    if tars and others:
        raise UsageError(
            f"{folder}: expected tars or pictures; found both, {printable(tars[0])} and "
            f"{printable(others[0])}; give one kind: '{folder}/*.tar', or {_PER_SPLIT}"
        )
    return [folder / name for name in tars]


def _info_tars(info: Path) -> dict[str, _Location]:
    """Return the tars of each split that timm's _info.json lists (timm's reader_wds.py)."""
    found: dict[str, _Location] = {}
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


# Folders


class _Folder(NamedTuple):
    """The sorted names in a folder; `links` also holds FIFOs, devices and sockets."""

    folders: list[str]
    files: list[str]
    links: list[str]
    hidden: list[str]


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else ""


def _is_hidden(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name.startswith(".") or name in _HIDDEN


def _scan(path: Path, no_links: bool = False) -> _Folder:
    """Return the names in a folder.

    Links to pictures and folders are not followed. A link to a tar counts as a file, as in a
    Hugging Face Hub snapshot. With `no_links`, a link to a folder raises UsageError.
    """
    here = _Folder([], [], [], [])
    with os.scandir(path) as entries:
        for entry in entries:
            if _is_hidden(entry.name):
                here.hidden.append(entry.name)
            elif entry.is_dir(follow_symlinks=False):
                here.folders.append(entry.name)
            elif entry.is_file(follow_symlinks=False) or _extension(entry.name) == "tar":
                here.files.append(entry.name)
            elif no_links and entry.is_dir():
                raise UsageError(
                    f"{path / entry.name}: expected a folder; found a link to one; links are never "
                    f"followed; copy it with `cp -rL`, or {_NAME_SPLITS}"
                )
            else:
                here.links.append(entry.name)
    for names in here:
        names.sort()
    return here


def _add_folders(
    locations: Mapping[str, tuple[Path, str]], sources: Sources, max_refused: float
) -> None:
    """Add the pictures of folders. A label is a position in the sorted classes of all splits."""
    parts = {split: _classes(root / below) for split, (root, below) in locations.items()}
    _drop_unsorted(locations, parts, sources.notes)
    classes = sorted({name for part in parts.values() for name in part})
    left = Counter[str]()
    for split, names in parts.items():
        root, below = locations[split]
        missing = [name for name in classes if name not in names]
        if missing and (split == "train" or not names):
            shown = printable(missing[0])
            raise UsageError(f"{root / below}: expected every class; found no class {shown!r}")
        own = Counter[str]()
        candidates = sources.splits[split] = _folder_candidates(root, below, names, classes, own)
        if own["links"] > max_refused * (own["links"] + len(candidates)):
            raise UsageError(
                f"{root / below}: expected files; found {len(candidates)} files and {own['links']} "
                "links, FIFOs or devices; links are never followed; copy the pictures with `cp -rL`"
            )
        if own["beside"]:
            sources.notes.append(f"{own['beside']} files beside the classes of {split} left out")
        left += own
    said = {"hidden": "hidden files", "other": "files of other kinds (such as .txt, .xml or .db)"}
    said["links"] = "links, FIFOs or devices (links are never followed)"
    sources.notes += [f"{left[kind]} {text} left out" for kind, text in said.items() if left[kind]]
    sources.classes = tuple(map(printable, classes))
    if len(classes) == 1:
        shown = printable(classes[0])
        sources.notes.append(f"one class alone, {shown}: give that folder if it holds the classes")
    if not classes:
        sources.notes.append(f"no labels: the pictures are in no class folders; {_UNLABELLED}")


def _drop_unsorted(
    locations: Mapping[str, tuple[Path, str]], parts: dict[str, dict[str, str]], notes: list[str]
) -> None:
    """Delete split test from `parts` when it has no class of train.

    Raises: UsageError when split val has no class of train.
    """
    train = parts.get("train", {})
    for split in [split for split in parts if train and not train.keys() & parts[split].keys()]:
        if split == "val":
            root, below = locations[split]
            found = ", ".join(map(printable, [*parts[split]][:3])) or "no folder"
            raise UsageError(
                f"{root / below}: expected the class folders of train; found {found}: this split "
                "is not sorted into classes; sort it, or shard train alone with --val 0.1"
            )
        notes.append("test left out: it has no class folder of train")
        del parts[split]


def _classes(folder: Path) -> dict[str, str]:
    """Return {class: name of its folder}, with each class in Unicode normal form C.

    Raises: UsageError when two folders of one class differ only in their normal form.
    """
    names = _scan(folder, no_links=True).folders
    _refuse_splits(folder, names)
    classes = {unicodedata.normalize("NFC", name): name for name in names}
    if len(classes) < len(names):
        raise UsageError(
            f"{folder}: expected one folder per class; found two of one class; join them"
        )
    return classes


def _refuse_splits(folder: Path, names: list[str]) -> None:
    """Raise UsageError when the subfolders of a split or class are named like splits.

    One class may have the name of a split, such as "train".
    """
    splits = {name: split for name in names if (split := split_name(name))}
    if splits and (len(splits) == len(names) or len({*splits.values()}) > 1):
        found = ", ".join(f"{name}/" for name in splits)
        found += f"; give this folder as SOURCE, or {_NAME_SPLITS}"
        raise UsageError(f"{folder}: expected classes or pictures; found {found}")


def _folder_candidates(
    root: Path, below: str, names: dict[str, str], classes: list[str], left: Counter[str]
) -> Candidates:
    """Return the pictures of one split; `left` counts what is left out, by kind."""
    candidates = Candidates()
    candidates.roots.append(root)
    if not classes:
        add_files(root, below, -1, candidates, left)
        return candidates
    here = _scan(root / below)
    left.update(beside=len(here.files), links=len(here.links), hidden=len(here.hidden))
    for label, name in enumerate(classes):
        before = len(candidates)
        if name in names:
            add_files(root, below + names[name], label, candidates, left)
            if len(candidates) == before:
                folder = root / below / names[name]
                raise UsageError(f"{folder}: expected pictures of a class; found none")
    return candidates


def add_files(
    root: Path, below: str, label: int, candidates: Candidates, left: Counter[str]
) -> None:
    """Add every file under root/below as a candidate: a folder's sorted files, then its folders.

    `left` counts what is left out: files with the extension of another kind, hidden files, links.

    Raises: UsageError when a file is an archive, or when subfolders are named like splits.
    """
    todo = [below]
    while todo:
        below = todo.pop()
        here = _scan(root / below)
        prefix = below if not below or below.endswith("/") else f"{below}/"
        _refuse_splits(root / below, here.folders)
        for name in here.files:
            if (extension := _extension(name)) in _ARCHIVES:
                raise UsageError(
                    f"{root / prefix / name}: expected a picture; found an archive (.{extension}); "
                    "unpack or move it; WebDataset tars belong in SOURCE, its train/ or its val/"
                )
            if extension in _OTHERS:
                left["other"] += 1
            else:
                candidates.add(prefix + name, label)
        todo += [prefix + name for name in reversed(here.folders)]
        left.update(links=len(here.links), hidden=len(here.hidden))


# Tars


def _add_tars(root: Path, tars_of: Mapping[str, list[Path]], sources: Sources) -> None:
    """Add the samples of tars, and the class names of classes.txt in `root` or beside a tar.

    Raises: UsageError when only some pictures have a label, when a label has no class name, or
    when two classes.txt differ.
    """
    left = Counter[str]()  # by extension; "" for hidden and irregular members, and without a key
    for split, tars in tars_of.items():
        candidates = sources.splits[split] = Candidates()
        for tar in tars:
            candidates.roots.append(tar)
            _scan_tar(tar, candidates, left)
    if skipped := left.pop("", 0):
        reason = "hidden, not regular files, or without an extension"
        sources.notes.append(f"{skipped} members of tars left out: {reason}")
    highest = max(max(part.labels, default=-1) for part in sources.splits.values())
    if highest < 0:
        others = ", ".join(f"{number} .{kind}" for kind, number in left.most_common(3)) or "none"
        sources.notes.append(
            f'no labels: found no .cls, no "label" in a .json, and {left.total()} members of '
            f"unknown kinds ({others}); names of tars are not labels; {_UNLABELLED}"
        )
    else:
        _refuse_unlabelled(sources)
    folders = dict.fromkeys([root, *(tar.parent for tars in tars_of.values() for tar in tars)])
    files = [file for folder in folders if (file := folder / "classes.txt").is_file()]
    names = [class_lines(file) for file in files]
    if unlike := [file for file, lines in zip(files, names, strict=True) if lines != names[0]]:
        raise UsageError(f"{files[0]}: expected one list of classes; {unlike[0]} differs")
    sources.classes = tuple(names[0] if names else map(str, range(highest + 1)))
    if len(sources.classes) <= highest:
        expected = f"at least {highest + 1} lines, one per class"
        raise UsageError(f"{files[0]}: expected {expected}; found {len(sources.classes)}")


def _refuse_unlabelled(sources: Sources) -> None:
    """Raise UsageError when a picture has no label; it names the first one and their number."""
    for split, candidates in sources.splits.items():
        if bare := [i for i, label in enumerate(candidates.labels) if label < 0]:
            first = candidates[bare[0]]
            raise UsageError(
                f"{first.path}: expected a label (.cls, or label in .json) for every picture or "
                f"for none; split {split} has {len(bare)} of {len(candidates)} pictures without "
                f"one, the first {printable(first.name)}; leave its tars out, or {_NAME_SPLITS}"
            )


def class_lines(path: Path) -> list[str]:
    """Return the lines of a file of class names.

    Raises: UsageError when the file is not UTF-8.
    """
    try:
        return read_capped(path, MAX_LISTING_BYTES, UsageError).decode().splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: expected one class name per line, in UTF-8; {error}") from error


class _CappedReads(io.FileIO):
    """A tar whose reads are at most MAX_HEADER_BYTES.

    tarfile reads a header of any size that the tar states.
    """

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            found = f"found a header of {size} bytes"
            raise tarfile.ReadError(f"expected at most {MAX_HEADER_BYTES} bytes; {found}")
        return super().read(size) or b""


def _scan_tar(path: Path, candidates: Candidates, left: Counter[str]) -> None:
    """Add the picture of every sample of a tar, and count the members left out.

    webdataset groups the members into samples. Its own iterator is not used: it reads every
    picture, gives no offset, and accepts a truncated tar.
    """
    from webdataset.tariterators import group_by_keys

    if not path.is_file():
        raise UsageError(f"{path}: expected a tar; found no regular file")
    keys = set[str]()
    try:
        with _CappedReads(path) as file:
            for sample in group_by_keys(_members(path, file, left)):
                key = printable(sample["__key__"])
                if sample["__key__"] in keys:
                    found = f"found {key!r} twice"
                    raise UsageError(f"{path}: expected the members of a key side by side; {found}")
                keys.add(sample["__key__"])
                _add_sample(f"{path}: {key}", file.fileno(), sample, candidates, left)
    except (UsageError, OSError):
        raise
    except Exception as error:  # tarfile and webdataset raise many kinds of errors on damaged tars
        said = f"cannot read: {error.args[0] if error.args else repr(error)}"
        raise UsageError(f"{path}: expected a whole, uncompressed tar; {said}") from error


def _members(path: Path, file: _CappedReads, left: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield the regular members that are not hidden and have a key, for `group_by_keys`.

    `data` holds the TarInfo, not the bytes.
    """
    from webdataset.tariterators import base_plus_ext

    end, size = 0, path.stat().st_size
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # drop the headers that tarfile keeps
            # tarfile seeks to any stated offset, also backwards.
            if not end < tar.offset <= size or member.size < 0:
                raise tarfile.ReadError(f"{printable(member.name)} does not end inside the file")
            end = tar.offset
            regular = member.isreg() and not member.issparse() and not _is_hidden(member.name)
            if regular and base_plus_ext(member.name)[0] is not None:
                yield {"fname": member.name, "data": member, "__url__": str(path)}
            elif not member.isdir():
                left[""] += 1
    if not (mark := os.pread(file.fileno(), 512, end)) or any(mark):
        raise UsageError(f"{path}: expected a whole tar; found no end mark; copy the tar again")


def _add_sample(
    where: str, descriptor: int, sample: dict[str, Any], candidates: Candidates, left: Counter[str]
) -> None:
    """Add the picture of a sample. The label of a .cls overrides that of a .json."""
    members = {name: sample[name] for name in sample if not name.startswith("__")}
    pictures = [members[name] for name in members if name.rpartition(".")[2] in _PICTURES]
    known = ("cls", "json")
    left.update(n for n in members if n not in known and members[n] not in pictures)
    if len(pictures) > 1:
        both = " and ".join(printable(member.name) for member in pictures[:2])
        raise UsageError(f"{where}: expected one picture per key; found {both}")
    label = -1
    for extension in ("json", "cls"):
        if member := sample.get(extension):
            data = os.pread(descriptor, min(member.size, MAX_LABEL_BYTES), member.offset_data)
            found = _label(f"{where}.{extension}", extension, data)
            label = label if found is None else found
    if pictures:
        candidates.add(pictures[0].name, label, (pictures[0].offset_data, pictures[0].size))
    elif label >= 0:
        raise UsageError(f"{where}: expected a picture for every label; found none")


def _label(where: str, extension: str, data: bytes) -> int | None:
    """Return the label in a .cls, or "label" of a .json (None where the .json has no such key)."""
    try:
        value: Any = int(data) if extension == "cls" else json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: expected a label; found {data[:40]!r}") from error
    if extension == "json" and not (isinstance(value, dict) and "label" in value):
        return None
    label = value["label"] if extension == "json" else value
    if type(label) is not int or not -1 <= label < MAX_LABEL:
        shown = str(label)[:40]
        raise UsageError(f"{where}: expected a label below {MAX_LABEL}; found {shown!r}")
    return label
