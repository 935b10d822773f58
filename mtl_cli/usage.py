"""Help texts, built from the tree itself; no torch."""

from __future__ import annotations

from mtl_cli.compose import Composer
from mtl_cli.config import ROOT_CONFIG, read_yaml
from mtl_cli.overrides import Command

COMMANDS: dict[str, str] = {
    "train": "train from config files: mtl train task=utkface weighting=uncertainty",
    "eval": "metrics of a run or checkpoint: mtl eval RUN --split test",
    "predict": "apply a run to images: mtl predict RUN photos/ --out predictions.csv",
    "compare": "runs and sweeps in one table: mtl compare multirun/TASK/STAMP",
    "data": "list, prepare, inspect and check data: mtl data ls",
    "conf": "list, show, copy and check config files: mtl conf ls weighting",
    "doctor": "does this machine do what training needs?",
    "completion": 'shell completion: eval "$(mtl completion bash)"',
    "version": "versions of mtl, torch and Python",
}

TRAIN = """\
usage: mtl train [option ...] [key=value ...]

options:
  -m, --multirun     run every combination of comma lists: mtl train -m seed=1,2 weighting=a,b
  --list             print one shell line per job instead of running them
  --dry-run          build everything, print the parameter table, train nothing
  --config-dir DIR   more config files, searched first (may be repeated)
  --allow-code PKG   allow _target_: PKG.* in config files (may be repeated)
  --cfg job          print the composed config and stop; -p NODE for a part, --resolve
  --info [WHAT]      what Hydra knows: defaults, defaults-tree, searchpath, plugins, config
  --debug            show tracebacks
  -h, --help         this text

overrides:
  task=utkface                     choose an option of a group
  task=./products.yaml             a task of your own in one file
  heads.age=mlp losses.age=l1      choose the head and the loss of one output
  optimizer.lr=3e-4                set a value
  resume=RUN | auto | SWEEP        continue; init_from=RUN starts from its weights
"""


def overview() -> str:
    """Text of ``mtl --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mtl COMMAND [...]",
            "",
            "Train multi-task deep networks from config files. First run: mtl train",
            "",
            *lines,
            "",
            "mtl COMMAND --help says more. --debug shows tracebacks.",
            "",
        ]
    )


def train_help(composer: Composer, command: Command) -> str:
    """Text of ``mtl train --help``: options, groups with their choices, keys with defaults."""
    lines = ["", "groups:"]
    for group in composer.groups():
        options = ", ".join(composer.options(group))
        lines.append(f"  {group:<11} {options}")
    lines += ["", "keys:"]
    for key, value in read_yaml(composer.home / f"{ROOT_CONFIG}.yaml").items():
        if key not in {"defaults", "hydra"}:
            shown = "null" if value is None else str(value).replace("None", "null")
            lines.append(f"  {key}={shown}")
    shown = " ".join(["mtl conf show", *command.overrides])
    lines += ["", f"the whole tree: {shown}", ""]
    return TRAIN + "\n".join(lines)
