"""List the pictures of a COCO source, and the KEY.json of each: its checked annotations.

The annotations of a split are annotations/instances_SPLIT.json or annotations/SPLIT.json, with the
pictures in SPLIT/, images/SPLIT/ or images/. In exports of Roboflow they are
SPLIT/_annotations.coco.json beside the pictures.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple, TypeVar

import pydantic

from cache_tools.dataset import CocoEntry
from cache_tools.errors import UsageError
from cache_tools.records import canonical_json, printable

from .candidates import Candidates, Sources
from .source_splits import split_name

_ROBOFLOW = "_annotations.coco.json"
_Pixels = Annotated[int, pydantic.Field(ge=1, le=1 << 16)]


class _Item(pydantic.BaseModel):
    """The keys of a COCO record that are checked; the record keeps its other keys."""

    model_config = pydantic.ConfigDict(strict=True)
    id: Annotated[int, pydantic.Field(ge=-(1 << 62), le=1 << 62)]


class _Category(_Item):
    name: str


class _Image(_Item):
    file_name: str
    width: _Pixels
    height: _Pixels


class _Rle(pydantic.BaseModel):
    size: tuple[int, int]
    counts: list[int] | str


class _Annotation(_Item):
    image_id: int
    category_id: int
    bbox: Annotated[list[float], pydantic.Field(min_length=4, max_length=4)]
    area: pydantic.FiniteFloat = 0.0
    iscrowd: Annotated[int, pydantic.Field(ge=0, le=1)] = 0
    segmentation: list[list[float]] | _Rle | None = None


Item = TypeVar("Item", bound=_Item)


class _File(NamedTuple):
    """The JSON of a split."""

    path: Path
    content: dict[str, Any]

    def items(self, key: str, model: type[Item]) -> Iterator[tuple[Item, dict[str, Any]]]:
        """Yield each record of a list, validated and as it is in the file.

        Raises: UsageError for a record with a wrong or missing key, or an id that occurs twice.
        """
        seen: set[int] = set()
        for number, record in enumerate(self.content[key]):
            try:
                item = model.model_validate(record)
            except pydantic.ValidationError as error:
                detail = error.errors()[0]
                where = f"{self.path}: {'.'.join(map(str, (key, number, *detail['loc'][:1])))}"
                found = f"{detail['input']!r:.80}"
                raise UsageError(f"{where}: {detail['msg']}; found {found}") from error
            self.check(item.id not in seen, f"unique ids in {key}", f"id {item.id} twice")
            seen.add(item.id)
            yield item, record

    def check(self, condition: bool, expected: str, found: object) -> None:
        """Raise UsageError unless `condition`."""
        if not condition:
            raise UsageError(f"{self.path}: expected {expected}; found {found}")


def list_coco(root: Path) -> Sources | None:
    """Return every picture of a COCO source, or None for another source.

    Raises: UsageError if a file is not in COCO's format, or if its records contradict each other or
    another file.
    """
    paths: dict[str, Path] = {}
    sources, changed = Sources(), Counter[str]()
    for path in [*sorted(root.glob("annotations/*.json")), *sorted(root.glob(f"*/{_ROBOFLOW}"))]:
        name = path.parent.name if path.name == _ROBOFLOW else path.stem.removeprefix("instances_")
        if (split := split_name(name)) is None:
            sources.notes.append(f"{path} left out: its name is not instances_SPLIT.json")
        elif split in paths:
            found = f"found {paths[split]} and {path}; move one away"
            raise UsageError(f"{root}: expected one JSON of split {split}; {found}")
        else:
            paths[split] = path
    if not paths and (unnamed := sorted(root.glob("annotations/instances_*.json"))):
        expected = "expected a split in its name, such as instances_train.json; rename it"
        raise UsageError(f"{unnamed[0]}: {expected}")
    categories: dict[int, str] = {}
    for split, path in paths.items():
        file = _load(path)
        items = sorted((item.id, item.name) for item, _ in file.items("categories", _Category))
        names, unique = dict(items), 0 < len({name for _, name in items}) == len(items)
        file.check(unique, "categories with unique names", f"{list(names.values())}"[:200])
        categories = categories or names
        file.check(names == categories, "the same categories in every split", "other categories")
        folder = path.parent if path.name == _ROBOFLOW else _folder(root, split)
        sources.splits[split] = _listed(file, root, folder, categories, changed, sources.notes)
    sources.classes = tuple(map(printable, categories.values()))
    sources.coco = CocoEntry(
        category_ids=tuple(categories),
        boxes_dropped=changed["dropped"],
        boxes_clipped=changed["clipped"],
        polygons_dropped=changed["polygons"],
    )
    return sources if paths else None


def _load(path: Path) -> _File:
    """Return the JSON of a split. The largest file of COCO, 448 MB, needs about 3 GB of memory."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: expected COCO's JSON; found {error}") from error
    keys = ("images", "annotations", "categories")
    lists = content if isinstance(content, dict) else {}
    if missing := [key for key in keys if not isinstance(lists.get(key), list)]:
        expected = f"expected the lists {', '.join(keys)}"
        raise UsageError(f"{path}: {expected}; found no {', '.join(missing)}")
    return _File(path, content)


