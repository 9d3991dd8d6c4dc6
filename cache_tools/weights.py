"""Files of weights from elsewhere: which of them torch may open, decided before it does."""

from pathlib import Path
from zipfile import BadZipFile, ZipFile, is_zipfile

from .errors import UsageError
from .storage import file_sha256

# OpenAI's ViT-B/32, B/16, L/14 and L/14 at 336 px, as open_clip's table of downloads has them.
OPENAI_SHA256 = {
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}


def is_torchscript(path: Path) -> bool:
    """Whether a file is one of OpenAI's TorchScript archives; any other file is safetensors or torch's own.

    TorchScript holds programs, which torch runs while it loads them, and they can write files. OpenAI's are known.

    Raises: UsageError for another TorchScript archive, and for a zip that does not read.
    """
    try:
        scripted = is_zipfile(path) and any(name.endswith("constants.pkl") for name in ZipFile(path).namelist())
    except (BadZipFile, ValueError, NotImplementedError, OverflowError) as error:
        raise UsageError(f"{path}: expected weights; it is a zip that does not read: {error}") from error
    if scripted and file_sha256(path) not in OPENAI_SHA256:
        raise UsageError(
            f"{path}: expected weights without code; found a TorchScript archive that is none of OpenAI's; "
            f"save its state_dict() as safetensors"
        )
    return scripted
