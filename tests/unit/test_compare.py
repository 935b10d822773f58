"""``mtl compare``: grouping, spread, gain over single-task runs, failures, formats."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mtl_cli.commands.compare import as_text, cells, run
from mtl_cli.comparison import compare, delta_m, find_runs
from mtl_cli.errors import ConfigError, DataError

DIRECTIONS = {"age": {"mae": "min"}, "race": {"accuracy": "max", "f1": "max"}}
OPTIONS = {
    "equal": {"_target_": "mtl_cli.weighting.loss_level.Equal"},
    "uncertainty": {"_target_": "mtl_cli.weighting.loss_level.Uncertainty", "form": "auto"},
}


def write_run(root, name, *overrides, metrics=None, state="finished", reason="", **config):
    """A run directory as training leaves it; ``config`` overwrites single keys."""
    path = root / name
    path.mkdir(parents=True)
    given = dict(o.split("=", 1) for o in overrides)
    seed, only = int(given.get("seed", 0)), given.get("only")
    outputs = {t: {} for t in DIRECTIONS if only in (None, t)}
    tree = {
        "epochs": 10,
        "seed": seed,
        "only": only,
        "run_name": name,
        "task": {"name": "faces", "outputs": outputs},
        "heads": {t: {"_target_": "mtl_cli.heads.Linear"} for t in outputs},
        "weighting": OPTIONS[given.get("weighting", "equal")],
        "optimizer": {"lr": float(given.get("optimizer.lr", 1e-3))},
        **config,
    }
    (path / "config.yaml").write_text(yaml.safe_dump(tree))
    (path / "overrides.txt").write_text("\n".join(overrides))
    status = {"state": state, "reason": reason, "exit_code": 0 if state == "finished" else 3}
    (path / "status.json").write_text(json.dumps(status))
    if metrics is not None:
        best = {"step": 1, "epoch": 1, "score": 0.1, "metrics": metrics}
        summary = {
            "task": "faces",
            "run": str(path),
            "state": state,
            "overrides": list(overrides),
            "best": best,
            "directions": {t: DIRECTIONS[t] for t in metrics},
            "units": {t: {"mae": "years"} if t == "age" else {} for t in metrics},
            "train_seconds": 100.0,
            "seed": seed,
        }
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def both(mae, accuracy, f1=0.5):
    return {"age": {"mae": mae}, "race": {"accuracy": accuracy, "f1": f1}}


@pytest.fixture
def sweep(tmp_path):
    """Two strategies, two seeds each, the single-task runs, one failure."""
    for seed, shift in ((1, 0.0), (2, 0.2)):
        write_run(tmp_path, f"e{seed}", f"seed={seed}", metrics=both(6.0 + shift, 0.7))
        u = [f"seed={seed}", "weighting=uncertainty"]
        write_run(tmp_path, f"u{seed}", *u, metrics=both(5.4 + shift, 0.8))
    write_run(tmp_path, "a", "only=age", metrics={"age": {"mae": 6.0}})
    race = {"race": {"accuracy": 0.8, "f1": 0.5}}
    write_run(tmp_path, "r", "only=race", metrics=race)
    failed = ["seed=3", "weighting=uncertainty"]
    write_run(tmp_path, "u3", *failed, state="failed", reason="a\nrace is nan [at 7]")
    return tmp_path


def printed(*args):
    lines = []
    status = run([str(a) for a in args], lines.append)
    assert status == 0
    return [" ".join(line.split()) for line in "\n".join(lines).splitlines()]


def test_groups_by_what_varies_with_mean_and_spread(sweep):
    lines = printed(sweep)
    assert lines[0] == "task faces: 7 runs, best.pt on the validation split"
    header = "weighting only runs age mae (years) race accuracy race f1 delta-m % time"
    assert lines[1] == header
    assert lines[4] == "equal age 1 6 - - - 1m40s"
    assert lines[2] == "equal - 2 6.1 \u00b1 0.14 0.7 \u00b1 0 0.5 \u00b1 0* -3.96 \u00b1 1.2 1m40s"
    assert lines[3] == (
        "uncertainty - 2/3 5.5 \u00b1 0.14* 0.8 \u00b1 0* 0.5 \u00b1 0* +4.17 \u00b1 1.2 1m40s"
    )


def test_best_mean_is_marked_by_its_direction(sweep):
    comparison = compare("faces", find_runs([str(sweep)]))
    assert comparison.best(("age", "mae")) == pytest.approx(5.5)
    assert comparison.best(("race", "accuracy")) == pytest.approx(0.8)
    header, rows = cells(comparison)
    column = header.index("age mae (years)")
    assert [row[column].endswith("*") for row in rows].count(True) == 1


def test_delta_m_against_the_single_task_runs(sweep):
    comparison = compare("faces", find_runs([str(sweep)]))
    by_name = {group.label: group for group in comparison.groups}
    uncertainty = next(g for label, g in by_name.items() if "uncertainty" in label)
    # seed 1: age (6 - 5.4) / 6 = 10 %, race (0 + 0) / 2 = 0 -> 5 %; seed 2: 6.67 % -> 3.33 %
    assert sorted(uncertainty.delta_m) == pytest.approx([10 / 3, 5.0])
    single = next(g for label, g in by_name.items() if "age" in label)
    assert single.delta_m == []
    assert any("higher is better" in line for line in as_text([comparison]))


def test_no_single_task_runs_no_guess(tmp_path):
    write_run(tmp_path, "x", metrics=both(6.0, 0.7))
    lines = printed(tmp_path)
    assert lines[2].split()[-2:] == ["-", "1m40s"]
    assert not any("higher is better" in line for line in lines)


def test_single_task_runs_with_other_settings_are_no_reference(tmp_path):
    write_run(tmp_path, "x", metrics=both(6.0, 0.7))
    write_run(tmp_path, "a", "only=age", metrics={"age": {"mae": 6.0}})
    race = {"race": {"accuracy": 0.8, "f1": 0.5}}
    write_run(tmp_path, "r", "only=race", "optimizer.lr=0.1", metrics=race)
    comparison = compare("faces", find_runs([str(tmp_path)]))
    assert all(not group.delta_m for group in comparison.groups)
    assert "no single-task run of race has the same other settings" in comparison.notes[1]


@pytest.mark.parametrize(
    ("metrics", "reference", "expected"),
    [
        (both(5.0, 0.8), both(5.0, 0.8), 0.0),
        (both(4.5, 0.88, 0.55), both(5.0, 0.8), 10.0),
        (both(5.0, 0.88, 0.5), both(5.0, 0.8), 2.5),
        (both(5.0, 0.8), {"age": {"mae": 5.0}}, None),
        (both(5.0, None, None), both(5.0, 0.8), None),
        (both(5.0, 0.8), both(0.0, 0.8), None),
    ],
)
def test_delta_m_by_hand(metrics, reference, expected):
    directions = {(t, n): d for t, names in DIRECTIONS.items() for n, d in names.items()}
    found = delta_m(metrics, reference, directions)
    assert found == (None if expected is None else pytest.approx(expected))


def test_failed_runs_are_listed_never_dropped(sweep):
    write_run(sweep, "gone", "weighting=uncertainty", "seed=4", state="running")
    lines = printed(sweep)
    assert any(
        line.startswith("failed (exit 3): ") and line.endswith("race is nan [at 7]")
        for line in lines
    )
    assert any(line.startswith("running") and "gone" in line for line in lines)
    assert any(" 2/4 " in f" {line} " for line in lines)


def test_same_setting_by_default_or_by_override_is_one_row(tmp_path):
    write_run(tmp_path, "a", "seed=1", metrics=both(6.0, 0.7))
    write_run(tmp_path, "b", "seed=2", "weighting=equal", metrics=both(6.2, 0.7))
    write_run(tmp_path, "c", "seed=3", "optimizer.lr=1e-3", metrics=both(6.4, 0.7))
    comparison = compare("faces", find_runs([str(tmp_path)]))
    assert [len(group.runs) for group in comparison.groups] == [3]
    assert comparison.columns == []


def test_settings_that_only_the_config_tells_apart_are_not_mixed(tmp_path):
    write_run(tmp_path, "a", "seed=1", metrics=both(6.0, 0.7))
    write_run(tmp_path, "b", "seed=1", metrics=both(5.0, 0.7), epochs=40)
    comparison = compare("faces", find_runs([str(tmp_path)]))
    assert comparison.columns == ["epochs"]
    assert sorted(group.label for group in comparison.groups) == [("10",), ("40",)]


def test_by_pools_and_says_so(sweep):
    write_run(sweep, "e9", "seed=1", "optimizer.lr=0.1", metrics=both(9.0, 0.6))
    lines = printed(sweep, "--by", "weighting")
    assert lines[1].split()[:2] == ["weighting", "only"]
    rows = [line.split()[:3] for line in lines if line.startswith(("equal", "uncertainty"))]
    assert rows == [
        ["equal", "-", "3"],
        ["uncertainty", "-", "2/3"],
        ["equal", "age", "1"],  # never pooled with the joint runs
        ["equal", "race", "1"],
    ]
    assert any("differ in" in line and "optimizer.lr" in line for line in lines)


def test_repeated_and_unequal_seeds_are_said(tmp_path):
    write_run(tmp_path, "a", "seed=1", metrics=both(6.0, 0.7))
    write_run(tmp_path, "b", "seed=1", metrics=both(6.0, 0.7))
    write_run(tmp_path, "c", "seed=2", "weighting=uncertainty", metrics=both(6.0, 0.7))
    notes = compare("faces", find_runs([str(tmp_path)])).notes
    assert "seed 1 more than once in weighting=equal" in notes
    assert any("different seeds" in note for note in notes)


def test_links_are_not_counted_twice(sweep):
    (sweep / "latest").symlink_to(sweep / "e1")
    assert len(find_runs([str(sweep), str(sweep / "latest"), str(sweep / "e1")])) == 7


def test_several_tasks_are_several_tables(tmp_path):
    write_run(tmp_path, "a", metrics=both(6.0, 0.7))
    other = write_run(tmp_path, "b", metrics=both(6.0, 0.7))
    summary = json.loads((other / "summary.json").read_text())
    (other / "summary.json").write_text(json.dumps({**summary, "task": "products"}))
    assert [line for line in printed(tmp_path) if line.startswith("task ")] == [
        "task faces: 1 runs, best.pt on the validation split",
        "task products: 1 runs, best.pt on the validation split",
    ]


def test_damaged_files_are_listed(tmp_path):
    path = write_run(tmp_path, "a", metrics=both(6.0, 0.7))
    (path / "summary.json").write_text('{"task": "faces", "best"')
    (path / "config.yaml").write_text("a: [")
    assert any("no summary" in line and str(path) in line for line in printed(tmp_path))


def test_csv_has_full_precision(sweep):
    rows = list(csv.DictReader(printed(sweep, "--csv")))
    assert len(rows) == 4
    row = next(r for r in rows if r["weighting"] == "uncertainty" and r["only"] == "-")
    assert float(row["age.mae.mean"]) == pytest.approx(5.5)
    assert float(row["age.mae.sd"]) == pytest.approx(0.2 / 2**0.5)
    assert row["finished"] == "2"
    assert row["runs"] == "3"


def test_json_names_the_runs(sweep):
    lines = []
    run([str(sweep), "--json"], lines.append)
    (content,) = json.loads("\n".join(lines))
    assert content["task"] == "faces"
    assert sum(len(row["paths"]) for row in content["rows"]) == 7
    assert {state for row in content["rows"] for state in row["states"]} == {"finished", "failed"}


def test_markdown_is_a_table(sweep):
    lines = printed(sweep, "--md")
    assert lines[2].startswith("| ")
    assert set(lines[3]) == set("|- ")
    assert len({line.count("|") for line in lines[2:8]}) == 1


def test_html_is_one_escaped_page(sweep, tmp_path):
    write_run(sweep, "bad", "seed=9", state="failed", reason="<script>alert(1)</script>")
    page = tmp_path / "page.html"
    printed(sweep, "--html", page)
    text = page.read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "<b>5.5 ± 0.14*</b>" in text


@pytest.mark.parametrize(
    ("args", "raised", "message"),
    [
        ([], ConfigError, "at least one directory"),
        (["x", "--csv", "--md"], ConfigError, "exclude each other"),
        (["x", "--jsn"], ConfigError, "did you mean '--json'"),
        (["x", "--csv=out.csv"], ConfigError, "--csv: takes no value .found 'out.csv'."),
        (["/absent"], DataError, "no such directory"),
    ],
)
def test_bad_command_lines(args, raised, message):
    with pytest.raises(raised, match=message):
        run(args, lambda line: None)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("wieghting", "; did you mean 'weighting'?"),
        ("lr", "; did you mean 'optimizer.lr'?"),
        ("x", ""),
    ],
)
def test_a_key_that_no_run_has_pools_nothing(key, hint, sweep):
    with pytest.raises(ConfigError) as caught:
        run([str(sweep), "--by", f"optimizer,{key}"], lambda line: None)
    assert str(caught.value) == f"compare: --by: no run has '{key}'{hint}"


def test_page_that_cannot_be_written(sweep):
    with pytest.raises(ConfigError, match="cannot write"):
        run([str(sweep), "--html", str(sweep / "absent" / "page.html")], lambda line: None)


def test_directory_without_runs_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="no run in"):
        run([str(tmp_path)], lambda line: None)


def test_needs_no_torch(sweep):
    code = (
        "import sys; from mtl_cli.commands.compare import main; main([sys.argv[1]]);"
        "assert not {'torch', 'omegaconf', 'rich'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(
        [sys.executable, "-c", code, str(sweep)], env=environment, check=True, capture_output=True
    )
