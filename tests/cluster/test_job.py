"""slurm/job.sh on a real Slurm of two nodes: what it starts, what it passes on, what it decides afterwards.

The program is a stand-in (``standin.py``), started in the place of a container, so that an end can be chosen.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.cluster.cluster import NODES, Cluster, Job, wait_until

REPOSITORY = Path(__file__).parents[2]
SMALL = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--gpus-per-node=1")
"""What the command line changes in a template; everything else runs as it is shipped."""

STANDIN = shlex.join([sys.executable, "-S", str(Path(__file__).with_name("standin.py"))])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A place to submit from: it holds slurm/ and nothing else."""
    (tmp_path / "slurm").symlink_to(REPOSITORY / "slurm")
    return tmp_path


def submit(
    cluster: Cluster,
    folder: Path,
    script: str,
    *options: str,
    template: str = "fd_swinv2g",
    words: Sequence[str] = (),
    **environment: str,
) -> Job:
    """``sbatch options template words`` with the stand-in that plays ``script``."""
    environment = {"STANDIN": script, "FD_SCALE_EXEC": STANDIN, **environment}
    return cluster.submit(
        folder, *SMALL, *options, f"slurm/{template}.sbatch", *words, environment=environment
    )


def events(folder: Path, rank: int) -> list[dict]:
    return [json.loads(line) for line in (folder / f"events-{rank}.jsonl").read_text().splitlines()]


def signals(folder: Path, rank: int, start: int = 0) -> list[str]:
    return [e["signal"] for e in events(folder, rank) if e["start"] == start and "signal" in e]


