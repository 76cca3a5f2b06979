"""onnxruntime on chains of dense layers: float, dynamic int8, 4 bits in groups of 128."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from benchmarks.suite.contenders import Contender, Ready
from benchmarks.suite.program import Program

GROUP = 128


class Graph:
    """The nodes and constants of a graph as it grows."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, value: np.ndarray) -> str:
        """Adds a constant."""
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        """Adds a node; the name of its first output."""
        self.nodes.append(helper.make_node(kind, inputs, outputs, **attributes))
        return outputs[0]


def float_layer(graph: Graph, n: int, x: str, w: np.ndarray) -> str:
    """`x @ w`."""
    return graph.node("MatMul", [x, graph.constant(f"w{n}", w)], [f"y{n}"])


def int8_layer(graph: Graph, n: int, x: str, w: np.ndarray) -> str:
    """The dynamic quantization of onnxruntime's own tools: uint8 activations, int8 weights."""
    scale = np.abs(w).max(0) / 127
    codes = np.round(w / scale).astype(np.int8)
    names = [f"q{n}", f"s{n}", f"z{n}"]
    graph.node("DynamicQuantizeLinear", [x], names)
    weight, zero = graph.constant(f"w{n}", codes), graph.constant(f"wz{n}", np.int8(0))
    total = graph.node("MatMulInteger", [names[0], weight, names[2], zero], [f"t{n}"])
    real = graph.node("Cast", [total], [f"f{n}"], to=TensorProto.FLOAT)
    by = graph.constant(f"ws{n}", scale.astype(np.float32))
    factor = graph.node("Mul", [names[1], by], [f"m{n}"])
    return graph.node("Mul", [real, factor], [f"y{n}"])


def int4_layer(graph: Graph, n: int, x: str, w: np.ndarray) -> str:
    """`MatMulNBits`, computing in int8 (`accuracy_level=4`)."""
    k, out = w.shape
    blocks = w.T.reshape(out, k // GROUP, GROUP)
    scale = np.abs(blocks).max(-1, keepdims=True) / 7.5
    codes = np.clip(np.round(blocks / scale) + 8, 0, 15).astype(np.uint8)
    packed = codes[..., ::2] | (codes[..., 1::2] << 4)
    inputs = [
        x,
        graph.constant(f"w{n}", packed),
        graph.constant(f"s{n}", scale.reshape(-1).astype(np.float32)),
    ]
    return graph.node(
        "MatMulNBits",
        inputs,
        [f"y{n}"],
        domain="com.microsoft",
        K=k,
        N=out,
        bits=4,
        block_size=GROUP,
        accuracy_level=4,
    )


def served(layer: Callable[[Graph, int, str, np.ndarray], str]) -> Contender:
    """Chains of dense layers, each made by `layer`."""

    def make(program: Program) -> Ready | None:
        if program.dense is None or program.dense[0].shape[0] % GROUP:
            return None
        (x,) = (np.asarray(a) for a in program.args)
        start = time.perf_counter()
        graph, name = Graph(), "x"
        for n, w in enumerate(program.dense):
            name = layer(graph, n, graph.node("Relu", [name], [f"r{n}"]) if n else name, w)
        whole = helper.make_graph(
            graph.nodes,
            "chain",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [len(x), None])],
            graph.constants,
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(whole, opset_imports=opsets, ir_version=9)
        onnx.checker.check_model(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        # its threads would go on waiting for work while the others are timed
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        seconds = time.perf_counter() - start
        return Ready(lambda: session.run(None, {"x": x}), seconds)

    return make


CONTENDERS: dict[str, Contender] = {
    "onnxruntime float32": served(float_layer),
    "onnxruntime w8a8": served(int8_layer),
    "onnxruntime w4a8": served(int4_layer),
}
