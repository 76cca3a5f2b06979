"""PyTorch, and torchao on it, on chains of dense layers."""

from __future__ import annotations

import os
import time
from typing import Any

# its threads would go on waiting for work while the others are timed
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torchao import quantization

from benchmarks.suite.contenders import Contender, Ready
from benchmarks.suite.program import Program


def served(config: Any) -> Contender:
    """Chains of dense layers, quantized by a configuration of torchao, run eagerly."""

    def make(program: Program) -> Ready | None:
        if program.dense is None:
            return None
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        start = time.perf_counter()
        layers: list[Any] = []
        for w in program.dense:
            linear = torch.nn.Linear(*w.shape, bias=False)
            linear.weight = torch.nn.Parameter(torch.tensor(w.T), requires_grad=False)
            layers += [torch.nn.ReLU(), linear] if layers else [linear]
        model = torch.nn.Sequential(*layers).eval()
        if config is not None:
            quantization.quantize_(model, config())
        x = torch.tensor(np.asarray(program.args[0]))

        def call() -> Any:
            with torch.inference_mode():
                return model(x).numpy()

        return Ready(call, time.perf_counter() - start)

    return make


CONTENDERS: dict[str, Contender] = {
    "torch float32": served(None),
    "torchao w8a8": served(quantization.Int8DynamicActivationInt8WeightConfig),
    "torchao w8a16": served(quantization.Int8WeightOnlyConfig),
}
