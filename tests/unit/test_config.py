"""The composed tree as a whole: what is accepted, what is found, how it is said."""

from __future__ import annotations

import copy
import re
import sys

import pytest
from omegaconf import OmegaConf

from mtl_cli import allow
from mtl_cli.compose import Composer
from mtl_cli.config import (
    REDACTED,
    Unsafe,
    check,
    conf_dir,
    option_schema,
    raise_all,
    shipped_schemas,
    to_text,
)
from mtl_cli.errors import ConfigError, SafetyError
from mtl_cli.launch import prepare
from mtl_cli.metric_names import DEFAULT_HEAD, DEFAULT_LOSS, DEFAULT_METRICS, METRICS
from mtl_cli.overrides import parse
from mtl_cli.schema import ARGUMENTS, INJECTED, RANGES
from mtl_cli.signature import MISSING, fits, signature

GROUPS = {
    "backbone": "backbone",
    "data": "data",
    "head": "heads",
    "loss": "losses",
    "weighting": "weighting",
    "schedule": "schedule",
    "lr": "lr",
    "augment": "augment",
}
OPTIONS = [
    (group, path.stem)
    for group in GROUPS
    for path in sorted((conf_dir() / group).glob("*.yaml"))
    if path.stem != "common"
]


def config(*argv: str):
    """The prepared config and its problems."""
    command = parse(argv)
    return prepare(Composer(command.config_dirs), command)


def problems(*argv: str) -> list[str]:
    return config(*argv)[1]


@pytest.fixture(scope="module")
def sound():
    """A config without a problem."""
    cfg, found = config()
    assert not found
    return cfg


