"""Sources that lie: each has one outcome, a row, a quarantined picture, or a UsageError by name before any write."""

import errno
import io
import json
import os
import random
import struct
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_pipeline_shard import REFUSED, picture

from cache_tools.dataset import Dataset
from cache_tools.errors import UsageError
from cache_tools.images import PictureRefused, decode_rgb
from cache_tools.records import printable
from pipeline import candidates, listing, source_splits
from pipeline import shard as module
from pipeline.shard import shard

PNG = picture(0)
# Height, width and mean color of what is accepted in odd-images/ of the test data (see test_pipeline_shard.py).
GOLDEN = {f"exif/Landscape_{i}.jpg": (1200, 1800, 98, 116, 134) for i in range(9)} | {
    "made/jpeg_named.png": (263, 376, 70, 76, 52),
    "made/n00000002_cmyk.JPEG": (375, 500, 106, 111, 95),
    "made/n00000010_1x1.JPEG": (1, 1, 114, 116, 95),
    "made/n00000012_exif6.JPEG": (500, 375, 106, 111, 95),
    "made/n00000014_1bit.png": (375, 500, 107, 107, 107),
    "made/n00000016_i16.png": (375, 500, 108, 108, 108),
    "made/n00000018_trailing_garbage.JPEG": (263, 376, 70, 76, 52),
    "made/n00000020 space é猫.JPEG": (375, 500, 106, 111, 95),
    "pillow/apng_mode_16bit.png": (64, 128, 255, 0, 0),
    "pillow/apng_mode_palette_alpha.png": (64, 128, 255, 0, 0),
    "pillow/exif_typeerror.jpg": (531, 800, 161, 160, 142),
    "pillow/hopper.png": (128, 128, 90, 80, 95),
    "pillow/hopper_16bit_qtables.jpg": (128, 128, 90, 80, 95),
    "pillow/hopper_bw_500.png": (500, 500, 99, 99, 99),
    "pillow/hopper_orientation_2.jpg": (128, 128, 90, 80, 95),
    "pillow/hopper_orientation_4.jpg": (128, 128, 90, 80, 95),
    "pillow/hopper_orientation_6.jpg": (128, 128, 90, 80, 95),
    "pillow/hopper_orientation_8.jpg": (128, 128, 90, 80, 95),
    "pillow/i_trns.png": (64, 64, 0, 0, 0),
    "pillow/icc_profile_big.jpg": (250, 425, 57, 107, 168),
    "pillow/iss634.apng": (245, 245, 135, 137, 90),
    "pillow/l_trns.png": (64, 64, 124, 124, 124),
    "pillow/p_16.png": (128, 128, 96, 96, 96),
    "pillow/pil123p.png": (150, 162, 190, 189, 172),
    "pillow/sugarshack.mpo": (480, 640, 121, 109, 99),
    "pillow/test_combine_caron_la.png": (400, 400, 253, 253, 253),
    "pillow/transparent.webp": (150, 200, 211, 203, 204),
}


def test_every_odd_picture_decodes_to_its_golden_size_and_color(shared_data, tally):
    root = shared_data / "odd-images"
    names = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert names == GOLDEN.keys() | REFUSED.keys()
    for name, golden in GOLDEN.items():
        rgb = decode_rgb((root / name).read_bytes())
        assert rgb.shape == (*golden[:2], 3), name
        # Builds of Pillow round CMYK and chroma in their own ways; another rule would move the mean by far more.
        assert np.abs(rgb.mean((0, 1)) - golden[2:]).max() < 3, name
    tally("odd pictures with a golden outcome", inputs=len(names), failures=0)


@pytest.fixture
def canary(tmp_path):
    """A folder for the test; nothing beside it may come or change."""
    (tmp_path / "canary").write_bytes(b"alive")
    (tmp_path / "box").mkdir()
    yield tmp_path / "box"
    assert [path.name for path in tmp_path.iterdir() if path.name != "box"] == ["canary"]
    assert (tmp_path / "canary").read_bytes() == b"alive"


