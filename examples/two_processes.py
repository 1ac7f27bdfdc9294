"""A network trained by two processes in both ways: rows divided between them, then layers.

    torchrun --nproc-per-node 2 examples/two_processes.py

On CPUs the processes speak by gloo, on GPUs by NCCL, one device each. Digits are drawn here, so that nothing is loaded.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

import ffkernels as ff

CLASSES, PIXELS, BATCH, STEPS = 10, 100, 64, 60


def images(rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a bright stripe where the class says, and the classes."""
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    x = torch.rand(rows, CLASSES, PIXELS // CLASSES, generator=generator)
    x[torch.arange(rows), labels] += 0.5
    return x.flatten(1), labels


def network(device: torch.device) -> ff.FFNetwork:
    torch.manual_seed(0)
    objective = ff.Objective(loss="cross_entropy", classes=CLASSES)
    options = {"norm": "rms", "outputs": "pre", "objective": objective}
    return ff.FFNetwork(ff.FFLinear(width, 200, **options) for width in (PIXELS, 200, 200)).to(device)


def main() -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    tests, right = (t.to(device) for t in images(200, torch.Generator().manual_seed(1)))

    # Rows: every process draws the same minibatch and steps on its own part of it.
    net = network(device)
    parallel = ff.parallel.DataParallel(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        x, labels = (t.tensor_split(size)[rank].to(device) for t in images(BATCH, generator))
        parallel.step(x, None, optimizer, labels=labels)
    error = (net.predict(tests) != right).float().mean()
    print(f"process {rank} of {size}, rows divided: error {error:.1%}", flush=True)

    # Layers: the first process has the rows, and each is at work on another minibatch.
    pipeline = ff.parallel.Pipeline(network(device))
    optimizer = torch.optim.Adam(pipeline.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        x, labels = (t.to(device) for t in images(BATCH, generator))
        pipeline.step(x, None, optimizer, labels=labels)
    error = (pipeline.predict(tests) != right).float().mean()
    print(f"process {rank} of {size}, layers {pipeline.first} to {pipeline.last - 1}: error {error:.1%}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
