"""The entry points and the public API of this software's packages, under a name of its own.

If another package on PYTHONPATH or in the working directory hides one of them, an error names it.
"""

import sys
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def _check() -> None:
    for package in ("cache_tools", "pipeline", "mcm"):
        ours, spec = Path(__file__).resolve().with_name(package), find_spec(package)
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found != ours / "__init__.py":
            advice = "rename the latter, or remove its folder from PYTHONPATH"
            raise ImportError(f"package {package}: expected {ours}; found {found}; {advice}")


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        _check()
        for package in map(import_module, ("cache_tools", "mcm")):
            if name in package.__all__:
                return getattr(package, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _run(module: str) -> None:
    try:
        _check()
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    import_module(module).app()


mcm_cache, mcm_train = partial(_run, "pipeline.cli"), partial(_run, "mcm.cli")
