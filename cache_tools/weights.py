"""Weights from elsewhere: which files torch may open, their sets of tensors, timm's models, and their normalisation."""

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

from .errors import IdentityError, ResourceError, UsageError
from .records import nearest, read_json
from .storage import file_sha256

if TYPE_CHECKING:
    from torch import Tensor, nn

# OpenAI's ViT-B/32, B/16, L/14 and L/14 at 336 px, as open_clip's table of downloads has them.
OPENAI_SHA256 = {
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
RANDOM, PRETRAINED = "random", "pretrained"  # weights that are no file: seeded ones, and those of timm's hub
TOWERS = {"visual", "text", "text_decoder", "vision_model", "text_model"}  # parts of one CLIP, with names in common
SHOWN_NAMES = 4  # tensors named in a message
Triple = tuple[float, float, float]


def is_torchscript(path: Path) -> bool:
    """Whether a file is one of OpenAI's TorchScript archives; any other file is safetensors or torch's own.

    TorchScript holds programs, which torch runs while it loads them, and they can write files. OpenAI's are known.

    Raises: UsageError for another TorchScript archive, and for a zip that does not read.
    """
    try:
        scripted = is_zipfile(path) and any(name.endswith("constants.pkl") for name in ZipFile(path).namelist())
    except Exception as error:
        raise UsageError(f"{path}: expected weights; it is a zip that does not read: {error}") from error
    if scripted and file_sha256(path) not in OPENAI_SHA256:
        raise UsageError(
            f"{path}: expected weights without code; found a TorchScript archive that is none of OpenAI's; "
            f"save its state_dict() as safetensors"
        )
    return scripted


def weights_file(spec: str | Path) -> tuple[Path, str]:
    """Split "FILE#SET" into the file and the name of a set; the set of a plain FILE is "".

    Raises: UsageError if there is no such file.
    """
    file, _, chosen = str(spec).rpartition("#")
    path, chosen = (Path(file), chosen) if file and not Path(spec).is_file() else (Path(spec), "")
    if not path.is_file():
        raise UsageError(f"--weights {spec}: expected a file; there is none")
    return path, chosen


def read_weights(spec: str | Path) -> "tuple[dict[str, Tensor], str]":
    """Read one set of tensors of FILE or FILE#SET: safetensors, a torch checkpoint or OpenAI's TorchScript.

    Returns the tensors, without the prefixes of DDP and torch.compile, and the name of the set. The name is "" where
    the file has one set. Half-precision tensors of TorchScript are returned in float32.

    Raises: UsageError if the file does not contain weights, or if SET does not name one of several sets.
    """
    import torch
    from safetensors.torch import load_file

    path, chosen = weights_file(spec)
    if is_torchscript(path):
        scripted = torch.jit.load(path, map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
        return {name: value.float() if value.is_floating_point() else value for name, value in scripted.items()}, ""
    try:
        if path.suffix == ".safetensors":
            sets = _sets(load_file(path))
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the options of MAE, DeiT and DINO
                sets = _sets(torch.load(path, map_location="cpu", weights_only=True))
        largest = max(map(len, sets.values()))
    except Exception as error:
        found = re.search(r"GLOBAL (\S+)", str(error))  # torch's advice is to unpickle the file
        text = (
            f"an object of {found[1]}"
            if found
            else re.sub(r"\x1b\[[\d;]*m", "", str(error) or repr(error)).split("\n")[0]
        )
        raise UsageError(f"{path}: expected weights (safetensors, or torch's without code); found {text}") from error
    sets = {name: tensors for name, tensors in sets.items() if 2 * len(tensors) >= largest}  # no head, no optimizer
    fits = [name for name in sets if name == chosen] or [name for name in sets if chosen in name.split(".")]
    if not fits and chosen in ("ema", "model"):
        fits = [name for name in sets if ("ema" in name) == (chosen == "ema")]
    fits = fits if chosen else list(sets)
    if len(fits) != 1:
        short = len(sets) == 2 and sum("ema" in name for name in sets) == 1
        choices = " or ".join(f"--weights {path}#{name}" for name in (("model", "ema") if short else sets))
        raise UsageError(f"--weights {spec}: expected one set of weights; found {', '.join(sets)}; use {choices}")
    return sets[fits[0]], fits[0] if len(sets) > 1 else ""


def _sets(content: Any, prefix: str = "") -> "dict[str, dict[str, Tensor]]":
    """The sets of tensors in nested dicts, by their dotted keys; a dict of two networks holds two sets."""
    import torch

    keys = [key for key in content if isinstance(key, str)]
    named = {re.sub(r"^((module|_orig_mod|backbone|model)\.)+", "", key): content[key] for key in keys}
    if len(named) < len(keys):
        raise ValueError("names that differ in the prefix of a wrapper alone")
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    found = {prefix + name: part for name, part in _networks(tensors).items()} if tensors else {}
    for name, value in named.items():
        found |= _sets(value, f"{prefix}{name}.") if isinstance(value, dict) else {}
    return {name.rstrip("."): part for name, part in found.items()}


def _networks(tensors: "dict[str, Tensor]") -> "dict[str, dict[str, Tensor]]":
    """Split NAME from NAME_ema, and twin networks: PREFIX.NAME beside the same names under another prefix, or none."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        first, _, rest = name.partition(".")
        if name.endswith("_ema"):
            groups.setdefault("ema", {})[name.removesuffix("_ema")] = value
        elif rest and not rest[0].isdigit():  # a list of layers is no network
            groups.setdefault(first, {})[rest] = value
    groups = {first: group for first, group in groups.items() if 4 * len(group) >= len(tensors)}
    own = {id(value) for first in groups.keys() - TOWERS for value in groups[first].values()}
    groups = {"model": {name: value for name, value in tensors.items() if id(value) not in own}} | groups
    found: dict[str, dict[str, Tensor]] = {}
    for one, other in itertools.permutations(groups, 2):
        if not {one, other} <= TOWERS | {"model"} and 2 * len(groups[one].keys() & groups[other].keys()) > len(
            groups[one]
        ):
            found |= {name: groups[name] for name in (one, other)}
    return found or {"": tensors}


def load_whole(model: "nn.Module", state: "dict[str, Tensor]", where: str, heads: tuple[str, ...] = ()) -> None:
    """Load `state` into a model. Tensors that begin with one of `heads` and that the model lacks are left out.

    Raises: IdentityError if a tensor of the model is missing or of another shape, or if a tensor is left over.
    """
    own = model.state_dict()
    missing = sorted(name for name in own if name not in state or state[name].shape != own[name].shape)
    unexpected = sorted(name for name in state if name not in own and not name.startswith(heads))
    if missing or unexpected:
        share = 100 * (1 - len(missing) / len(own))
        raise IdentityError(
            f"{where}: expected 100 % of the encoder's {len(own)} tensors; found {share:.1f} %, missing or of another "
            f"shape: {_names(missing)}; unexpected: {_names(unexpected)}; give the weights of this architecture"
        )
    model.load_state_dict({name: state[name] for name in own})


def _names(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more if names else "none"


@dataclass(frozen=True)
class Preprocessing:
    """What pictures must look like: mean and std of pixels in [0, 1] and the interpolation; `source` states them."""

    mean: Triple
    std: Triple
    interpolation: str
    source: str

    def __str__(self) -> str:
        mean, std = (",".join(f"{value:g}" for value in triple) for triple in (self.mean, self.std))
        return f"mean {mean} std {std} {self.interpolation}"


def preprocessing(
    name: str, given: tuple[Triple, Triple] | None, own: Mapping[str, Any], source: str,
    tags: Mapping[str, Mapping[str, Any]], default: tuple[Triple, Triple] | None, advice: str,
) -> Preprocessing:  # fmt: skip
    """Choose the preprocessing of weights of an architecture: as given, or as its `own` configuration states.

    Otherwise it is what every tag of the architecture states, or the `default` (of random weights).

    Raises: UsageError where the tags differ, or do not exist, and there is no default.
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
    raise UsageError(f"{name}: expected tags of one mean and std, as the file brings none; found {found}; {advice}")


def _stated(config: Mapping[str, Any], source: str) -> Preprocessing:
    try:
        mean, std = (tuple(map(float, config[key])) for key in ("mean", "std"))
        if not len(mean) == len(std) == 3 or not all(map(math.isfinite, mean)) or not all(0 < x < 255 for x in std):
            raise ValueError(f"{mean} and {std}")
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{source}: expected a mean and a std of three colours; found {error!r}") from error
    return Preprocessing(mean, std, str(config.get("interpolation") or "bicubic"), source)


def config_beside(weights: str | Path, name: str) -> dict[str, Any]:
    """The JSON object called `name` in the folder of FILE or FILE#SET; empty where there is none."""
    path = weights_file(weights)[0].with_name(name)
    return read_json(path, UsageError) if path.is_file() else {}


def load_timm(
    name: str, weights: str | Path, heads: tuple[str, ...], advice: str = "",
    given: tuple[Triple, Triple] | None = None, size: int | None = None,
) -> "tuple[Any, Preprocessing, str]":  # fmt: skip
    """Make the headless model NAME or NAME.TAG of timm with "pretrained" or "random" weights, or those of a file.

    Returns the model, its preprocessing, which is also in its pretrained_cfg, and the name of the set in the file.

    Raises: UsageError for a name, tag or size that timm does not have, and where the preprocessing is not known;
    IdentityError unless the file holds every tensor; ResourceError where weights cannot be fetched.
    """
    import timm
    from timm.models import get_arch_pretrained_cfgs, is_model_pretrained

    architecture, _, tag = name.partition(".")
    if not timm.is_model(name):
        raise UsageError(f"timm:{name}: timm has no such model{nearest(architecture, timm.list_models())}")
    known = {full.partition(".")[2]: config for full, config in get_arch_pretrained_cfgs(architecture).items()}
    if tag and tag not in known:
        raise UsageError(f"timm:{name}: expected a tag of {architecture}: {', '.join(known)}{nearest(tag, known)}")
    hub, random = weights == PRETRAINED, weights == RANDOM
    if hub and not is_model_pretrained(name):
        raise UsageError(f"timm:{name}: timm has no weights of it; give a file")
    state, chosen = ({}, "") if hub or random else read_weights(weights)
    try:
        model = timm.create_model(name, pretrained=hub, num_classes=0, **({"img_size": size} if size else {}))
        data, convert = model.pretrained_cfg, getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        state = convert(state, model) if state and convert else state
    except Exception as error:
        if hub and isinstance(error, OSError | RuntimeError):
            raise ResourceError(f"timm:{name}: its weights cannot be fetched: {error}; give a local file") from error
        raise UsageError(f"timm:{name}: expected a model that takes these weights and sizes; {error!r}") from error
    if state:
        load_whole(model, state, str(weights), heads)
    own, source = (data, f"timm:{name}") if hub or tag else ({}, "")
    if (
        not (hub or random or tag)
        and (config := config_beside(weights, "config.json")).get("architecture") == architecture
    ):
        own, source = config.get("pretrained_cfg", {}), "the config.json beside the weights"
    tags = {tag: config.to_dict() for tag, config in known.items() if config.has_weights}
    default = (data["mean"], data["std"]) if random else None
    found = preprocessing(f"timm:{architecture}", given, own, source, tags, default, f"use timm:NAME.TAG, {advice}")
    data |= {"mean": found.mean, "std": found.std, "interpolation": found.interpolation}
    return model, found, chosen