def _folder(root: Path, split: str) -> Path:
    """Return the folder with the pictures of a split."""
    parents = [parent for parent in (root, root / "images") if parent.is_dir()]
    paths = [path for parent in parents for path in sorted(parent.iterdir()) if path.is_dir()]
    folders = [path for path in paths if split_name(path.name) == split]
    if not folders and (root / "images").is_dir():
        folders = [root / "images"]
    if len(folders) != 1:
        expected = f"expected one folder of pictures of split {split}, such as {split}2017"
        found = ", ".join(map(str, folders)) or "none"
        raise UsageError(f"{root}: {expected}; found {found}; move a JSON without pictures away")
    return folders[0]


def _listed(
    file: _File,
    root: Path,
    folder: Path,
    categories: dict[int, str],
    changed: Counter[str],
    notes: list[str],
) -> Candidates:
    """Return the pictures of a split, sorted by name; add what is left out to `notes`."""
    images = {item.id: item for item, _ in file.items("images", _Image)}
    objects: dict[int, list[dict[str, Any]]] = {number: [] for number in images}
    for item, record in file.items("annotations", _Annotation):
        image_id, category_id = item.image_id, item.category_id
        found = f"annotation {item.id} of image {image_id} and category {category_id}"
        file.check(image_id in images, "an image for each image_id", found)
        file.check(category_id in categories, "a category for each category_id", found)
        if clipped := _clipped(file, item, record, images[image_id], changed):
            objects[image_id].append(clipped)
    files = {path.relative_to(root).as_posix() for path in folder.rglob("*") if path.is_file()}
    by_name: dict[str, _Image] = {}  # relative to the root
    for image in images.values():
        path, shown = PurePosixPath(image.file_name), repr(image.file_name)
        outside = path.is_absolute() or ".." in path.parts or "\0" in image.file_name
        file.check(not outside, "names of pictures below its folder", shown)
        name = (folder.relative_to(root) / path).as_posix()
        name = str(path) if name not in files and str(path) in files else name
        file.check(name not in by_name, "one image per picture", f"{shown} twice")
        file.check(not (root / name).is_symlink(), "files (copy with `cp -rL`)", f"a link {shown}")
        by_name[name] = image
    file.check(bool(files & by_name.keys()), f"pictures in {folder}", f"none of its {len(by_name)}")
    if unnamed := len(files - by_name.keys() - {file.path.relative_to(root).as_posix()}):
        notes.append(f"{unnamed} files of {folder} left out: {file.path.name} does not name them")
    candidates = Candidates()
    candidates.roots = [root]
    for name, image in sorted(by_name.items()):
        candidates.add(name, -1)
        size = {"width": image.width, "height": image.height}
        stored = {"source": printable(name), "image_id": image.id, "annotations": objects[image.id]}
        try:
            candidates.boxes.append(canonical_json(stored | size))
        except (ValueError, RecursionError) as error:
            file.check(False, f"annotations of finite numbers for image {image.id}", error)
    return candidates


def _clipped(
    file: _File, item: _Annotation, record: dict[str, Any], image: _Image, changed: Counter[str]
) -> dict[str, Any] | None:
    """Return a record with its box clipped to the picture and without invalid polygons.

    Returns None if the box has no area. `changed` counts the changes.
    """
    x, y, width, height = item.bbox
    left, top = max(x, 0.0), max(y, 0.0)
    right, bottom = min(x + width, image.width), min(y + height, image.height)
    if not (all(map(math.isfinite, item.bbox)) and right > left and bottom > top):
        changed["dropped"] += 1
        return None
    if (left, top) != (x, y) or right < x + width or bottom < y + height:
        changed["clipped"] += 1
        record = record | {"bbox": [left, top, right - left, bottom - top]}
    if isinstance(item.segmentation, _Rle):
        runs = _run_lengths(item.segmentation.counts)
        size, area = item.segmentation.size, image.height * image.width
        fits = size == (image.height, image.width) and sum(runs) == area
        expected = f"an RLE of {image.height} x {image.width} pixels in annotation {item.id}"
        found = f"size {size} and {sum(runs)} pixels"
        file.check(fits and min(runs, default=0) >= 0, expected, found)
    elif polygons := record.get("segmentation"):
        pairs = [xy for xy in polygons if len(xy) > 5 and len(xy) % 2 == 0]
        valid = [xy for xy in pairs if all(map(math.isfinite, xy))]
        changed["polygons"] += len(polygons) - len(valid)
        record = record | {"segmentation": valid}
    return record


def _run_lengths(counts: list[int] | str) -> list[int]:
    """Return the lengths of the runs of an RLE.

    Its compressed form has 5 bits per character, lowest first. From the fourth run on, it stores
    the difference from the run two positions earlier. Returns [-1] for other characters.
    """
    if isinstance(counts, list):
        return counts
    runs, value, shift = list[int](), 0, 0
    for bits in (ord(character) - 48 for character in counts):
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:  # more characters follow
            continue
        value -= (bits >> 4 & 1) << shift  # the sign
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return [-1] if shift or not all("0" <= character <= "o" for character in counts) else runs
