"""GPUs with the numbers of their data sheets, and clusters of them: `4x8xH100` is four nodes with eight H100 each."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from dpo_ray.errors import ConfigError

GB = 10**9


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, with the numbers of its data sheet.

    A GB of memory counts as 10^9 bytes. Drivers report this much or up to 7 % more, so plans are on the safe side.
    """

    name: str
    memory_bytes: int
    bf16_flops: float  # dense, per second
    memory_bytes_per_second: float
    link_bytes_per_second: float  # to the other GPUs of the node, in one direction
    network_bytes_per_second: float  # its share of the node's network, in one direction


# Sources. Dense bf16 is half of the number with sparsity; the data sheets give NVLink's bandwidth for both directions
# together. The network is that of the vendor's own node or, if there is none, that of a cloud instance.
# A100: nvidia.com, "A100 Tensor Core GPU Datasheet" (2021): 312 TFLOPS, 1,555 and 2,039 GB/s, NVLink 600 GB/s.
#       DGX A100 datasheet: eight 200 Gb/s adapters.
# H100: "H100 Tensor Core GPU Datasheet", SXM: 1,979 TFLOPS with sparsity, 3.35 TB/s, NVLink 900 GB/s.
#       DGX H100 datasheet: eight 400 Gb/s ports. H100 PCIe: 1,513 TFLOPS with sparsity, 2 TB/s, PCIe Gen5 128 GB/s.
# H200: "H200 Tensor Core GPU Datasheet", SXM: 141 GB, 4.8 TB/s, the rest as H100.
# B200: HGX and DGX B200 datasheets: 1,440 GB in eight, 64 TB/s in eight, 36 PFLOPS of bf16 with sparsity in eight,
#       NVLink 1.8 TB/s, eight 400 Gb/s ports.
# L40S: "L40S datasheet": 48 GB, 864 GB/s, 362 TFLOPS dense, PCIe Gen4 64 GB/s.
#       aws.amazon.com/ec2/instance-types/g6e: 400 Gb/s for eight.
# L4:   "L4 datasheet": 24 GB, 300 GB/s, 242 TFLOPS with sparsity, PCIe Gen4 64 GB/s. EC2 g6.48xlarge: 100 Gb/s for eight.
# A10G: "A10G" in aws.amazon.com/ec2/instance-types/g5: 24 GB, 100 Gb/s for eight; nvidia.com, "A10 datasheet": 600 GB/s,
#       PCIe Gen4 64 GB/s; the A10G's own sheet gives 70 TFLOPS of dense bf16.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-40", 40 * GB, 312e12, 1555e9, 300e9, 25e9),
        Gpu("A100-80", 80 * GB, 312e12, 2039e9, 300e9, 25e9),
        Gpu("H100", 80 * GB, 989e12, 3350e9, 450e9, 50e9),
        Gpu("H100-PCIE", 80 * GB, 756e12, 2000e9, 64e9, 50e9),
        Gpu("H200", 141 * GB, 989e12, 4800e9, 450e9, 50e9),
        Gpu("B200", 180 * GB, 2250e12, 8000e9, 900e9, 50e9),
        Gpu("L40S", 48 * GB, 362e12, 864e9, 32e9, 6.25e9),
        Gpu("L4", 24 * GB, 121e12, 300e9, 32e9, 1.5625e9),
        Gpu("A10G", 24 * GB, 70e12, 600e9, 32e9, 1.5625e9),
    )
}
_OTHER_NAMES = {"A100": "A100-80"}
_SHAPE = re.compile(r"(?:(\d+)[xX])?(\d+)[xX]([A-Za-z][\w-]*)(?::(\d+))?")


@dataclass(frozen=True)
class Cluster:
    """A cluster of identical nodes."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def __str__(self) -> str:
        return f"{self.nodes}x{self.gpus_per_node}x{self.gpu.name}"


def parse_cluster(text: str) -> Cluster:
    """Read a cluster from text: `4x8xH100` is four nodes with eight H100 each. For one node, `8xH100` is enough.

    If a GPU exists with several sizes of memory, `:GB` at the end sets the memory of each GPU: `1x8xH100:94`.

    Raises:
        ConfigError: the text has another form, or the GPU is not in the planner's table.
    """
    where, known = f"--cluster {text}", ", ".join(GPUS)
    match = _SHAPE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            "this does not describe a cluster",
            where=where,
            fix=f"write NODESxGPUSxGPU, such as 4x8xH100, where GPU is one of {known}",
        )
    nodes, gpus, memory = int(match[1] or 1), int(match[2]), match[4]
    name = match[3].upper()
    gpu = GPUS.get(_OTHER_NAMES.get(name, name))
    if gpu is None:
        raise ConfigError(f"the GPU `{match[3]}` is not known", where=where, fix=f"use one of {known}")
    if not nodes or not gpus or memory == "0":
        raise ConfigError("a number of this cluster is 0", where=where, fix="set every number to at least 1")
    if memory is not None:
        gpu = replace(gpu, memory_bytes=int(memory) * GB)
    return Cluster(nodes, gpus, gpu)
