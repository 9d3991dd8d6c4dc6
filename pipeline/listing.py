"""What a SOURCE holds: every candidate picture of an ImageFolder or of WebDataset tars, with its label.

ImageFolder: a folder for each split with class folders inside, class folders alone, or pictures alone (label -1).
Tars: one file, a glob, a quoted brace pattern, or a folder of them, with or without timm's _info.json. They are scanned
once and never extracted. `_WORDS` names the splits of folders and tars alike. A source whose splits or classes cannot
be told is an error; hidden files, files of known other kinds, and links are left out and counted.
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
MAX_LABEL_BYTES = 1 << 20  # of a .cls or .json
MAX_LISTING_BYTES = 64 << 20  # of timm's _info.json (20 bytes per tar) and of classes.txt
MAX_HEADER_BYTES = 64 << 10  # of a long name or extended header in a tar: tarfile asks for as much as it is told to
_EXPECTED = "expected an ImageFolder (train/<class>/*, val/<class>/*, or <class>/*) or WebDataset tars"
_UNLABELLED = "pretraining needs none, probes and fine-tuning do"
_NAME_THEM = "name them: `mcm-cache shard DATASET --train SOURCE --val SOURCE`"
_PICTURES = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}  # the last four: refused by name, not unseen
_ARCHIVES = {"7z", "arrow", "bz2", "gz", "h5", "hdf5", "lmdb", "mdb", "parquet", "rar", "rec", "tar", "tfrecord"}
_ARCHIVES |= {"tgz", "xz", "zip", "zst"}
_OTHERS = {"cfg", "cls", "csv", "db", "htm", "html", "ini", "json", "jsonl", "log", "lst", "mat", "md", "npy", "npz"}
_OTHERS |= {"pdf", "pkl", "pt", "pth", "py", "rst", "sh", "toml", "tsv", "txt", "url", "xml", "yaml", "yml"}
_HIDDEN = {"__MACOSX", "@eaDir"}  # folders that macOS and Synology add; they hold no pictures of the user's
_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
_WORDS |= {"eval": "val", "evaluation": "val", "test": "test", "testing": "test"}
_FILLERS = {"data", "image", "images", "img", "imgs", "set", "split"}  # train_images, Training Set
_SPLITS = ("train", "val", "test")
Source = str | Path | Mapping[str, str | Path]  # one source, or one per split
_Place = tuple[Path, str] | list[Path]  # of a split: a root and the folder below it ("" or "name/"), or tars


def list_sources(source: Source, val: float = 0.0, max_refused: float = 0.01) -> Sources:
    """Every candidate picture of `source`, or of one source per split.

    `val` is the share of split train that becomes split val. `max_refused` is the share of links that is left out.

    Raises: UsageError when it is none of the kinds above, empty, ambiguous, or its labels contradict each other.
    """
    sources = Sources()
    places = _places(source, sources.notes)
    tars = {split: place for split, place in places.items() if isinstance(place, list)}
    folders = {split: place for split, place in places.items() if not isinstance(place, list)}
    if tars and folders:
        found = f"tars ({', '.join(tars)}) and folders of pictures ({', '.join(folders)})"
        raise UsageError(f"{source}: expected splits of one kind; found {found}; bring both into one form")
    if tars:
        root = next(iter(source.values())) if isinstance(source, Mapping) else source
        _add_tars(Path(root), tars, sources)
    else:
        _add_folders(folders, sources, max_refused)
    if val:
        _hold_out(sources, val)
    for split, candidates in sources.splits.items():
        if not len(candidates):
            raise UsageError("; ".join([f"{source}: {_EXPECTED}; found no picture in split {split!r}", *sources.notes]))
    return sources


def _hold_out(sources: Sources, share: float) -> None:
    """Split train into train and val by a hash of each name, so that a picture never changes sides."""
    if sources.splits.keys() != {"train"}:
        raise UsageError(f"--val {share}: expected a source of split train alone; found {', '.join(sources.splits)}")
    train = sources.splits["train"]
    chosen = [int(sha256_hex(os.fsencode(train[i].name))[:8], 16) < share * (1 << 32) for i in range(len(train))]
    sources.splits = {"train": train.part([not held for held in chosen]), "val": train.part(chosen)}


# Which splits a source holds


def _words(name: str) -> list[str]:
    """The words of a name in lower case, a "set" behind one removed: "ILSVRC_ValSet01" gives ilsvrc, val."""
    words = re.findall("[A-Z]?[a-z]+|[A-Z]+", name)
    return [word.lower().removesuffix("set") or "set" for word in words]


def split_name(name: str) -> str | None:
    """The split that a folder is named after, such as "Train", "val2017" or "test_images"; None for other names."""
    first, *rest = _words(name) or [""]
    return None if set(rest) - _FILLERS else _WORDS.get(first)


def _own_split(folder: Path) -> str | None:
    return split_name(os.path.basename(os.path.abspath(folder)))


def _places(source: Source, notes: list[str]) -> dict[str, _Place]:
    """Where each split of `source` lies, in the order of `_SPLITS`."""
    found: dict[str, _Place] = {}
    if isinstance(source, Mapping):
        for split, part in source.items():
            parts = _find(str(part), notes, named=True)
            if len(parts) > 1:
                raise UsageError(f"--{split} {part}: expected one split; found {', '.join(parts)}; name one of them")
            found[split] = next(iter(parts.values()))
        _check_apart(found)
    else:
        found = _find(str(source), notes)
    return {split: found[split] for split in _SPLITS if split in found}


def _check_apart(places: Mapping[str, _Place]) -> None:
    """Raises: UsageError when a folder or tar of one split is, or lies in, that of another."""
    roots = {
        split: {Path(path).resolve() for path in (place if isinstance(place, list) else [place[0] / place[1]])}
        for split, place in places.items()
    }
    for split, other in permutations(roots, 2):
        if shared := [path for path in roots[split] if not roots[other].isdisjoint((path, *path.parents))]:
            raise UsageError(f"--{split} {shared[0]}: expected pictures of its own; it is also in --{other}")


def _find(source: str, notes: list[str], named: bool = False) -> dict[str, _Place]:
    """The splits of one source; with `named`, the user says which split it is, and folders are its classes."""
    root = Path(source)
    if (there := found_at(root)) in ("a DATASET", "a CACHE", "a RUN"):
        raise UsageError(f"{root}: expected pictures to shard; found {there}; give the folder of its pictures")
    if (root / "_info.json").is_file():
        return _info_tars(root / "_info.json")
    if root.is_dir():
        return _find_in_folder(root, notes, named)
    if root.is_file():
        if root.suffix.lower() != ".tar":
            raise UsageError(f"{root}: {_EXPECTED}; found another file; unpack it if it is an archive")
        return _by_name([root])
    if not (glob.has_magic(source) or "{" in source):
        raise UsageError(f"{root}: {_EXPECTED}; found nothing there")
    return _by_name(_expand(source))


def _expand(pattern: str) -> list[Path]:
    from webdataset.shardlists import expand_urls

    try:  # a part that names a file means it: a folder may be called "old [1]"
        parts = {part: [part] if os.path.exists(part) else sorted(glob.glob(part)) for part in expand_urls(pattern)}
    except Exception as error:
        raise UsageError(f"{pattern}: expected tars by a pattern such as {{0000..0031}}.tar; {error}") from error
    if missing := [part for part, found in parts.items() if not found]:
        raise UsageError(f"{pattern}: expected tars; found no file {missing[0]}")
    return [Path(path) for found in parts.values() for path in found]


def _by_name(tars: list[Path]) -> dict[str, _Place]:
    """The tars of each split, by a word in their names, else by their folder's name; train where none says it."""
    splits: dict[str, list[Path]] = {}
    for tar in tars:
        names = {_WORDS[word] for word in _words(tar.stem) if word in _WORDS}
        if len(names) > 1:
            raise UsageError(f"{tar}: expected the name of one split; found {' and '.join(sorted(names))}; rename it")
        splits.setdefault(names.pop() if names else split_name(tar.absolute().parent.name) or "", []).append(tar)
    if "" in splits and len(splits) > 1:
        others = ", ".join(split for split in splits if split)
        raise UsageError(f"{splits[''][0]}: expected a split in its name, as {others} beside it; {_NAME_THEM}")
    return {split or "train": tars for split, tars in splits.items()}


