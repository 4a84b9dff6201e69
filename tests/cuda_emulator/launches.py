"""Prints how many kernels each operator launches forward and backward, for short rows and for few long ones.

EMULATED=plain PYTHONPATH=tests/cuda_emulator:. python tests/cuda_emulator/launches.py
"""

import emulated  # before genfuse
import torch

from benchmarks.operators import OPERATORS, Operator
from genfuse import ops


def launched(operator: Operator, size: tuple[int, int]) -> list[str]:
    """Forward and backward."""
    arguments = operator.arguments(size, torch.float32, "cpu")
    before = emulated.launches()
    outputs = operator.function(**arguments)
    between = emulated.launches()
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
    if outputs:
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
    return [str(between - before), str(emulated.launches() - between)]


with ops.using("native"):
    for name, operator in OPERATORS.items():
        if any(ops._op.KERNELS[kernel].cpu_only for kernel in operator.kernels):
            continue
        print(name, *launched(operator, (5, 64)), *launched(operator, (2, min(8192, operator.widest))))
