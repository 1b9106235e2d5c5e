"""Launch each hot kernel once, for a profiler or a memory checker to look at.

    ncu --clock-control none --set detailed --csv python benchmarks/launches.py
    compute-sanitizer --tool racecheck python benchmarks/launches.py --small
    compute-sanitizer python benchmarks/launches.py --only CASE:CONFIGURATION

Small: the CUDA kernels at sizes that leave no tile full, which a checker takes seconds for. Full:
Triton's at the sizes of `kernel_configurations.py`, CUDA's at those of `shapes.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from kernel_configurations import CASES

from blip2fast import _extension
from blip2fast.kernels.philox import philox_state
from blip2fast.ops import itc_loss, qformer_cross_attention

DROPOUT = 0.1


def itc(N: int, Q: int, D: int) -> None:
    """The CUDA loss, forward and backward."""
    shapes = (N, Q, D), (N, D)
    leaves = [torch.nn.functional.normalize(torch.randn(s, device="cuda"), dim=-1) for s in shapes]
    image, text = (x.half().requires_grad_() for x in leaves)
    temp = torch.tensor(0.07, device="cuda", requires_grad=True)
    itc_loss(image, text, temp, impl="cuda").loss.backward()


def cross(N: int, Q: int, S: int) -> None:
    """The CUDA cross-attention, forward and backward, with dropout."""
    shapes = (N, Q, 12, 64), (N, S, 2, 12, 64)
    q, kv = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes)
    out = qformer_cross_attention(
        q.requires_grad_(),
        kv.requires_grad_(),
        dropout_p=DROPOUT,
        philox=philox_state(1, 2, "cuda"),
        impl="cuda",
    )
    out.backward(torch.randn_like(out))


def chosen(only: str) -> Callable[[], object]:
    """One configuration of a case of `kernel_configurations.py`, without dropout.

    Raises:
        ValueError: there is none of that name; the message lists those there are.
    """
    name, _, configuration = only.partition(":")
    cases = {case.name: case for case in CASES}
    if name not in cases:
        raise ValueError(f"no case {name!r}; there are {', '.join(cases)}")
    known = cases[name].configurations
    if configuration not in known:
        raise ValueError(f"{name} has no {configuration!r}; there are {', '.join(known)}")
    return lambda: cases[name].run(cases[name].make("cuda", 0.0), known[configuration])


def launches(small: bool) -> list[Callable[[], object]]:
    """What to launch."""
    if small:
        return [lambda: itc(130, 31, 64), lambda: itc(70, 32, 256), lambda: cross(3, 31, 257)]
    found: list[Callable[[], object]] = []
    for case in CASES:
        inputs = case.make("cuda", DROPOUT)
        found.append(lambda case=case, inputs=inputs: case.run(inputs, {}))
    if not _extension.why_not("itc_sweep"):
        found += [lambda: itc(1680, 32, 256), lambda: itc(4096, 32, 256)]
        found.append(lambda: cross(256, 32, 257))
    return found


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="sizes for a memory checker")
    parser.add_argument("--only", action="append", metavar="CASE:CONFIGURATION")
    given = parser.parse_args()
    try:
        found = [chosen(only) for only in given.only or ()]
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        return 2
    for launch in found or launches(given.small):
        launch()
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
