"""What can a GPU do? The makers' figures, from their data sheets.

Peaks, that is: what share of them a run reaches is assumed in ``step_time.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fd_scale.errors import PlanError, near_misses


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str
    memory_gib: float
    """What PyTorch sees, a little less than the name says."""
    bf16_tflops: float
    """Dense matrix products in bf16, TFLOP/s (data sheets print twice that, with sparsity)."""
    memory_tb_s: float
    """TB/s."""
    link_gb_s: float
    """To another GPU of the node, one direction, GB/s."""
    node_link_gb_s: float
    """To another node, one direction and per GPU, GB/s: the network card that such nodes usually have for
    each GPU. Clusters differ; ``--node-link`` says otherwise."""
    power_w: float
    """The board's limit, W."""
    has_bf16: bool = True


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA B200 (HGX) data sheet: 180 GB, 8 TB/s, NVLink 5 1.8 TB/s both ways; 400 Gbit/s per GPU.
        Gpu("b200", 178.0, 2250.0, 8.0, 900.0, 50.0, 1000.0),
        # NVIDIA H200 SXM data sheet: 141 GB, 4.8 TB/s, NVLink 4 900 GB/s both ways; 400 Gbit/s per GPU.
        Gpu("h200", 139.8, 989.5, 4.8, 450.0, 50.0, 700.0),
        # NVIDIA H100 SXM data sheet: 80 GB, 3.35 TB/s; NVLink and network as the H200.
        Gpu("h100", 79.1, 989.5, 3.35, 450.0, 50.0, 700.0),
        # NVIDIA H100 PCIe data sheet: 80 GB, 2.0 TB/s, PCIe 5.0 x16; 200 Gbit/s per GPU.
        Gpu("h100-pcie", 79.1, 756.0, 2.0, 64.0, 25.0, 350.0),
        # NVIDIA A100 data sheet (SXM 80 GB, SXM 40 GB): NVLink 3 600 GB/s both ways; 200 Gbit/s per GPU.
        Gpu("a100-80", 79.2, 312.0, 2.039, 300.0, 25.0, 400.0),
        Gpu("a100-40", 39.4, 312.0, 1.555, 300.0, 25.0, 400.0),
        # NVIDIA L40S data sheet: 48 GB, 0.864 TB/s, PCIe 4.0 x16; 100 Gbit/s per GPU.
        Gpu("l40s", 44.4, 362.0, 0.864, 32.0, 12.5, 350.0),
        # NVIDIA GeForce RTX 4090: Ada architecture whitepaper, bf16 with float32 accumulation; PCIe 4.0 x16.
        Gpu("rtx4090", 23.5, 165.2, 1.008, 32.0, 12.5, 450.0),
        # NVIDIA V100 SXM2 data sheet: no bf16, so its float32 rate; NVLink 2 300 GB/s both ways; 50 Gbit/s.
        Gpu("v100-32", 31.7, 15.7, 0.9, 150.0, 6.25, 300.0, has_bf16=False),
    )
}


def get(name: str) -> Gpu:
    """The GPU of this name; a ``PlanError`` names near misses."""
    if name not in GPUS:
        raise PlanError(f"unknown GPU {name!r}{near_misses(name, GPUS)} (GPUs: {', '.join(GPUS)}) (--gpu)")
    return GPUS[name]