def _find_in_folder(root: Path, notes: list[str], named: bool) -> dict[str, _Place]:
    """The splits below a folder: its tars, its split folders, or itself."""
    if tars := _tars_of(root):
        return _by_name(tars)
    here = _scan(root, no_links=True)
    splits = {} if named else {name: split for name in here.folders if (split := split_name(name))}
    found: dict[str, _Place] = {}
    for name, split in splits.items():
        if split in found:
            first = next(other for other in splits if splits[other] == split)
            raise UsageError(f"{root}: expected one folder of split {split}; found {first}/ and {name}/; {_NAME_THEM}")
        found[split] = _tars_of(root / name) or (root, f"{name}/")
    others = [f"{name}/" for name in here.folders if name not in splits]
    if splits and others and not ("train" in found and len(found) > 1):
        raise UsageError(
            f"{root}: expected folders of splits or of classes; found {', '.join(splits)} beside "
            f"{printable(others[0])}; {_NAME_THEM}"
        )
    if splits and (beside := others + here.files + here.links + here.hidden):
        notes.append(f"left out beside the splits: {', '.join(map(printable, beside[:5]))} ({len(beside)} in all)")
    alike = {_WORDS[word] for name in others for word in _words(name) if word in _WORDS} if not named else set()
    if not splits and len(alike) > 1:
        raise UsageError(
            f"{root}: expected train/ and val/, or classes; found {', '.join(map(printable, others[:4]))}; {_NAME_THEM}"
        )
    return found or {_own_split(root) or "train": (root, "")}


