"""`hydratron report` as a user calls it: what it prints, what it writes, what it refuses."""

import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from unittest.mock import MagicMock

import matplotlib.image
import pytest
from rich.console import Console

from hydratron.commands import tracked_report
from hydratron.commands.report import main
from hydratron.report.runs import load_runs
from hydratron.report.watch import progress_line, remaining_seconds, watch_runs
from tests.waiting import PATIENCE


def test_report_prints_the_table_and_names_the_figure_last(ablation, capsys):
    main([str(ablation.root / "sweep")])
    lines = capsys.readouterr().out.splitlines()
    output = ablation.root / "sweep" / "report"
    assert lines[-1] == f"figure: {output / 'loss_curves.png'}"
    assert "8 of 8 jobs ok" in lines
    assert any("2.430 *" in line for line in lines)
    names = {"table.md", "table.csv", "runs.csv", "report.html", "loss_curves.png"}
    assert {path.name for path in output.iterdir()} == names | {"loss_curves.svg"}


def test_report_can_be_made_again_over_itself(ablation, capsys):
    for _ in range(2):
        main([str(ablation.root)])
    assert "8 of 8 jobs ok" in capsys.readouterr().out


def test_report_against_the_seed_prints_its_rows(ablation, tmp_path, capsys):
    main([str(ablation.root), "--against", "seed", "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert re.search(r"Megatron-3.9B.*1\.16", printed)
    for name in ("table.md", "report.html"):
        assert "Megatron-1.3B" in (tmp_path / "out" / name).read_text()


def test_two_commands_get_two_tables_and_figures_of_their_own(ablation, tmp_path, capsys):
    for seed in (1, 2):
        result = {"command": "finetune", "val/accuracy": 0.8, "train/loss": 0.5}
        metrics = "step,train/loss\n1,1.0\n2,0.5\n"
        ablation.run(f"tune/{seed}", {"task": "mnli", "seed": seed}, result=result, metrics=metrics)
    main([str(ablation.root), "--output", str(tmp_path / "out")])
    assert "finetune: median over seeds" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert names == {"pretrain_loss_curves.png", "finetune_loss_curves.png"}


def test_a_partial_sweep_with_failures_is_reported_as_such(ablation, capsys):
    for job, error in {"1": "ValueError: bad <b>value</b>", "6": "killed"}.items():
        path = ablation.root / "sweep" / job / "result.json"
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"status": "failed", "error": error})
        )
    shutil.rmtree(ablation.root / "sweep" / "7")
    main([str(ablation.root)])
    printed = capsys.readouterr().out
    assert "partial: 5 of 8 jobs ok, 2 failed, 1 missing" in printed
    assert "failed: 1 (layernorm=post optimizer.lr=0.003 seed=1): ValueError: bad <b>" in printed
    assert "missing: layernorm=pre optimizer.lr=0.003 seed=2" in printed
    page = (ablation.root / "report" / "report.html").read_text()
    assert "bad &lt;b&gt;value" in page


def test_a_directory_without_runs_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=f"no runs found in {tmp_path}"):
        main([str(tmp_path)])


def test_only_jobs_that_just_started_still_make_a_report(writer, capsys):
    writer.run("a", {"seed": 1})
    main([str(writer.root)])
    assert "partial: 0 of 1 jobs ok, 1 running or killed" in capsys.readouterr().out


def test_a_report_in_wandb_names_no_class_and_no_server_of_the_runs_directory(
    ablation, monkeypatch
):
    hydra = ablation.root / "sweep" / "0" / ".hydra"
    (hydra / "wandb.json").write_text("{}")
    (hydra / "resolved.yaml").write_text(
        "logger: {_target_: os.system, command: touch owned, project: mine, offline: true,"
        " settings: {_target_: os.system, base_url: 'https://elsewhere'}}"
    )
    made = []
    monkeypatch.setattr(tracked_report, "WandbLogger", lambda **k: made.append(k) or MagicMock())
    main([str(ablation.root / "sweep"), "--wandb"])
    (arguments,) = made
    assert (arguments["project"], arguments["offline"]) == ("mine", True)
    assert arguments["settings"] == {"silent": True}
    assert not Path("owned").exists()


@pytest.mark.parametrize("watch", [[], ["--watch"]])
@pytest.mark.parametrize("output", ["file", "file/below", "/proc/x", "/dev/null"])
def test_an_output_that_cannot_be_is_one_line_before_any_waiting(writer, output, watch):
    (writer.root / "file").write_text("mine")
    writer.run("s/0", {"seed": 1})  # one that never ends
    wanted = writer.root / output
    with pytest.raises(ValueError, match=rf"^--output {wanted}: .*$"):
        main([str(writer.root / "s"), "--output", str(wanted), *watch])
    assert (writer.root / "file").read_text() == "mine"
    assert not (writer.root / "s" / "report").exists()