def rows(out: Path, split: str = "train") -> dict[str, int]:
    """{source name: label} of every row, out of the tars themselves."""
    dataset, found = Dataset(out), {}
    for i in range(len(dataset.split(split).shards)):
        with tarfile.open(dataset.tar(split, i)) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name in members:
            if name.endswith(".json"):
                found[json.loads(members[name])["source"]] = int(members[f"{name[:-5]}.cls"])
    return found


def quarantined(out: Path) -> dict[str, str]:
    lines = (out / "train" / "quarantine.jsonl").read_text().splitlines()
    return {line["source"]: line["reason"] for line in map(json.loads, lines)}


def refuse(source: Path, match: str) -> None:
    """The request ends in a UsageError that names the file, before anything is written."""
    out = source.parent / "refused-out"
    with pytest.raises(UsageError, match=match):
        shard(source, out, max_refused=1)
    assert not out.exists()


# Folders

NAMES = ["new\nline.png", "esc\x1b[2Jape.png", "n" * 251 + ".png", "two..dots...png", "a.png.jpg", "no extension"]
NAMES += [
    "\u0440\u0443\u0441.png",
    "\u202egnp.x",
    "Case.png",
    "case.PNG",
    "e\u0301.png",
    "\u00e9.png",
    "-rf",
    "con",
    "~",
]
NAMES += ["a.jpg", "a.png", "a.webp"]  # one stem: rows have keys of our own


def test_odd_names_in_a_folder_become_rows(canary, capsys):
    folders = [b"plain", b"new\nline\x1b[2J", b"Plain", b"caf\xe9", b"d..ots"]
    for folder in folders:
        os.makedirs(os.fsencode(canary / "source") + b"/" + folder)
        for name in [os.fsencode(name) for name in NAMES] + [b"\xff\xfe.png"]:
            with open(os.fsencode(canary / "source") + b"/" + folder + b"/" + name, "wb") as file:
                file.write(PNG)
    for hidden in ("..", "...", "..png"):  # hidden, as every name with a dot in front
        (canary / "source" / "plain" / f"{hidden}x").write_bytes(PNG)
    shard(canary / "source", canary / "out")
    expected = Counter()
    for label, folder in enumerate(sorted(os.fsdecode(name) for name in folders)):
        expected.update({printable(f"{folder}/{name}"): label for name in [*NAMES, "\udcff\udcfe.png"]})
    assert rows(canary / "out") == expected
    assert "\x1b" not in capsys.readouterr().out


def test_folders_deeper_than_python_recurses(canary):
    (canary / "source").mkdir()
    here = os.getcwd()
    os.chdir(canary / "source")
    try:
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
        Path("deep.png").write_bytes(PNG)
    finally:
        os.chdir(here)
    try:
        shard(canary / "source", canary / "out")
        assert list(rows(canary / "out")) == ["d/" * 1200 + "deep.png"]
    finally:  # pytest could not: its cleaning recurses
        subprocess.run(["rm", "-rf", canary / "source"], check=True)


def test_files_that_change_after_they_were_listed_are_quarantined(canary, monkeypatch):
    source = canary / "source" / "a"
    source.mkdir(parents=True)
    names = ["fifo", "folder", "gone", "good", "grown", "link", "other", "short"]
    for name in names:
        (source / f"{name}.png").write_bytes(PNG)

    def list_and_change(*request):
        found = listing.list_sources(*request)
        for name in ("fifo", "folder", "gone", "link"):
            (source / f"{name}.png").unlink()
        os.mkfifo(source / "fifo.png")
        (source / "folder.png").mkdir()
        (source / "link.png").symlink_to(canary.parent / "canary")
        (source / "grown.png").write_bytes(PNG + b"tail")  # still a picture: who changes it in time gets a row
        (source / "other.png").write_bytes(b"GIF89a")
        (source / "short.png").write_bytes(PNG[:100])
        return found

    monkeypatch.setattr(module, "list_sources", list_and_change)
    shard(canary / "source", canary / "out", max_refused=1)
    assert rows(canary / "out").keys() == {"a/good.png", "a/grown.png"}
    reasons = {"fifo": "changed", "folder": "changed", "gone": "unreadable", "link": "unreadable"}
    reasons |= {"other": "format", "short": "damaged"}
    assert quarantined(canary / "out") == {f"a/{name}.png": reason for name, reason in reasons.items()}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EMFILE, errno.EIO])