def _tars_of(folder: Path) -> list[Path]:
    """The tars directly in a folder, which then holds nothing else that a source could be."""
    here = _scan(folder)
    tars = [name for name in here.files if _ending(name) == "tar"]
    kinds = _PICTURES | _ARCHIVES - {"tar", "parquet"}  # img2dataset leaves its tables beside the tars
    others = [f"{name}/" for name in here.folders] + [name for name in here.files if _ending(name) in kinds]
    if tars and others:
        raise UsageError(
            f"{folder}: expected tars or pictures; found both, {printable(tars[0])} and {printable(others[0])}; give "
            f"one kind: '{folder}/*.tar', or {_NAME_THEM.removeprefix('name them: ')}"
        )
    return [folder / name for name in tars]


def _info_tars(info: Path) -> dict[str, _Place]:
    """The tars that timm's _info.json names (timm/data/readers/reader_wds.py), by its own splits."""
    found: dict[str, _Place] = {}
    try:
        splits = json.loads(read_capped(info, MAX_LISTING_BYTES, UsageError))["splits"]
        listed = {split: [info.parent / name for name in splits[split]["filenames"]] for split in splits}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{info}: expected timm's splits.<name>.filenames; found {error!r}") from error
    for name, tars in listed.items():
        if (split := split_name(name)) is None or split in found:
            raise UsageError(f"{info}: expected the splits train, val (validation) or test; found {printable(name)!r}")
        if outside := [tar for tar in tars if ".." in tar.parts or not tar.is_relative_to(info.parent)]:
            raise UsageError(f"{info}: expected tars beside it or below; found {printable(str(outside[0]))}")
        if missing := [tar for tar in tars if not tar.is_file()]:
            raise UsageError(f"{info}: expected the tars that it names; {missing[0]} is not there")
        found[split] = tars
    return found