def test_an_output_whose_file_is_a_directory_is_named(ablation):
    (ablation.root / "out" / "table.md").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^--output .*/out: .*/out/table\.md: Is a directory$"):
        main([str(ablation.root), "--output", str(ablation.root / "out")])


def test_runs_that_are_all_unreadable_still_make_a_report(writer, capsys):
    (writer.run("a", {"seed": 1}) / "result.json").write_text("[]")
    main([str(writer.root)])
    printed = capsys.readouterr().out
    assert "partial: 0 of 1 jobs ok, 1 unreadable" in printed
    assert "unreadable: a: result.json is not an object" in printed
    assert "unreadable: a:" in (writer.root / "report" / "table.md").read_text()


@pytest.mark.parametrize("arguments", [[], ["x", "--against", "nobody"], ["x", "--bogus"]])
def test_a_wrong_command_line_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


def test_the_page_needs_nothing_from_outside_and_links_every_run(ablation):
    main([str(ablation.root)])
    output = ablation.root / "report"
    page = (output / "report.html").read_text()
    assert not re.search(r"https?:|<script|<link|@import", page)
    assert "data:image/svg+xml;base64," in page
    links = re.findall(r'href="([^"]+)"', page)
    assert len(links) == 8
    assert all((output / link / "result.json").exists() for link in links)


CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser")) if p), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_real_browser_shows_the_page_and_its_figure(ablation, tmp_path):
    main([str(ablation.root)])
    shot = tmp_path / "page.png"
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update --window-size=1100,1000"
    page = (ablation.root / "report" / "report.html").as_uri()
    command = [str(CHROMIUM), *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run([*command, f"--screenshot={shot}", page], check=True, timeout=PATIENCE)
    image = matplotlib.image.imread(shot)[..., :3]
    assert (image.min(axis=2) < 0.5).mean() > 0.005
    # The figure is the only thing on the page in the colour of a post-LN curve, #D55E00.
    orange = abs(image - [0xD5 / 255, 0x5E / 255, 0]).max(axis=2) < 0.03
    assert orange.sum() > 300


def finish(path: Path) -> None:
    result = {"command": "pretrain", "status": "ok", "duration_s": 10.0, "val/loss": 2.0}
    (path / "result.json").write_text(json.dumps(result))


def test_watch_prints_a_line_per_change_until_the_last_job_ends(writer):
    writer.multirun("s", ["seed=1,2"])
    first = writer.run("s/0", {"seed": 1})
    steps = iter(
        [
            lambda: None,
            lambda: finish(first),
            lambda: finish(writer.run("s/1", {"seed": 2})),
        ]
    )
    console = Console(file=io.StringIO())
    collection = watch_runs([writer.root], console, sleep=lambda _: next(steps)())
    assert collection.complete
    lines = console.file.getvalue().splitlines()
    assert [line.partition(";")[0] for line in lines] == [
        "0 of 2 ended: 0 ok, 0 failed, 1 running, 1 to come",
        "1 of 2 ended: 1 ok, 0 failed, 0 running, 1 to come",
        "2 of 2 ended: 2 ok, 0 failed, 0 running, 0 to come",
    ]


def test_watch_on_a_terminal_shows_the_table_so_far(writer):
    writer.multirun("s", ["seed=1,2"])
    finish(writer.run("s/0", {"seed": 1}))
    running = writer.run("s/1", {"seed": 2})
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    watch_runs([writer.root], console, sleep=lambda _: finish(running))
    shown = console.file.getvalue()
    assert "1 of 2 ended" in shown
    assert "held-out loss" in shown


def test_watch_ends_where_a_job_has_become_unreadable(writer):
    writer.multirun("s", ["seed=1,2"])
    finish(writer.run("s/0", {"seed": 1}))
    broken = writer.run("s/1", {"seed": 2})
    console = Console(file=io.StringIO())
    watch_runs([writer.root], console, sleep=lambda _: (broken / "result.json").write_text("[]"))
    last = console.file.getvalue().splitlines()[-1]
    assert last == "2 of 2 ended: 1 ok, 0 failed, 1 unreadable, 0 running, 0 to come"


def test_expected_end_is_the_work_left_over_the_jobs_running(writer):
    writer.multirun("s", ["seed=1,2,3,4,5"])
    finish(writer.run("s/0", {"seed": 1}))
    for seed in (2, 3):
        writer.run(f"s/{seed}", {"seed": seed})
    collection = load_runs([writer.root])
    started = collection.runs[1].started
    # two of 10 s to come, two running that have 6 s left each, two at a time
    assert remaining_seconds(collection, started + 4) == pytest.approx(16, abs=0.5)
    assert "expected end" in progress_line(collection, started)
