"""Every study from its plan to its page, in seconds on drawn scenes, and what the command line refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fd_scale.errors import RecipeError
from studies import outcome, report, run, settings
from studies.settings import load

COMMANDS = ("diagnostics", "engine")
"""Studies that call the command line, each call a process of its own."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Pieces are shared by all studies here, as they are in earnest."""
    threads = torch.get_num_threads()
    yield tmp_path_factory.mktemp("work")
    torch.set_num_threads(threads)


def smoke(name: str, work: Path, results: Path) -> int:
    return run.main(["--study", name, "--budget", "smoke", "--work", str(work), "--results", str(results)])


@pytest.mark.parametrize("name", [name for name in run.STUDIES if name not in COMMANDS])
def test_a_study_from_plan_to_page(
    name: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert smoke(name, work, tmp_path) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{name}, budget smoke, on cpu: ")
    found = outcome.read(outcome.path_of(name, "smoke", tmp_path))
    assert found.rows
    assert found.contrasts
    for row in found.rows:
        for runs in row.measures.values():
            for entry in (entry for one in runs for entry in one):
                right = sum(a == b for a, b in zip(entry.predictions, found.labels, strict=True))
                assert entry.value == pytest.approx(right / len(found.labels))
    page = outcome.path_of(name, "smoke", tmp_path).with_suffix(".md")
    assert found.question in page.read_text()
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    # The same again finds everything made.
    assert smoke(name, work, tmp_path) == 0
    assert ": 0 pieces to make, 0 images" in capsys.readouterr().out
    again = outcome.read(outcome.path_of(name, "smoke", tmp_path))
    assert [row.measures for row in again.rows] == [row.measures for row in found.rows]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_study_of_whole_commands(name: str, work: Path, tmp_path: Path) -> None:
    assert smoke(name, work, tmp_path) == 0
    found = outcome.read(outcome.path_of(name, "smoke", tmp_path))
    assert all(row.measures for row in found.rows)
    stopped = [
        json.loads(path.read_text())["record"].get("stopped") for path in work.glob("run-*/piece.json")
    ]
    assert all(stopped)


def test_the_same_settings_give_the_same_numbers(work: Path, tmp_path: Path) -> None:
    """Pieces made again from nothing: what is committed can be reproduced."""
    for folder in ("one", "two"):
        assert smoke("position", tmp_path / folder, tmp_path / folder) == 0
    first, second = (
        outcome.read(outcome.path_of("position", "smoke", tmp_path / folder)) for folder in ("one", "two")
    )
    assert [row.measures for row in first.rows] == [row.measures for row in second.rows]


def test_the_list_names_every_study_with_its_cost(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list", "--budget", "smoke", "--work", str(work)]) == 0
    said = capsys.readouterr().out
    for name in run.STUDIES:
        assert load(name, "smoke")[0].question in said
    assert said.count("images/s") == len(run.STUDIES)


def test_the_settings_of_every_budget_are_whole() -> None:
    for name in run.STUDIES:
        for budget in run.BUDGETS:
            study, bench = load(name, budget)
            assert study.question.endswith("?") or name == "alike"
            if budget != "smoke":
                assert len(bench.seeds.distill) >= 2
                assert len(bench.seeds.finetune) >= 3
            for length in (bench.teaching, bench.distilling):
                assert length.images % length.batch == 0


def test_what_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run.main([]) == 2
    assert "--study is not given: one of does_it_help" in capsys.readouterr().err
    assert run.main(["--study", "granularty"]) == 2
    assert "'granularty'; did you mean granularity?" in capsys.readouterr().err
    asked = [
        "--study",
        "position",
        "--budget",
        "smoke",
        "--data",
        str(tmp_path / "none"),
        "--work",
        str(tmp_path),
    ]
    assert run.main(asked) == 2
    assert "does not exist: give CIFAR-10" in capsys.readouterr().err


def test_settings_that_are_wrong_name_file_and_field(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "settings.toml").write_text('question = "?"\npaper = "-"\nvariant = 1\n')
    monkeypatch.setattr(settings, "HERE", tmp_path)
    with pytest.raises(RecipeError, match=r"odd/settings.toml:\n  variant: Extra inputs are not permitted"):
        load("odd", "smoke")
    with pytest.raises(RecipeError, match="--budget 'smok'; did you mean smoke"):
        load("odd", "smok")


def test_the_overview_says_what_was_not_run(tmp_path: Path, work: Path) -> None:
    assert smoke("position", work, tmp_path) == 0
    told = report.overview(["position"], tmp_path)
    assert told.splitlines()[2].endswith("| not run yet | |")
    found = replace(outcome.read(outcome.path_of("position", "smoke", tmp_path)), budget="laptop")
    outcome.write(found, tmp_path)
    told = report.overview(["position"], tmp_path)
    assert f"[laptop](position/results/laptop.md): {report.sentence(found)}" in told
    assert "shared relative over absolute" in told


def test_committed_pages_follow_from_their_results() -> None:
    for name in run.STUDIES:
        for path in (settings.HERE / name / "results").glob("*.json"):
            assert path.with_suffix(".md").read_text() == report.markdown(outcome.read(path))
    written = report.OVERVIEW.read_text()
    assert report.overview(run.STUDIES) in written