# Folders


class _Folder(NamedTuple):
    """The names in a folder, sorted; `links` are FIFOs, devices and sockets too."""

    folders: list[str]
    files: list[str]
    links: list[str]
    hidden: list[str]


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else ""


def _is_hidden(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name.startswith(".") or name in _HIDDEN


def _scan(path: Path, no_links: bool = False) -> _Folder:
    """The names in a folder. A tar may be a link, as in a snapshot of a hub; with `no_links`, a folder may not."""
    here = _Folder([], [], [], [])
    with os.scandir(path) as entries:
        for entry in entries:
            if _is_hidden(entry.name):
                here.hidden.append(entry.name)
            elif entry.is_dir(follow_symlinks=False):
                here.folders.append(entry.name)
            elif entry.is_file(follow_symlinks=False) or _ending(entry.name) == "tar":
                here.files.append(entry.name)
            elif no_links and entry.is_dir():
                raise UsageError(
                    f"{path / entry.name}: expected a folder; found a link to one, which is not followed; copy it "
                    f"with `cp -rL`, or {_NAME_THEM}"
                )
            else:
                here.links.append(entry.name)
    for names in here:
        names.sort()
    return here


def _add_folders(places: Mapping[str, tuple[Path, str]], sources: Sources, max_refused: float) -> None:
    """Add the pictures of folders; a label is the position of a class among those of all splits."""
    parts = {split: _classes(root / below) for split, (root, below) in places.items()}
    _check_sorted(places, parts, sources.notes)
    classes = sorted({name for part in parts.values() for name in part})
    left: Counter[str] = Counter()
    for split, names in parts.items():
        root, below = places[split]
        if missing := [name for name in classes if name not in names and (split == "train" or not names)]:
            raise UsageError(f"{root / below}: expected every class of its sibling; found no {printable(missing[0])!r}")
        own: Counter[str] = Counter()
        candidates = sources.splits[split] = _folder_candidates(root, below, names, classes, own)
        if own["links"] > max_refused * (own["links"] + len(candidates)):
            raise UsageError(
                f"{root / below}: expected files; found {len(candidates)} and {own['links']} links, FIFOs or devices; "
                "links are not followed; copy the pictures with `cp -rL`"
            )
        if own["beside"]:
            sources.notes.append(f"{own['beside']} files beside the class folders of {split} left out")
        left += own
    said = {"hidden": "hidden files", "other": "files of other kinds by their names (such as .txt, .xml or .db)"}
    said["links"] = "links, FIFOs or devices: links are never followed"
    sources.notes += [f"{left[kind]} {text} left out" for kind, text in said.items() if left[kind]]
    sources.classes = tuple(map(printable, classes))
    if len(classes) == 1:
        sources.notes.append(f"one class alone, {printable(classes[0])}: give that folder if it holds the classes")
    if not classes:
        sources.notes.append(f"no labels: the pictures are in no class folders; {_UNLABELLED}")


def _check_sorted(places: Mapping[str, tuple[Path, str]], parts: dict[str, dict[str, str]], notes: list[str]) -> None:
    """Drop a split test without a class of train; UsageError for such a split val."""
    train = parts.get("train", {})
    for split in [split for split in parts if train and not train.keys() & parts[split].keys()]:
        if split == "val":
            root, below = places[split]
            found = ", ".join(map(printable, [*parts[split]][:3])) or "no folder"
            raise UsageError(
                f"{root / below}: expected the class folders of train; found {found}: this split is not sorted into "
                "classes; sort it, or shard train alone with --val 0.1"
            )
        notes.append("test left out: it has no class folder of train")
        del parts[split]


def _classes(folder: Path) -> dict[str, str]:
    """{class: the name of its folder}. Names that differ only in their Unicode normal form are one class."""
    names = _scan(folder, no_links=True).folders
    _refuse_splits(folder, names)
    classes = {unicodedata.normalize("NFC", name): name for name in names}
    if len(classes) < len(names):
        raise UsageError(f"{folder}: expected one folder per class; found two whose names look alike; join them")
    return classes


def _refuse_splits(folder: Path, names: list[str]) -> None:
    """Raises: UsageError when the folders in a split or class are splits; one class may be called "train"."""
    splits = {name: split for name in names if (split := split_name(name))}
    if splits and (len(splits) == len(names) or len({*splits.values()}) > 1):
        found = ", ".join(f"{name}/" for name in splits)
        raise UsageError(f"{folder}: expected classes or pictures; found {found}; give this folder, or {_NAME_THEM}")


def _folder_candidates(
    root: Path, below: str, names: dict[str, str], classes: list[str], left: Counter[str]
) -> Candidates:
    """The pictures of one split; what is left out is counted by its kind."""
    candidates = Candidates()
    candidates.roots.append(root)
    if not classes:
        walk(root, below, -1, candidates, left)
        return candidates
    here = _scan(root / below)
    left.update(beside=len(here.files), links=len(here.links), hidden=len(here.hidden))
    for label, name in enumerate(classes):
        before = len(candidates)
        if name in names:
            walk(root, below + names[name], label, candidates, left)
            if len(candidates) == before:
                raise UsageError(f"{root / below / names[name]}: expected pictures of a class; found none")
    return candidates


def walk(root: Path, below: str, label: int, candidates: Candidates, left: Counter[str]) -> None:
    """Add every file under root/below in sorted order; files of other kinds by their names are left out."""
    todo = [below]
    while todo:
        below = todo.pop()
        here, prefix = _scan(root / below), below if not below or below.endswith("/") else f"{below}/"
        _refuse_splits(root / below, here.folders)
        for name in here.files:
            if (ending := _ending(name)) in _ARCHIVES:
                raise UsageError(
                    f"{root / prefix / name}: expected a picture; found an archive (.{ending}); unpack it or move it "
                    "away; WebDataset tars are read from SOURCE itself or its train/ and val/"
                )
            if ending in _OTHERS:
                left["other"] += 1
            else:
                candidates.add(prefix + name, label)
        todo += [prefix + name for name in reversed(here.folders)]
        left.update(links=len(here.links), hidden=len(here.hidden))


# Tars


def _add_tars(root: Path, places: Mapping[str, list[Path]], sources: Sources) -> None:
    """Add the samples of tars; every picture has a label, or none has. `root` may hold classes.txt."""
    left: Counter[str] = Counter()  # members left out by extension, "" for those without a key
    for split, tars in places.items():
        candidates = sources.splits[split] = Candidates()
        for tar in tars:
            candidates.roots.append(tar)
            _scan_tar(tar, candidates, left)
    if skipped := left.pop("", 0):
        sources.notes.append(f"{skipped} members of tars left out: hidden, no regular files, or without an extension")
    highest = max(max(candidates.labels, default=-1) for candidates in sources.splits.values())
    if highest < 0:
        others = ", ".join(f"{number} .{kind}" for kind, number in left.most_common(3)) or "none"
        found = f"{left.total()} members of unknown kinds ({others}); names of tars are no labels"
        sources.notes.append(f'no labels: found no .cls, no "label" in a .json, and {found}; {_UNLABELLED}')
    else:
        _refuse_unlabelled(sources)
    names = root / "classes.txt"
    named = lines(names) if names.is_file() else None
    sources.classes = tuple(map(str, range(highest + 1)) if named is None else named)
    if len(sources.classes) <= highest:
        raise UsageError(f"{names}: expected one line per class; found {len(sources.classes)} and the label {highest}")


def _refuse_unlabelled(sources: Sources) -> None:
    """Raises: UsageError naming the first picture without a label and how many its split has."""
    for split, candidates in sources.splits.items():
        if bare := [i for i, label in enumerate(candidates.labels) if label < 0]:
            raise UsageError(
                f"{candidates[bare[0]].path}: expected a label (.cls or .json's label) for every picture or for none; "
                f"split {split} has {len(bare)} of {len(candidates)} pictures without one, the first "
                f"{printable(candidates[bare[0]].name)}; leave its tars out, or {_NAME_THEM}"
            )


def lines(path: Path) -> list[str]:
    """The class names of a file, one per line; UsageError where they are not UTF-8."""
    try:
        return read_capped(path, MAX_LISTING_BYTES, UsageError).decode().splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: expected a class name a line, in UTF-8; {error}") from error


class _Headers(io.FileIO):
    """A tar as tarfile may read it: in small pieces."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes; expected {MAX_HEADER_BYTES} at most")
        return super().read(size) or b""


def _scan_tar(path: Path, candidates: Candidates, left: Counter[str]) -> None:
    """Add the picture of every sample of a tar; count the members left out.

    webdataset groups the members into samples. Its own iterator is not used: it reads every picture, gives no offset,
    and lets a cut tar pass.
    """
    from webdataset.tariterators import group_by_keys

    if not path.is_file():
        raise UsageError(f"{path}: expected a tar; found no regular file")
    keys = set[str]()
    try:
        with _Headers(path) as file:
            for sample in group_by_keys(_members(path, file, left)):
                key = sample["__key__"]
                if key in keys:
                    raise UsageError(
                        f"{path}: expected the members of a key side by side; {printable(key)!r} comes twice"
                    )
                keys.add(key)
                _add_sample(f"{path}: {printable(key)}", file.fileno(), sample, candidates, left)
    except (UsageError, OSError):
        raise
    except Exception as error:  # tarfile and webdataset raise many kinds of errors on damaged tars
        said = error.args[0] if error.args else repr(error)
        raise UsageError(f"{path}: expected a whole, uncompressed tar; it does not read: {said}") from error


def _members(path: Path, file: _Headers, left: Counter[str]) -> Iterator[dict[str, Any]]:
    """The regular members with a key that are not hidden, as webdataset yields them, but with the header as data."""
    from webdataset.tariterators import base_plus_ext

    end, size = 0, path.stat().st_size
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # the library keeps every header otherwise
            if not end < tar.offset <= size or member.size < 0:  # tarfile would seek anywhere, backwards too
                raise tarfile.ReadError(f"{printable(member.name)} does not end inside the file")
            end = tar.offset
            regular = member.isreg() and not member.issparse() and not _is_hidden(member.name)
            if regular and base_plus_ext(member.name)[0] is not None:
                yield {"fname": member.name, "data": member, "__url__": str(path)}
            elif not member.isdir():
                left[""] += 1
    if not (mark := os.pread(file.fileno(), 512, end)) or any(mark):
        raise UsageError(f"{path}: expected a whole tar; it is cut short (no end mark): copy it again")


def _add_sample(
    where: str, descriptor: int, sample: dict[str, Any], candidates: Candidates, left: Counter[str]
) -> None:
    """Add the picture of a sample; a .cls goes before a .json."""
    members = {name: sample[name] for name in sample if not name.startswith("__")}
    pictures = [members[name] for name in members if name.rpartition(".")[2] in _PICTURES]
    left.update(name for name in members if name not in ("cls", "json") and members[name] not in pictures)
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
    """The label in a .cls, or under "label" in a .json (None where there is no such key)."""
    try:
        value: Any = int(data) if extension == "cls" else json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: expected a label; found {data[:40]!r}") from error
    if extension == "json" and not (isinstance(value, dict) and "label" in value):
        return None
    label = value["label"] if extension == "json" else value
    if type(label) is not int or not -1 <= label < MAX_LABEL:
        raise UsageError(f"{where}: expected a label below {MAX_LABEL}; found {str(label)[:40]!r}")
    return label