@pytest.mark.parametrize("call", ["open", "pread"])
def test_unreadable_pictures_are_refused_and_a_failing_machine_is_named(canary, monkeypatch, number, call):
    (canary / "a").mkdir()
    (canary / "a" / "1.png").write_bytes(PNG)
    item = listing.list_sources(canary).splits["train"][0]

    def failing(*arguments):
        raise OSError(number, os.strerror(number), *([str(arguments[0])] if call == "open" else []))

    monkeypatch.setattr(candidates.os, call, failing)
    mine = call == "open" and number in (errno.EACCES, errno.EPERM)
    with pytest.raises(PictureRefused if mine else OSError) as error:
        candidates.read_source(item)
    assert error.value.reason == "unreadable" if mine else error.value.filename.endswith("1.png")


def test_an_unreadable_folder_stops_before_any_write(canary, monkeypatch):
    (canary / "source" / "a").mkdir(parents=True)

    def failing(path, real=os.scandir):
        if Path(path).name == "a":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(source_splits.os, "scandir", failing)
    with pytest.raises(PermissionError, match="source/a"):
        shard(canary / "source", canary / "out")
    assert not (canary / "out").exists()


# Tars


def member(name: str, data: bytes = b"", size: int | None = None, kind: bytes = tarfile.REGTYPE) -> bytes:
    """One member; `size` is what its header says."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data) if size is None else size, kind
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def pax(key: str, value: str) -> bytes:
    """An extended header for the member behind it."""
    record = f" {key}={value}\n"
    length = next(n for n in range(9999) if n == len(str(n)) + len(record))
    return member("x", f"{length}{record}".encode(), kind=tarfile.XHDTYPE)


END = bytes(1024)


def negative(name: str, size: int) -> bytes:
    """A header with a negative size, in base 256."""
    header = bytearray(member(name)[:512])
    header[124:136] = b"\xff" + (256**11 + size).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def test_members_in_any_order_and_with_any_name_become_rows(canary, capsys):
    path = canary / "x.tar"
    order = [("b.cls", b"1"), ("b.png", PNG), ("a.png", PNG), ("a.cls", b"0"), ("c.json", b'{"label": 0}')]
    order += [("c.png", PNG), ("../../canary.png", PNG), ("../../canary.cls", b"2"), ("/etc/x.jpg", PNG)]
    order += [("/etc/x.cls", b"2"), ("d/a.png", PNG), ("d/a.cls", b"1"), ("a/../b.png", PNG), ("a/../b.cls", b"1")]
    order += [("new\nline.png", PNG), ("new\nline.cls", b" 2 \n")]
    order += [("x" * 300 + ".png", PNG), ("x" * 300 + ".cls", b"0")]
    order += [("A.png", PNG), ("A.cls", b"2"), ("README", b""), (".hidden.png", PNG)]
    path.write_bytes(b"".join(member(*each) for each in order) + END)
    shard(path, canary / "out")
    found = {name.removeprefix("x.tar/"): label for name, label in rows(canary / "out").items()}
    labels = {"../../canary.png": 2, "/etc/x.jpg": 2, "d/a.png": 1, "a/../b.png": 1, "new\nline.png": 2, "A.png": 2}
    assert found == {"a.png": 0, "b.png": 1, "c.png": 0, "x" * 300 + ".png": 0} | labels
    assert "2 members of tars left out" in capsys.readouterr().out


BIG = 8 << 30
BAD_TARS = {
    "the same name twice": (member("a.png", PNG) * 2, "a.png: duplicate file name"),
    "duplicates far apart": (member("a.png") + member("b.png") * 1 + member("a.PNG"), "found 'a' twice"),
    "a label far from its picture": (member("a.png") + member("b.png") + member("a.cls", b"1"), "found 'a' twice"),
    "two labels": (member("a.png") + member("a.cls", b"1") + member("a.cls", b"2"), "a.cls: duplicate file name"),
    "a size of 8 GiB": (member("a.png", PNG) + member("b.png", size=BIG), "does not end inside"),
    "a size of 2^80": (member("a.png", PNG) + member("b.png", size=1 << 80), "does not end inside"),
    "a negative size": (member("a.png") + negative("b.png", -512), "does not end inside"),
    "a circle": (member("a.png") + negative("b.png", -1024), "does not end inside"),
    "a negative size of an odd number": (negative("x", -5), "does not end inside"),
    "a negative size by pax": (pax("size", "-2048") + member("a.png"), "does not end inside"),
    "a size by pax": (pax("size", "9" * 30) + member("a.png"), "does not end inside"),
    "a long name of 8 GiB": (member("././@LongLink", size=BIG, kind=tarfile.GNUTYPE_LONGNAME), "a header of"),
    "an extended header of 8 GiB": (member("x", size=BIG, kind=tarfile.XHDTYPE), "a header of"),
    "headers of headers": (member("x", b"y" * 9, kind=tarfile.GNUTYPE_LONGNAME) * 3000, "cannot read"),
    "digits in an extended header": (member("x", b"9" * 5000 + b" a=b\n", kind=tarfile.XHDTYPE), "cannot read"),
    "no tar": (b"not a tar" * 200, "cannot read"),
    "a gzip": (b"\x1f\x8b\x08\0" + bytes(600), "cannot read"),
    "nothing": (b"", "cannot read"),
    "label -2": (member("a.png") + member("a.cls", b"-2"), "a.cls: expected a label"),
    "label 1,000,000": (member("a.png") + member("a.cls", b"1000000"), "a.cls: expected a label"),
    "a label of 5,000 digits": (member("a.png") + member("a.cls", b"9" * 5000), "a.cls: expected a label"),
    "a label of 2 MiB": (
        member("a.png") + member("a.json", b'{"label": 0, "x": "' + b"y" * (2 << 20) + b'"}'),
        "a.json",
    ),
    "label true": (member("a.png") + member("a.json", b'{"label": true}'), "a.json: expected a label"),
    "label NaN": (member("a.png") + member("a.json", b'{"label": NaN}'), "a.json: expected a label"),
    "label 1.0": (member("a.png") + member("a.json", b'{"label": 1.0}'), "a.json: expected a label"),
    "a deep label": (member("a.png") + member("a.json", b"[" * 100_000), "a.json: expected a label"),
    "no text": (member("a.png") + member("a.cls", b"\xff\xfe"), "a.cls: expected a label"),
}


@pytest.mark.parametrize("name", BAD_TARS)
def test_tars_that_lie_are_refused_by_name_before_any_write(canary, name):
    data, match = BAD_TARS[name]
    (canary / "x.tar").write_bytes(data + (END if data else b""))
    refuse(canary / "x.tar", rf"x\.tar.*{match}")


def test_a_tar_cut_at_any_byte_is_refused(canary, how_many, tally):
    parts = [
        member("n" * 300 + ".png", PNG),
        pax("path", "p" * 400 + ".png") + member("a.png", PNG),
        member("b.png", PNG),
    ]
    whole, draw, path = b"".join(parts), random.Random(5), canary / "x.tar"
    cuts = sorted({*range(0, len(whole) + 1, 512), *(draw.randrange(len(whole)) for _ in range(how_many(150, 5000)))})
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(UsageError, match=r"x\.tar"):
            listing.list_sources(path)
    path.write_bytes(whole + END)
    assert len(listing.list_sources(path).splits["train"]) == 3
    tally("tars cut short", inputs=len(cuts), failures=0)


def test_tars_of_other_kinds_and_their_listings_are_refused(canary):
    source = canary / "source"
    source.mkdir()
    os.mkfifo(source / "x.tar")
    refuse(source, r"x\.tar: expected a tar; found no regular file")
    (source / "x.tar").unlink()
    (source / "x.tar").write_bytes(member("a.png", PNG) + member("a.cls", b"1") + END)
    (source / "classes.txt").write_text("one\n")
    refuse(source, r"classes\.txt: expected at least 2 lines, one per class; found 1")
    (source / "classes.txt").write_bytes(b"\xff\xfe\n")
    refuse(source, r"classes\.txt: expected one class name per line, in UTF-8")
    with open(source / "classes.txt", "wb") as file:
        file.truncate(1 << 40)
    refuse(source, r"classes\.txt: expected a regular file of at most")
    (source / "classes.txt").unlink()
    for text in ("[" * 100_000, '{"splits": {"train": {"filenames": 7}}}', '{"splits": 1}', "\ud800", "NaN"):
        (source / "_info.json").write_text(text, errors="surrogatepass")
        refuse(source, r"_info\.json: expected timm's")
    for name in ("/etc/x.tar", "../x.tar", "a/../../x.tar"):
        (source / "_info.json").write_text(json.dumps({"splits": {"train": {"filenames": [name]}}}))
        refuse(source, r"_info\.json: expected (tars in its folder|the tars that it names)")
    refuse(Path(f"{source}/{{0..1"), "expected a pattern of files")


# Bombs


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bombs(folder: Path) -> None:
    side = 50_000
    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    png = b"\x89PNG\r\n\x1a\n" + ihdr
    (folder / "pixels.png").write_bytes(png + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))
    small = PNG[:33]
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(100 << 20), 1))
    (folder / "text.png").write_bytes(small + text + PNG[33:])
    itxt = chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(100 << 20), 1))
    (folder / "itext.png").write_bytes(small + itxt + PNG[33:])
    icc = chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(100 << 20), 1))
    (folder / "icc.png").write_bytes(small + icc + PNG[33:])
    jpeg = io.BytesIO()
    Image.new("RGB", (8, 8)).save(jpeg, "JPEG")
    data = bytearray(jpeg.getvalue())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", side, side)
    (folder / "pixels.jpg").write_bytes(data)
    for name, width in (("pixels", 16_383), ("canvas", side)):
        vp8x = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + (width - 1).to_bytes(3, "little") * 2
        anim = b"ANIM" + struct.pack("<I", 6) + bytes(6)
        body = b"WEBP" + vp8x + anim
        (folder / f"{name}.webp").write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    with open(folder / "sparse.jpg", "wb") as file:
        file.truncate(1 << 40)
    (folder / "good.png").write_bytes(PNG)


MEASURE = """
import re, resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))
sys.argv[1:] = {arguments!r}
from pipeline.cli import app
try:
    app()
finally:
    print("PEAK", re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""


def measured(*arguments: object, limit: int) -> int:
    """MiB that `mcm-cache shard` came to need; no process of it has an address space above `limit` bytes."""
    line = ["shard", *map(str, arguments), "--max-refused", "1", "--workers", "2"]
    code = MEASURE.format(arguments=line, limit=limit)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout.split("PEAK")[1]) >> 10


def test_bombs_are_refused_in_little_memory(canary, tally):
    source = canary / "source" / "a"
    source.mkdir(parents=True)
    bombs(source)
    assert measured(canary / "source", canary / "out", limit=1 << 30) < 500
    reasons = quarantined(canary / "out")
    assert reasons["a/sparse.jpg"] == reasons["a/pixels.png"] == reasons["a/pixels.jpg"] == "too-large"
    assert {name for name in reasons if name.endswith(("webp", "text.png"))} == {
        f"a/{name}" for name in ("pixels.webp", "canvas.webp", "text.png", "itext.png")
    }
    assert set(reasons.values()) <= {"too-large", "damaged"} and "a/good.png" in rows(canary / "out")
    tally("bombs", inputs=9, failures=0)
