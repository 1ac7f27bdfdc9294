"""fflib's own network, as it is and accelerated, on the same rows: `python examples/fflib_accelerated.py`."""

from __future__ import annotations

import time

import torch
from fflib.nn.ff_linear import FFLinear
from fflib.nn.ff_net import FFNet

from ffkernels.integrations.fflib import accelerate


def network(width: int) -> FFNet:
    """The same weights at every call."""
    torch.manual_seed(0)
    return FFNet([FFLinear(794, width, 2.0, 0.02), FFLinear(width, width, 2.0, 0.02)], "cpu")


def compare(width: int = 2000, steps: int = 20, rows: int = 128) -> tuple[float, dict[str, float]]:
    """How far the weights come to lie apart (relative), and the seconds of each network's steps."""
    nets = {"fflib": network(width), "accelerated": accelerate(network(width))}
    seconds = dict.fromkeys(nets, 0.0)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps + 1):
        x_pos, x_neg = torch.rand(2, rows, 794, generator=generator)
        for name, net in nets.items():
            start = time.perf_counter()
            net.run_train_combined(x_pos, x_neg)
            if step:  # the first one makes the optimizers' state
                seconds[name] += time.perf_counter() - start
    theirs, ours = (net.layers[1].weight.detach() for net in nets.values())
    return float((ours - theirs).norm() / theirs.norm()), seconds


if __name__ == "__main__":
    apart, seconds = compare()
    print(", ".join(f"{name}: {1e3 * total / 20:.1f} ms a step" for name, total in seconds.items()))
    print(f"{seconds['fflib'] / seconds['accelerated']:.2f} times as fast; weights differ by {apart:.1e}")
