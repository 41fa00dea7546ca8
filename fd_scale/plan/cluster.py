"""On what would a run run? Machines, from the header of a batch script or from a number of GPUs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fd_scale.errors import PlanError, near_misses
from fd_scale.plan.gpus import Gpu

GPUS_PER_NODE = 8
"""Where only a number of GPUs is given; fewer make one node."""


@dataclass(frozen=True)
class Cluster:
    """Nodes that are alike, one process per GPU."""

    gpu: Gpu
    num_nodes: int
    gpus_per_node: int
    cores_per_gpu: int | None = None
    """CPU cores of each process."""
    time_limit_s: int | None = None
    """Wall-clock limit of one start, seconds."""
    source: str = ""

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node

    @property
    def slowest_link_gb_s(self) -> float:
        """The link that a ring over all GPUs must pass, GB/s in one direction."""
        return self.gpu.link_gb_s if self.num_nodes == 1 else self.gpu.node_link_gb_s


def of_size(num_gpus: int, gpu: Gpu, *, gpus_per_node: int = GPUS_PER_NODE) -> Cluster:
    """So many GPUs in nodes of ``gpus_per_node``. Raises ``PlanError`` for nodes that would not be full."""
    per_node = min(num_gpus, gpus_per_node)
    if num_gpus % per_node:
        raise PlanError(
            f"--gpus {num_gpus} does not fill nodes of {per_node} GPUs: give a multiple, or --gpus-per-node"
        )
    return Cluster(gpu, num_gpus // per_node, per_node, source=f"{num_gpus} x {gpu.name}")


def from_sbatch(path: Path, gpu: Gpu) -> Cluster:
    """The machines that the header of a Slurm batch script asks for.

    Read are ``--nodes``, ``--ntasks-per-node``, ``--gpus-per-node``, ``--cpus-per-task`` and ``--time``, as
    Slurm reads them: the last one of a kind counts, and the header ends at the first command. Raises
    ``PlanError`` for a file that cannot be read, and a header that is incomplete or contradicts itself.
    """
    header = _header(path)
    nodes = _number(path, header, "nodes")
    tasks = _number(path, header, "ntasks-per-node")
    if "gpus-per-node" in header:
        gpus = _number(path, header, "gpus-per-node")
        if gpus != tasks:
            raise PlanError(
                f"{path}: --gpus-per-node={gpus} and --ntasks-per-node={tasks} must be equal: one process "
                "drives one GPU"
            )
    cores = _number(path, header, "cpus-per-task") if "cpus-per-task" in header else None
    limit = _seconds(path, header["time"]) if "time" in header else None
    return Cluster(gpu, nodes, tasks, cores, limit, source=str(path))


def _header(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        found = sorted(other.name for other in path.parent.glob("*.sbatch"))
        raise PlanError(f"--sbatch {path} does not exist{near_misses(path.name, found)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"--sbatch {path} cannot be read: {error}") from None
    options: dict[str, str] = {}
    for line in lines:
        if line.strip() and not line.startswith("#"):
            break
        if found_option := re.match(r"#SBATCH\s+--([a-z-]+)(?:[=\s]\s*(\S+))?", line):
            options[found_option[1]] = found_option[2] or ""
    return options


def _number(path: Path, header: dict[str, str], option: str) -> int:
    if option not in header:
        raise PlanError(f"{path} has no line '#SBATCH --{option}=...', which the plan needs")
    text = header[option].rpartition(":")[2]  # gpus-per-node may name a type: h100:8
    if not re.fullmatch(r"[1-9]\d*", text):
        raise PlanError(f"{path}: --{option}={header[option]} must be a whole number, 1 or more")
    return int(text)


def _seconds(path: Path, text: str) -> int | None:
    """Slurm's time: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return None
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        raise PlanError(f"{path}: --time={text} is no time: write hours:minutes:seconds")
    days, *rest = (int(part) if part else None for part in found.groups())
    first, second, third = rest
    if days is not None:
        return days * 86400 + (first or 0) * 3600 + (second or 0) * 60 + (third or 0)
    if third is not None:
        return (first or 0) * 3600 + (second or 0) * 60 + third
    return (first or 0) * 60 + (second or 0)