@pytest.fixture
def user(tmp_path):
    """A directory of the user's own config files."""

    def write(**files: str) -> str:
        for name, text in files.items():
            path = tmp_path / (name.replace("__", "/") + ".yaml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return str(tmp_path)

    return write


def test_default_config_is_in_order():
    cfg, found = config()
    assert found == []
    assert cfg.task.name == "synthetic"
    assert "hydra" not in cfg


@pytest.mark.parametrize("group", ["task", "weighting", "schedule", "backbone", "lr", "precision"])
def test_every_option_composes(group):
    composer = Composer()
    for option in composer.options(group):
        extra = ["schedule.stages.pretrain.task=type_color"] if option == "pretrain" else []
        if group == "weighting" and "???" in map(str, composer.schema(group, option).values()):
            continue  # needs a value of the user's
        command = parse([f"{group}={option}", *extra])
        cfg, found = prepare(composer, command)
        assert found == [], f"{group}={option}"
        assert check(cfg) == [], "the saved config alone must pass too"


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_yaml_says_what_the_class_takes(group, option):
    schema = option_schema((conf_dir(),), group, option)
    shape = signature(schema.pop("_target_"))
    assert shape is not None
    taken = set(shape.parameters) - INJECTED.get(GROUPS[group], frozenset())
    common = option_schema((conf_dir(),), "data", "common") if group == "data" else {}
    assert taken - set(schema) == set(), "arguments that the YAML does not name"
    assert set(schema) - taken - set(common) == set(), "keys that the class does not take"
    for name in taken & set(schema):
        default, value = shape.parameters[name].default, schema[name]
        if not str(value).startswith(("???", "${")) and shape.parameters[name].annotation:
            annotation = shape.parameters[name].annotation
            assert fits(value, annotation) or value is None, f"{name}: {value} is no {annotation}"
        if (
            isinstance(default, (int, float, str))
            and group != "schedule"
            and default is not MISSING
        ):
            assert value == default, f"{name}: YAML {value}, class {default}"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["+foo=1"], ["unknown key 'foo'"]),
        (
            ["+optimizer.momentm=1", "optimizer=sgd"],
            ["unknown key 'optimizer.momentm'", "momentum"],
        ),
        (["epochs=abc"], ["epochs: wrong type (found 'abc', expected whole number)"]),
        (["epochs=1.5"], ["epochs: wrong type"]),
        (["epochs=0"], ["epochs: out of range (found 0, expected >= 1)"]),
        (["optimizer.lr=fast"], ["optimizer.lr: wrong type (found 'fast', expected number)"]),
        (["optimizer.lr=-1"], ["optimizer.lr: out of range (found -1, expected > 0)"]),
        (["optimizer.betas=0.9"], ["optimizer.betas: wrong type"]),
        (["lr.warmup=true"], ["lr.warmup: wrong type (found True, expected number)"]),
        (["data.fraction=2"], ["data.fraction: out of range"]),
        (["data.batch_size=0"], ["data.batch_size: out of range"]),
        (["on_nonfinite=ignore"], ["on_nonfinite: out of range", "skip | stop"]),
        (["precision.dtype=fp8"], ["precision.dtype: out of range"]),
        (["freeze=backbone"], ["freeze: wrong type (found 'backbone', expected list of text)"]),
        (["seed=${epochs}", "epochs=${seed}"], ["cannot be resolved"]),
        (["run_name=${oc.env:MTL_NO_SUCH_VARIABLE}"], ["run_name: cannot be resolved"]),
        (["schedule=pretrain"], ["schedule.stages.pretrain.task: needs a value"]),
        (["losses.size=bce"], ["losses.size: BCE does not fit a regression output"]),
        (["task.metrics.size=[accuracy]"], ["no metric 'accuracy' for a regression output", "mae"]),
        (["task.metrics.size=mae"], ["task.metrics.size: not a list"]),
        (["task.outputs.size.kind=regresion"], ["not a kind", "did you mean 'regression'?"]),
        (["~losses.size"], ["output 'size' has no loss; add losses.size=NAME"]),
        (["+task.outputs.weight={kind: regression}"], ["output 'weight' has no head"]),
        (["only=sise"], ["only: task 'synthetic' has no 'sise'", "did you mean 'size'?"]),
    ],
)
def test_a_problem_is_found(argv, parts):
    text = "\n".join(problems(*argv))
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("data.margin", "big", "data.margin: wrong type (found 'big', expected number)"),
        ("data.margin", None, "data.margin: wrong type"),
        ("data.margin", 2, "data.margin: out of range"),
        ("data.image_size", [32, 48], "data.image_size: wrong type"),
        ("data.drop_last", "nope", "wrong type (found 'nope', expected true or false)"),
        ("data.resize", "stretch", "data.resize: out of range (found stretch, expected crop | pad"),
        ("optimizer.betas", [0.9], "optimizer.betas: wrong type (found [0.9], expected list of 2"),
        ("optimizer.betas", [0.9, 1.5], "optimizer.betas: out of range"),
        ("optimizer.eps", -1, "optimizer.eps: out of range (found -1, expected > 0)"),
        ("optimizer", None, "optimizer: wrong type (found null, expected a mapping of keys)"),
        ("backbone.width", -3, "backbone.width: out of range (found -3, expected >= 1)"),
        ("augment.flip", 1.5, "augment.flip: out of range"),
        ("data.separator", "xx", "data.separator: out of range (found xx, expected auto or one"),
        ("device", "meta", "device: out of range (found meta, expected auto | cpu | cuda"),
        ("device", "cuda:1", ""),
        ("task.name", 123, "task.name: wrong type (found 123, expected text)"),
        ("ema", None, "ema: wrong type (found null, expected a mapping of keys)"),
        ("ema", 0.9, "ema: wrong type (found 0.9"),
        ("ema.dekay", 0.5, "unknown key 'ema.dekay'; did you mean 'decay'?"),
        ("weighting.update_every", 0, "weighting.update_every: out of range"),
        ("unfreeze_at", {"backbone": 100}, "unfreeze_at.backbone: never acts (found epoch 100"),
        ("unfreeze_at", {"backbone": 9}, ""),
        ("unfreeze_at", {"backbone": 100, "backbone.layer4": 2}, ""),
    ],
)
def test_a_wrong_value_is_found(key, value, part, sound):
    cfg = copy.deepcopy(sound)
    OmegaConf.update(cfg, key, value, force_add=True, merge=False)
    aside = ("unknown key 'weighting", "unknown key 'data.separator")  # keys of other options
    found = [text for text in check(cfg) if not text.startswith(aside)]
    assert part in "\n".join(found)
    assert bool(found) == bool(part)


