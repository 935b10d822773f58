"""Which ``_target_`` may be built under which node of the config; decided before any import.

Shipped code is allowed by node and must be a class or function defined in this package. A user's
package is allowed by the person who starts the run (``--allow-code PKG``, ``MTL_ALLOW_CODE``, or an
installed package's entry point in the group ``mtl_cli.code``), never by a file or a checkpoint.
"""

from __future__ import annotations

import functools
import os
import sys
from importlib.metadata import entry_points

from mtl_cli.errors import SafetyError
from mtl_cli.signature import signature

ENVIRONMENT = "MTL_ALLOW_CODE"
NEVER = frozenset(sys.stdlib_module_names) | {"torch", "torchvision", "numpy", "hydra", "omegaconf"}
NODES: dict[str, tuple[str, ...]] = {
    "backbone": ("mtl_cli.backbones.", "mtl_cli.sharing."),
    "data": ("mtl_cli.data.",),
    "heads": ("mtl_cli.heads.",),
    "losses": ("mtl_cli.losses.",),
    "weighting": ("mtl_cli.weighting.",),
    "schedule": ("mtl_cli.schedule.",),
    "optimizer": ("torch.optim.", "mtl_cli.optimizers."),
    "lr": ("mtl_cli.lr.",),
    "augment": ("mtl_cli.data.", "mtl_cli.augment."),
    "logger": ("mtl_cli.loggers.",),
}


def refuse(node: str, target: object) -> str | None:
    """Say why ``target`` must not be built under ``node``, or None if it may.

    Args:
        node: dotted place in the config, e.g. ``heads.age``.
        target: what stands in its ``_target_``.
    """
    where = f"{node}._target_"
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")):
        return f"{where}: not the dotted name of a class (found {target!r})"
    prefixes = NODES.get(node.split(".")[0])
    if prefixes is None:
        declared = ", ".join(NODES)
        return f"{where}: nothing is built here (found {target}, expected under: {declared})"
    if any(part.startswith("_") for part in target.split(".")):
        return f"{where}: private names are not built (found {target})"
    if _is_users(target) or any(_is_ours(target, prefix) for prefix in prefixes):
        return None
    package = target.split(".")[0]
    if package == "mtl_cli":
        return f"{where}: no such class (found {target}, expected one in {' or '.join(p.rstrip('.') for p in prefixes)})"
    refusal = (
        f"{where}: code outside mtl_cli is not allowed (found {target}, expected {prefixes[0]}*)"
    )
    if package in NEVER:
        return refusal
    return f"{refusal}; if you trust it, add --allow-code {package}"


def allowed_packages() -> set[str]:
    """Packages that the person who started this process allows."""
    typed = os.environ.get(ENVIRONMENT, "").replace(",", " ").split()
    return {*typed, *_installed()} - NEVER


def allow(packages: str) -> None:
    """Allow packages for this process and its children (ranks, data workers).

    Raises:
        SafetyError: a package of Python or torch itself, whose functions reach files and shells.
    """
    typed = {name.strip() for name in packages.split(",")}
    if wrong := sorted(typed & NEVER):
        raise SafetyError(f"--allow-code: {wrong[0]} is not a package of yours; name your own")
    names = {*os.environ.get(ENVIRONMENT, "").split(","), *typed}
    os.environ[ENVIRONMENT] = ",".join(sorted(filter(None, map(str.strip, names))))


def _is_users(target: str) -> bool:
    return any(target.startswith(f"{package}.") for package in allowed_packages())


def _is_ours(target: str, prefix: str) -> bool:
    """Whether the target lies under the prefix and is defined in that same distribution."""
    if not target.startswith(prefix):
        return False
    if prefix == "torch.optim.":
        return target.count(".") == 2 and target.rpartition(".")[2][0].isupper()
    found = signature(target)
    return found is not None and found.module.startswith("mtl_cli.")


@functools.cache
def _installed() -> frozenset[str]:
    points = entry_points(group="mtl_cli.code")
    return frozenset(point.value.partition(":")[0].split(".")[0] for point in points)
