"""Load external weights: safe reading of files, sets of tensors, timm models and preprocessing."""

import argparse
import itertools
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile, is_zipfile

from .errors import IdentityError, ResourceError, UsageError, found_at
from .records import nearest, read_json
from .storage import file_sha256

if TYPE_CHECKING:
    from torch import Tensor, nn

# ViT-B/32, B/16, L/14 and L/14 at 336 px of OpenAI, from open_clip's table of downloads.
OPENAI_SHA256 = {
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
# Weights without a file: seeded initialization, and the download of timm.
RANDOM, PRETRAINED = "random", "pretrained"
# Parts of one CLIP model, which share tensor names.
TOWERS = {"visual", "text", "text_decoder", "vision_model", "text_model"}
SHOWN_NAMES = 4  # maximum number of tensor names per message
Triple = tuple[float, float, float]


def is_torchscript(path: Path) -> bool:
    """Return whether a file is one of OpenAI's TorchScript archives.

    A TorchScript archive contains code. torch runs this code when it loads the archive, and the
    code can write files. Only the four archives of OpenAI are accepted.

    Raises: UsageError for another TorchScript archive, and for a damaged zip archive.
    """
    try:
        names = ZipFile(path).namelist() if is_zipfile(path) else []
    except Exception as error:
        found = f"found a damaged zip archive: {error}"
        raise UsageError(f"{path}: expected weights; {found}; copy the file again") from error
    scripted = any(name.endswith("constants.pkl") for name in names)
    if scripted and file_sha256(path) not in OPENAI_SHA256:
        found = "found a TorchScript archive that is not one of OpenAI's"
        advice = "save its state_dict() as safetensors"
        raise UsageError(f"{path}: expected weights without code; {found}; {advice}")
    return scripted


def weights_file(spec: str | Path) -> tuple[Path, str]:
    """Split "FILE#SET" into the file and the name of the set. The set of a plain FILE is "".

    Raises: UsageError if the file does not exist.
    """
    file, _, chosen = str(spec).rpartition("#")
    split = file and not Path(spec).is_file()
    path, chosen = (Path(file), chosen) if split else (Path(spec), "")
    if not path.is_file():
        raise UsageError(f"--weights {spec}: expected a file; found {found_at(path)}")
    return path, chosen


def read_weights(spec: str | Path) -> "tuple[dict[str, Tensor], str]":
    """Read one set of tensors from FILE or FILE#SET.

    The file is safetensors, a torch checkpoint or a TorchScript archive of OpenAI. Half-precision
    tensors of a TorchScript archive are converted to float32.

    Returns the tensors, without the prefixes of DDP and torch.compile, and the name of the set. The
    name is "" if the file has one set.

    Raises: UsageError if the file does not contain weights, or if SET does not name one set.
    """
    import torch
    from safetensors.torch import load_file

    path, chosen = weights_file(spec)
    if is_torchscript(path):
        module = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
        state = module.state_dict().items()
        return {name: x.float() if x.is_floating_point() else x for name, x in state}, ""
    try:
        if path.suffix == ".safetensors":
            sets = _sets(load_file(path))
        else:
            # The checkpoints of MAE, DeiT and DINO contain their options as a Namespace.
            with torch.serialization.safe_globals([argparse.Namespace]):
                sets = _sets(torch.load(path, map_location="cpu", weights_only=True))
        largest = max(map(len, sets.values()))
    except Exception as error:
        # torch's message recommends unpickling the file, so only a class name is shown of it.
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        text = re.sub(r"\x1b\[[\d;]*m", "", str(error) or repr(error)).split("\n")[0]
        text = "another kind of file" if "weights_only" in text else text
        found = f"an object of {unsafe[1]}" if unsafe else text
        expected = "expected weights (safetensors, or torch's without code)"
        raise UsageError(f"{path}: {expected}; found {found}") from error
    # Small sets are heads and optimizer states.
    sets = {name: tensors for name, tensors in sets.items() if 2 * len(tensors) >= largest}
    matches = [name for name in sets if name == chosen]
    matches = matches or [name for name in sets if chosen in name.split(".")]
    if not matches and chosen in ("ema", "model"):
        matches = [name for name in sets if ("ema" in name) == (chosen == "ema")]
    matches = matches if chosen else list(sets)
    if len(matches) != 1:
        one_ema = len(sets) == 2 and sum("ema" in name for name in sets) == 1
        names = ("model", "ema") if one_ema else sets
        advice = "use " + " or ".join(f"--weights {path}#{name}" for name in names)
        found = f"found {', '.join(sets)}"
        raise UsageError(f"--weights {spec}: expected one set of weights; {found}; {advice}")
    return sets[matches[0]], matches[0] if len(sets) > 1 else ""


def _sets(content: Any, prefix: str = "") -> "dict[str, dict[str, Tensor]]":
    """Return the sets of tensors in nested dicts, by dotted key.

    A dict of two networks is two sets.
    """
    import torch

    keys = [key for key in content if isinstance(key, str)]
    prefixes = r"^((module|_orig_mod|backbone|model)\.)+"
    named = {re.sub(prefixes, "", key): content[key] for key in keys}
    if len(named) < len(keys):
        raise ValueError("names that differ only in the prefix of a wrapper")
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    networks = _networks(tensors) if tensors else {}
    sets = {prefix + name: network for name, network in networks.items()}
    for name, value in named.items():
        sets |= _sets(value, f"{prefix}{name}.") if isinstance(value, dict) else {}
    return {name.rstrip("."): network for name, network in sets.items()}


def _networks(tensors: "dict[str, Tensor]") -> "dict[str, dict[str, Tensor]]":
    """Split a flat dict of tensors into networks.

    NAME_ema is separated from NAME. Two prefixes, or a prefix and no prefix, are two networks if
    they share most of their names.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        first, _, rest = name.partition(".")
        if name.endswith("_ema"):
            groups.setdefault("ema", {})[name.removesuffix("_ema")] = value
        elif rest and not rest[0].isdigit():  # a list of layers is not a network
            groups.setdefault(first, {})[rest] = value
    groups = {first: group for first, group in groups.items() if 4 * len(group) >= len(tensors)}
    grouped = {id(value) for first in groups.keys() - TOWERS for value in groups[first].values()}
    ungrouped = {name: value for name, value in tensors.items() if id(value) not in grouped}
    groups = {"model": ungrouped} | groups
    networks: dict[str, dict[str, Tensor]] = {}
    for first, second in itertools.permutations(groups, 2):
        shared = len(groups[first].keys() & groups[second].keys())
        if not {first, second} <= TOWERS | {"model"} and 2 * shared > len(groups[first]):
            networks |= {name: groups[name] for name in (first, second)}
    return networks or {"": tensors}


def load_whole(
    model: "nn.Module", state: "dict[str, Tensor]", where: str, heads: tuple[str, ...] = ()
) -> None:
    """Load `state` into a model.

    Tensors that the model does not have are ignored if their names begin with one of `heads`.

    Raises: IdentityError if a tensor of the model is missing or has another shape, or if another
    tensor of `state` is unused; UsageError if a value is infinite or NaN.
    """
    own = model.state_dict()
    missing = sorted(n for n in own if n not in state or state[n].shape != own[n].shape)
    unexpected = sorted(n for n in state if n not in own and not n.startswith(heads))
    if missing or unexpected:
        share = 100 * (1 - len(missing) / len(own))
        raise IdentityError(
            f"{where}: expected 100 % of the encoder's {len(own)} tensors; found {share:.1f} %, "
            f"missing or of another shape: {_names(missing)}; unexpected: {_names(unexpected)}; "
            f"give the weights of this architecture"
        )
    if unfit := [name for name in own if not state[name].isfinite().all()]:
        found = f"found NaN or infinity in {_names(unfit)}; use other weights"
        raise UsageError(f"{where}: expected finite weights; {found}")
    model.load_state_dict({name: state[name] for name in own})


def _names(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more if names else "none"


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of pictures: mean and std of pixels in [0, 1], and the interpolation.

    `source` describes the origin of the values.
    """

    mean: Triple
    std: Triple
    interpolation: str
    source: str

    def __str__(self) -> str:
        mean, std = (",".join(f"{x:g}" for x in triple) for triple in (self.mean, self.std))
        return f"mean {mean} std {std} {self.interpolation}"


def preprocessing(
    name: str, given: tuple[Triple, Triple] | None, own: Mapping[str, Any], source: str,
    tags: Mapping[str, Mapping[str, Any]], default: tuple[Triple, Triple] | None, advice: str,
) -> Preprocessing:  # fmt: skip
    """Return the preprocessing of weights of an architecture.

    The first of these applies: the `given` mean and std, the `own` configuration of the weights,
    the value that all tags of the architecture share, the `default` for random weights.

    Raises: UsageError if none applies.
    """
    if given:
        return Preprocessing(*given, own.get("interpolation", "bicubic"), "the options")
    if "mean" in own or "std" in own:
        return _stated(own, source)
    stated: dict[str, list[str]] = {}
    for tag, config in tags.items():
        stated.setdefault(str(_stated(config, tag)), []).append(tag)
    if len(stated) == 1:
        return _stated(next(iter(tags.values())), f"the tags of {name}")
    if default:
        return Preprocessing(*default, "bicubic", "the default for random weights")
    found = "; ".join(f"{text} of {_names(named)}" for text, named in stated.items()) or "no tags"
    expected = "expected one mean and std for all tags, because the file states none"
    raise UsageError(f"{name}: {expected}; found {found}; {advice}")


def _stated(config: Mapping[str, Any], source: str) -> Preprocessing:
    try:
        mean, std = (tuple(map(float, config[key])) for key in ("mean", "std"))
        finite = all(map(math.isfinite, mean)) and all(0 < x < 255 for x in std)
        if not len(mean) == len(std) == 3 or not finite:
            raise ValueError(f"{mean} and {std}")
    except (KeyError, TypeError, ValueError) as error:
        expected = "expected three values of mean and of std"
        raise UsageError(f"{source}: {expected}; found {error!r}") from error
    return Preprocessing(mean, std, str(config.get("interpolation") or "bicubic"), source)


def config_beside(weights: str | Path, name: str) -> dict[str, Any]:
    """Return the JSON object in the file `name` next to FILE or FILE#SET, or an empty dict."""
    path = weights_file(weights)[0].with_name(name)
    return read_json(path, UsageError) if path.is_file() else {}


def _timm_tags(architecture: str, tag: str) -> dict[str, Any]:
    """Return the configuration of each tag; a `tag` that is not "" is one of them."""
    import timm
    from timm.models import get_arch_pretrained_cfgs

    if not timm.is_model(architecture):
        close = nearest(architecture, timm.list_models())
        raise UsageError(
            f"timm:{architecture}: expected a model of timm; found no such name{close}"
        )
    configs = get_arch_pretrained_cfgs(architecture).items()
    known = {full.partition(".")[2]: config for full, config in configs}
    if tag and tag not in known:
        found = f"{', '.join(known)}{nearest(tag, known)}"
        raise UsageError(f"timm:{architecture}.{tag}: expected a tag of {architecture}: {found}")
    return known


def load_timm(
    name: str, weights: str | Path, heads: tuple[str, ...], advice: str = "",
    given: tuple[Triple, Triple] | None = None, size: int | None = None,
) -> "tuple[Any, Preprocessing, str]":  # fmt: skip
    """Create the timm model NAME or NAME.TAG without a head.

    `weights` is "pretrained", "random", FILE or FILE#SET.

    Returns the model, its preprocessing, and the name of the set in the file. The preprocessing is
    also in the model's pretrained_cfg.

    Raises: UsageError for an unknown name, tag, size or preprocessing; IdentityError unless the
    file holds every tensor; ResourceError if the weights cannot be fetched.
    """
    import timm
    from timm.models import is_model_pretrained

    architecture, _, tag = name.partition(".")
    known = _timm_tags(architecture, tag)
    hub, random = weights == PRETRAINED, weights == RANDOM
    if hub and not is_model_pretrained(name):
        raise UsageError(f"timm:{name}: expected pretrained weights; timm has none; give a file")
    state, chosen = ({}, "") if hub or random else read_weights(weights)
    try:
        options = {"img_size": size} if size else {}
        model = timm.create_model(name, pretrained=hub, num_classes=0, **options)
        data = model.pretrained_cfg
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        state = convert(state, model) if state and convert else state
    except Exception as error:
        if hub and isinstance(error, OSError | RuntimeError):
            failed = f"its weights cannot be fetched: {error}"
            raise ResourceError(f"timm:{name}: {failed}; give a local file") from error
        expected = "expected a model that accepts these weights and this size"
        raise UsageError(f"timm:{name}: {expected}; found {error!r}") from error
    if state:
        load_whole(model, state, str(weights), heads)
    own, source = (data, f"timm:{name}") if hub or tag else ({}, "")
    beside = {} if hub or random or tag else config_beside(weights, "config.json")
    if beside.get("architecture") == architecture:
        own, source = beside.get("pretrained_cfg", {}), "the config.json beside the weights"
    tags = {tag: config.to_dict() for tag, config in known.items() if config.has_weights}
    default = (data["mean"], data["std"]) if random else None
    family, advice = f"timm:{architecture}", f"use timm:NAME.TAG, {advice}"
    stated = preprocessing(family, given, own, source, tags, default, advice)
    data |= {"mean": stated.mean, "std": stated.std, "interpolation": stated.interpolation}
    return model, stated, chosen