@pytest.mark.parametrize(
    "key",
    [
        "epochs",
        "seed",
        "freeze",
        "ema",
        "ema.decay",
        "lr",
        "weighting",
        "augment",
        "precision",
        "optimizer.lr",
        "optimizer.weight_decay",
        "data.batch_size",
        "task.name",
    ],
)
def test_a_key_that_is_gone_is_missed(key, sound):
    cfg = copy.deepcopy(sound)
    node, _, name = key.rpartition(".")
    del (OmegaConf.select(cfg, node) if node else cfg)[name]
    assert check(cfg) == [f"missing key '{key}' (every run has it); take out ~{key}"]


@pytest.fixture(scope="module")
def staged():
    """A config of two stages without a problem."""
    cfg, found = config("schedule=transfer")
    assert not found
    return cfg


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("epochs", "two", "schedule.stages.probe.epochs: wrong type (found 'two', expected whole"),
        ("epochs", 0, "schedule.stages.probe.epochs: out of range (found 0, expected >= 1)"),
        ("lr", "fast", "schedule.stages.probe.lr: wrong type"),
        ("lr", -1, "schedule.stages.probe.lr: out of range (found -1, expected > 0)"),
        ("freeze", "backbone", "schedule.stages.probe.freeze: wrong type (found 'backbone'"),
        ("only", "nosuch", "schedule.stages.probe.only: the task has no 'nosuch' (has shape,"),
        ("only", ["size", "shap"], "did you mean 'shape'?"),
        ("only", ["size"], ""),
        ("unfreeze_at", {"heads": 10}, "schedule.stages.probe.unfreeze_at.heads: never acts"),
        ("unfreeze_at", {"backbone": 1}, "'backbone' is in freeze"),
    ],
)
def test_a_wrong_value_of_a_stage_is_found(key, value, part, staged):
    cfg = copy.deepcopy(staged)
    cfg.schedule.stages.probe[key] = value
    found = check(cfg)
    assert part in "\n".join(found)
    assert bool(found) == bool(part)


def test_a_rule_of_the_run_may_act_in_one_stage_only(staged):
    cfg = copy.deepcopy(staged)
    cfg.unfreeze_at = {"backbone": 1}  # frozen in the probe, not in the fine-tuning
    assert check(cfg) == []
    cfg.schedule.stages.finetune.epochs = 1
    assert "unfreeze_at.backbone: never acts" in check(cfg)[0]


def test_look_ahead_needs_momentum():
    (found,) = problems("optimizer=sgd", "optimizer.momentum=0")
    assert found.startswith("optimizer.nesterov: needs momentum (found optimizer.momentum=0")
    assert problems("optimizer=sgd", "optimizer.momentum=0", "optimizer.nesterov=false") == []


def test_a_value_outside_a_strategys_range():
    assert problems("weighting=cagrad", "weighting.c=-1") == [
        "weighting.c: out of range (found -1, expected >= 0 and < 1)"
    ]


SAID = {
    r"(?:^ |, )(> 0|>= 0|>= 1)(?:[,; ]|$)": "{}",
    r"\[0, 1\)": ">= 0 and < 1",
    r"\(0, 1\]": "> 0 and <= 1",
    r"\[0, 1\]|0\.\.1(?:[,; ]|$)": ">= 0 and <= 1",
}


@pytest.mark.parametrize("group", ["weighting", "lr", "augment", "optimizer"])
def test_ranges_are_what_the_comments_say(group):
    """Every range that an option's YAML states is checked."""
    for path in sorted((conf_dir() / group).glob("*.yaml")):
        target = option_schema((conf_dir(),), group, path.stem)["_target_"].rpartition(".")[2]
        for line in path.read_text().splitlines():
            found = re.match(r"(\w+): +[^{#\[]+#(.*)", line)
            if found is None:
                continue
            key, comment = found.groups()
            said = [
                limits.format(*hit.groups())
                for text, limits in SAID.items()
                if (hit := re.search(text, comment))
            ]
            checked = RANGES.get(f"{target}.{key}", RANGES.get(f"{group}.{key}"))
            assert not said or checked in said, f"{path.name}: {key}: {comment}"


def test_every_range_is_of_a_parameter():
    shapes = [
        signature(str(target))
        for group in ("weighting", "lr", "augment")
        for target in shipped_schemas(group)
    ]
    known = {f"{shape.name}.{name}" for shape in shapes for name in shape.parameters}
    assert set(" ".join(ARGUMENTS.values()).split()) - known == set()