def processes(folder: Path) -> list[psutil.Process]:
    """Those that work in ``folder``."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(folder):
                found.append(process)
    return found


def record(folder: Path) -> list[list[str]]:
    """The lines of the record of starts as words, without the time."""
    (path,) = folder.glob("*.starts")
    return [line.split()[1:] for line in path.read_text().splitlines()]


def test_a_template_starts_one_rank_per_task_and_passes_every_word(cluster: Cluster, folder: Path) -> None:
    site = "data.shards='/data/two words' view.crop_scale=(0.2,1.0) seed=$HOME"
    words = ["--set", "seed=3", "--set", "teacher.weights=a file.pth"]
    own = {"FD_SCALE_SET": site, "FD_SCALE_PYTHON": "/opt/python", "RANK": "0"}
    job = submit(cluster, folder, "done", "--hold", words=words, **own)
    port = 20_000 + int(job.number) * 101 % 12_000
    with socket.create_server((NODES[0], port)):  # as another job on this node might have it
        cluster.command("scontrol", "release", job.number)
        assert job.wait_for("COMPLETED", "FAILED") == "COMPLETED", job.report()

    expected = ["/opt/python", "-m", "fd_scale", "distill", "--recipe", "fd_swinv2g"]
    expected += ["--set", "data.shards=/data/two words", "--set", "view.crop_scale=(0.2,1.0)"]
    expected += ["--set", "seed=$HOME", *words]
    for rank in (0, 1):
        (event,) = events(folder, rank)
        assert event["argv"] == expected
        assert event["environment"] == {
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_LOCALID": "0",
            "SLURM_CPUS_PER_TASK": "2",
            "SLURMD_NODENAME": NODES[rank],
            "MASTER_ADDR": NODES[0],
            "MASTER_PORT": str(port + 1),
            "RANK": None,
            "OMP_NUM_THREADS": "2",
        }
    assert record(folder) == [["DONE", "step=100", "restart=0", "nodes=127.0.0.[1-2]", "exit=0"]]
    assert not list(folder.glob("*.state"))


def test_an_evaluation_is_started_by_its_words_alone(cluster: Cluster, folder: Path) -> None:
    words = ["runs/a run", "--task", "knn", "--train", "a", "--test", "b"]
    own = {"FD_SCALE_SET": "data.shards=/elsewhere", "FD_SCALE_PYTHON": "/opt/python"}
    job = submit(cluster, folder, "done", template="evaluate", words=words, **own)
    assert job.wait_for("COMPLETED", "FAILED") == "COMPLETED", job.report()
    assert events(folder, 0)[0]["argv"] == ["/opt/python", "-m", "fd_scale", "evaluate", *words]
    assert "FD_SCALE_SET and FD_SCALE_STAGE_SHARDS are of distillations, and not used" in job.log()
    assert (folder / f"evaluate-{job.number}.starts").is_file()


def test_an_export_list_does_not_hide_the_environment_from_the_ranks(cluster: Cluster, folder: Path) -> None:
    # sbatch --export=NAME makes srun pass NAME alone, not even PATH, unless job.sh says otherwise.
    job = submit(cluster, folder, "done", "--export=STANDIN,FD_SCALE_EXEC", template="fd_mae_vitb16")
    assert job.wait_for("COMPLETED", "FAILED") == "COMPLETED", job.report()
    assert events(folder, 1)[0]["environment"]["OMP_NUM_THREADS"] == "2"


def test_the_warning_reaches_every_rank_and_the_requeued_job_goes_on(cluster: Cluster, folder: Path) -> None:
    job = submit(cluster, folder, "stop:0:40 done")
    job.wait_for_text("ready", 2)
    job.warn()
    job.wait_for_text("to be requeued: 1 starts so far, the last 0 without progress")
    assert job.wait_for("COMPLETED", "FAILED") == "COMPLETED", job.report()

    assert signals(folder, 0) == signals(folder, 1) == ["SIGUSR2"]
    assert [words[:3] for words in record(folder)] == [
        ["PREEMPTED", "step=40", "from=0"],
        ["DONE", "step=100", "restart=1"],
    ]
    assert job.facts()["Restarts"] == "1"
    assert job.log().count("ready") == 4, "--open-mode=append keeps the log of the first start"


def test_a_warned_start_without_a_word_is_no_progress_but_goes_on(cluster: Cluster, folder: Path) -> None:
    # A signal that comes before the ranks listen ends them: nothing is saved, and nothing is wrong.
    job = submit(cluster, folder, "", FD_SCALE_EXEC="sh -c 'echo deaf; exec sleep 60'")
    job.wait_for_text("deaf", 2)
    job.warn()
    job.wait_for("PENDING")
    assert "the last 1 without progress" in job.log()


def test_scancel_lets_the_ranks_save_and_the_job_stays_away(cluster: Cluster, folder: Path) -> None:
    job = submit(cluster, folder, "stop:0:40 done")
    job.wait_for_text("ready", 2)
    job.scancel()
    job.wait_for("CANCELLED")
    assert "SIGTERM" in signals(folder, 1)
    assert record(folder)[0][:3] == ["PREEMPTED", "step=40", "from=0"]
    assert "Slurm itself ends this job" in job.log()
    assert job.facts()["Restarts"] == "0"


def test_a_job_that_makes_room_for_another_saves_and_comes_back(cluster: Cluster, folder: Path) -> None:
    job = submit(cluster, folder, "stop:0:40 done")
    job.wait_for_text("ready", 2)
    other = folder / "other.sh"
    other.write_text("#!/bin/bash\n#SBATCH --output=%x-%j.out\ntrue\n")
    cluster.submit(folder, "--partition=urgent", "--exclusive", "--nodes=2", other).wait_for("COMPLETED")
    assert job.wait_for("COMPLETED", "FAILED") == "COMPLETED", job.report()
    assert "SIGTERM" in signals(folder, 1)
    assert [words[0] for words in record(folder)] == ["PREEMPTED", "DONE"]
    assert job.facts()["Restarts"] == "1"


def test_term_twice_ends_ranks_that_do_not_listen(cluster: Cluster, folder: Path) -> None:
    job = submit(cluster, folder, "hang:0:0 hang:0:0")
    job.wait_for_text("ready", 2)
    job.scancel("--batch", "--signal=TERM")
    wait_until("the request", lambda: "SIGUSR2" in signals(folder, 1), 20)
    job.scancel("--batch", "--signal=TERM")
    job.wait_for("PENDING")
    job.scancel()
    assert record(folder)[0][:3] == ["RUNNING", "step=0", "from=0"]


def test_a_crash_ends_the_job_at_once_and_is_tried_again(cluster: Cluster, folder: Path) -> None:
    job = submit(cluster, folder, "crash:0:40 done")
    assert job.wait_for("COMPLETED", "FAILED") == "COMPLETED", job.report()
    assert [words[:3] for words in record(folder)] == [
        ["RUNNING", "step=40", "from=0"],
        ["DONE", "step=100", "restart=1"],
    ]
    assert "the last 0 without progress" in job.log()


def test_three_starts_without_progress_are_enough(cluster: Cluster, folder: Path) -> None:
    job = submit(cluster, folder, "crash:40:40", "--hold")
    before = ["40 from=0", "40 from=40", "60 from=40", "60 from=60", "60 from=60"]
    lines = [f"2026-01-01T00:00:00 RUNNING step={steps} restart=0 nodes=n1 exit=137\n" for steps in before]
    (folder / f"fd_swinv2g-{job.number}.starts").write_text("".join(lines))
    cluster.command("scontrol", "release", job.number)
    assert job.wait_for("COMPLETED", "FAILED") == "FAILED", job.report()
    assert "3 starts in a row without progress: given up" in job.log()
    assert job.log().count("ready") == 2
    assert job.facts()["Restarts"] == "0"


def test_a_failure_for_good_is_not_tried_again(cluster: Cluster, folder: Path) -> None:
    job = submit(cluster, folder, "failed done")
    assert job.wait_for("COMPLETED", "FAILED") == "FAILED", job.report()
    assert "failed for good" in job.log()
    assert "loss is not finite: 10 steps in a row" in job.log()
    assert job.facts()["Restarts"] == "0"


def test_a_waiting_job_goes_on_with_another_number_of_nodes(cluster: Cluster, folder: Path) -> None:
    job = submit(cluster, folder, "stop:0:40 stop:40:60 done")
    after = folder / "after.sh"
    after.write_text("#!/bin/bash\n#SBATCH --output=%x-%j.out\ntrue\n")
    follower = cluster.submit(folder, f"--dependency=afterok:{job.number}", after)
    for ready, nodes in ((2, 1), (3, 2)):
        job.wait_for_text("ready", ready)
        job.warn()
        job.wait_for("PENDING")
        sizes = [f"numcpus={2 * nodes}", f"numtasks={nodes}", f"numnodes={nodes}-{nodes}"]
        cluster.command("scontrol", "update", f"jobid={job.number}", *sizes)
        assert follower.state() == "PENDING", "a requeue is not the end that a dependency waits for"
    assert job.wait_for("COMPLETED", "FAILED") == "COMPLETED", job.report()
    starts = [event["environment"] for event in events(folder, 0) if "environment" in event]
    assert [start["SLURM_STEP_NUM_TASKS"] for start in starts] == ["2", "1", "2"]
    assert [words[4] for words in record(folder)] == ["nodes=127.0.0.[1-2]", "nodes=127.0.0.1", "exit=0"]
    follower.wait_for("COMPLETED")


def test_an_array_is_a_chain_and_a_finished_run_leaves_the_rest_at_once(
    cluster: Cluster, folder: Path
) -> None:
    array = submit(cluster, folder, "stop:0:40 done done done", "--array=1-4%1")
    wait_until("two ranks", lambda: len(list(folder.glob("events-*"))) == 2, 20)
    first = cluster.task(array, 1)
    first.warn()
    done = ["COMPLETED"] * 4
    wait_until("four tasks", lambda: [cluster.task(array, i).state() for i in (1, 2, 3, 4)] == done, 60)
    assert [words[0] for words in record(folder)] == ["PREEMPTED", "DONE"]
    assert "the next task of array" in first.log()
    for index in (3, 4):
        assert "the run is finished" in cluster.task(array, index).log()
        assert "ready" not in cluster.task(array, index).log()


def test_a_save_that_outlasts_the_limit_is_requeued_all_the_same(cluster: Cluster, folder: Path) -> None:
    job = submit(cluster, folder, "hang:0:40 done", "--time=10", "--signal=B:USR1@5")
    job.wait_for_text("ready", 2)
    job.end_in(6)
    assert job.wait_for("COMPLETED", "TIMEOUT", "FAILED", timeout_s=90) == "COMPLETED", job.report()
    assert [words[:3] for words in record(folder)] == [
        ["RUNNING", "step=40", "from=0"],
        ["DONE", "step=100", "restart=1"],
    ]


def test_a_start_that_was_cut_off_is_counted_by_the_next(cluster: Cluster, folder: Path) -> None:
    job = submit(cluster, folder, "hang:0:40 done")
    job.wait_for_text("ready", 2)
    (script,) = [found for found in processes(folder) if str(folder / "slurm/job.sh") in found.cmdline()]
    cluster.command("scontrol", "requeue", job.number)  # as Slurm does when a node is gone
    script.kill()
    assert job.wait_for("COMPLETED", "FAILED") == "COMPLETED", job.report()
    assert [words[0] for words in record(folder)] == ["RUNNING", "DONE"]
    assert record(folder)[0][-1] == "exit=lost"


def test_quotes_that_do_not_match_are_named_before_anything_starts(cluster: Cluster, folder: Path) -> None:
    job = submit(cluster, folder, "done", FD_SCALE_SET="data.shards='/data")
    assert job.wait_for("COMPLETED", "FAILED") == "FAILED"
    assert "FD_SCALE_SET=data.shards='/data: the quotes do not match" in job.log()


def test_shards_and_environment_are_read_from_the_disk_of_the_node(cluster: Cluster, folder: Path) -> None:
    shards = folder / "some shards"
    (shards / "a").mkdir(parents=True)
    (shards / "a" / "0.tar").write_bytes(b"x" * 100_000)
    (shards / "index.json").write_text("{}")
    interpreter = folder / "env" / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    interpreter.symlink_to(sys.executable)
    subprocess.run(["tar", "-C", folder / "env", "-cf", folder / "env.tar", "."], check=True)
    disk = folder / "disk"
    disk.mkdir()
    environment = {"FD_SCALE_STAGE_ENV": str(folder / "env.tar"), "FD_SCALE_STAGE_SHARDS": str(shards)}

    words = ["--set", "data.shards=/slow"]
    job = submit(cluster, folder, "done", words=words, **environment, TMPDIR=str(disk))
    assert job.wait_for("COMPLETED", "FAILED") == "COMPLETED", job.report()
    python, *_, before, _, after = events(folder, 0)[0]["argv"]
    assert Path(python).is_relative_to(disk)
    assert Path(python).readlink() == Path(sys.executable)
    assert before == "data.shards=/slow"
    staged = Path(after.removeprefix("data.shards="))
    assert staged.is_relative_to(disk)
    assert {path.relative_to(staged): path.read_bytes() for path in staged.rglob("*") if path.is_file()} == {
        path.relative_to(shards): path.read_bytes() for path in shards.rglob("*") if path.is_file()
    }


def test_slurm_takes_every_header_as_it_stands(cluster: Cluster) -> None:
    # Two nodes are all there is; the 8 ranks, 8 GPUs and 64 processors of each are asked for as shipped.
    for template in (REPOSITORY / "slurm").glob("*.sbatch"):
        cluster.command("sbatch", "--test-only", "--nodes=2", str(template), cwd=REPOSITORY)