def test_a_value_that_is_still_missing_is_no_unknown_key():
    """Explaining one override must not blame another, whose key is ??? in the YAML."""
    stage = ["schedule=pretrain", "schedule.stages.pretrain.task=synthetic"]
    cfg, found = config("task=type_color", *stage, "lr_mult.heads.type=2")
    assert found == []
    assert cfg.lr_mult == {"heads.type": 2}


def test_rules_of_a_stage_may_name_any_part():
    cfg, found = config("schedule=transfer", "schedule.stages.finetune.lr_mult.heads.size=2")
    assert found == []
    assert cfg.schedule.stages.finetune.lr_mult == {"backbone": 0.1, "heads.size": 2}


def test_keys_of_an_experiment_without_its_package(user):
    place = user(experiment__mine="epochs: 3\n")
    (found,) = problems("experiment=mine", "--config-dir", place)
    assert found.startswith("experiment=mine: its keys have no effect")
    assert "# @package _global_" in found


def test_all_problems_at_once():
    found = problems("weightin=a", "epochs=x", "data.fraction=7", "losses.size=bce", "task=nope")
    text = "\n".join(found)
    for part in ("weightin", "epochs: wrong", "data.fraction", "losses.size: BCE", "no 'nope'"):
        assert part in text
    assert len(found) == len(set(found)) == 5


def test_typo_in_an_experiment_is_found_and_its_file_named(user):
    place = user(
        experiment__mine="# @package _global_\nepochs: 3\noptimizer: {lrr: 1}\nweigting: {a: 1}\n"
    )
    text = "\n".join(problems("experiment=mine", "--config-dir", place))
    assert "experiment/mine.yaml: unknown key 'optimizer.lrr'; did you mean 'lr'?" in text
    assert "experiment/mine.yaml: unknown key 'weigting'; did you mean 'weighting'?" in text


def test_component_with_a_required_argument_missing(user):
    place = user(lr__mine="_target_: mtl_cli.schedule.transfer.Transfer\n")
    assert "expected one in mtl_cli.lr" in "\n".join(problems("lr=mine", "--config-dir", place))
    place = user(schedule__mine="_target_: mtl_cli.schedule.transfer.Transfer\n")
    text = "\n".join(problems("schedule=mine", "--config-dir", place))
    assert "Transfer needs 'stages'" in text


def test_yaml_syntax_names_line_and_column(user):
    place = user(optimizer__broken="_target_: torch.optim.AdamW\nlr: [1\n")
    text = "\n".join(problems("optimizer=broken", "--config-dir", place))
    assert "optimizer/broken.yaml:3:1" in text


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.open",
        "subprocess.run",
        "torch.load",
        "torch.hub.load",
        "torch.optim.adamw.torch.load",
        "torch.save",
        "numpy.load",
        "pathlib.Path",
        "mtl_cli.heads.os.system",
        "mtl_cli.heads.torch.load",
        "mtl_cli.checkpoint.save",
        "mtl_cli.heads.__import__",
        "mtl_cli.heads.importlib.import_module",
        "evil.Head",
        "..os.system",
        "mtl_cli.heads",
    ],
)
@pytest.mark.parametrize("node", ["heads.size", "optimizer", "weighting", "ema", "task", "data"])
def test_hostile_target_is_refused_before_import(target, node, sound):
    before = set(sys.modules)
    cfg = copy.deepcopy(sound)
    OmegaConf.update(cfg, f"{node}._target_", target, force_add=True)
    found = check(cfg)
    assert found
    assert "evil" not in set(sys.modules) - before
    with pytest.raises((SafetyError, ConfigError)) as caught:
        raise_all(found)
    if not target.startswith("mtl_cli."):
        assert caught.value.exit_code == 9


def test_hostile_target_from_the_command_line():
    with pytest.raises(SafetyError):
        raise_all(problems("++weighting._target_=os.system"))


def test_target_hidden_below_a_component_is_refused():
    found = problems("+augment.extra={a: {_target_: os.system, command: ls}}")
    assert any(isinstance(problem, Unsafe) for problem in found)


def test_users_code_needs_the_users_word(monkeypatch, tmp_path):
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "my_pkg" / "heads.py").write_text(
        "class Deep:\n    kinds = ('regression',)\n"
        "    def __init__(self, channels, task, depth: int = 2):\n        pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    chosen = ["++heads.size={_target_: my_pkg.heads.Deep, depth: 3}"]
    assert "--allow-code my_pkg" in problems(*chosen)[0]
    monkeypatch.setenv(allow.ENVIRONMENT, "my_pkg")
    assert problems(*chosen) == []
    assert "unknown key 'heads.size.dept'; did you mean 'depth'?" in problems(
        "++heads.size={_target_: my_pkg.heads.Deep, dept: 3}"
    )
    wrong = problems("++heads.shape={_target_: my_pkg.heads.Deep, depth: deep}")
    assert any("does not fit a multiclass output" in text for text in wrong)
    assert any("heads.shape.depth: wrong type" in text for text in wrong)
    assert "my_pkg" not in sys.modules


def test_python_itself_is_never_allowed():
    with pytest.raises(SafetyError, match="not a package of yours"):
        allow.allow("os")


@pytest.mark.parametrize(
    "text",
    [
        "hydra: {callbacks: {x: {_target_: builtins.open, file: pwned, mode: w}}}",
        "hydra: {launcher: {_target_: os.system}}",
        "hydra: {sweeper: {params: {a: 1}}}",
        "hydra: {job_logging: {handlers: {x: {(): builtins.open, file: pwned, mode: w}}}}",
    ],
)
def test_hydra_nodes_from_a_file_are_refused(user, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = user(experiment__mine=f"# @package _global_\n{text}\n")
    found = problems("experiment=mine", "--config-dir", place)
    assert any(isinstance(problem, Unsafe) for problem in found)
    assert not (tmp_path / "pwned").exists()


def test_hydra_nodes_from_the_shell_are_allowed():
    assert problems("hydra.sweeper.max_batch_size=2") == []


def test_only_prunes_everything_that_hangs_on_an_output():
    cfg, found = config("only=[size]")
    assert found == []
    for node in (cfg.task.outputs, cfg.task.metrics, cfg.heads, cfg.losses):
        assert list(node) == ["size"]


def test_rules_are_flat_names():
    cfg, found = config("lr_mult.backbone=0.1", "lr_mult.heads.size=2")
    assert found == []
    assert dict(cfg.lr_mult) == {"backbone": 0.1, "heads.size": 2}


def test_a_stage_brings_its_own_task():
    cfg, found = config(
        "task=type_color",
        "schedule=pretrain",
        "schedule.stages.pretrain.task=synthetic",
        "data.batch_size=16",
    )
    assert found == []
    resolved = cfg.schedule.stages.pretrain.resolved
    assert resolved.task.name == "synthetic"
    assert set(resolved.heads) == set(resolved.losses) == set(resolved.task.outputs)
    assert resolved.data.batch_size == 16
    text = problems("schedule=pretrain", "schedule.stages.pretrain.task=sintetic")
    assert any("no 'sintetic' in group 'task'" in line for line in text)


def test_unknown_key_of_a_stage():
    found = problems("schedule=transfer", "+schedule.stages.probe.epoch=3")
    assert "unknown key 'schedule.stages.probe.epoch'; did you mean 'epochs'?" in found


def test_text_keeps_the_environment_and_hides_secrets(monkeypatch):
    monkeypatch.setenv("MTL_SECRET_PLACE", "/very/private")
    cfg = OmegaConf.create(
        {
            "a": 1,
            "b": "${a}",
            "root": "${oc.env:MTL_SECRET_PLACE}",
            "logger": {"api_key": "abc", "token": "${oc.env:MTL_SECRET_PLACE}"},
        }
    )
    text = to_text(cfg)
    assert "private" not in text
    assert "abc" not in text
    again = OmegaConf.create(text)
    assert again.b == 1
    assert again.logger == {"api_key": REDACTED, "token": REDACTED}
    assert again.root == "/very/private"


def test_defaults_by_kind_name_options_that_exist():
    composer = Composer()
    for kind in METRICS:
        assert DEFAULT_HEAD[kind] in composer.options("head")
        assert DEFAULT_LOSS[kind] in composer.options("loss")
        assert set(DEFAULT_METRICS[kind]) <= set(METRICS[kind])
        loss = signature(composer.schema("loss", DEFAULT_LOSS[kind])["_target_"])
        assert kind in loss.attributes["kinds"]


def test_shipped_schemas_include_what_options_are_based_on():
    assert "split_seed" in shipped_schemas("data")["mtl_cli.data.synthetic.Synthetic"]
