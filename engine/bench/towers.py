"""The user tower against ONNX Runtime: CPU time per request, alone and in batches. `python -m engine.bench.towers`.

Both compute the same random weights; the answers are compared before anything is timed. onnx and onnxruntime belong to no
extra of the project: where they are not installed, only the project's own tower is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from engine import console
from engine.core.types import AnyArray, Float32Array
from engine.models.encoded import EncodedUsers
from engine.models.reference import random_weights
from engine.models.spec import Feature, ModelSpec, SequenceSpec
from engine.models.towers import UserTower

ITEMS, WIDTH, LENGTH, BLOCKS = 100_000, 64, 50, 2
BATCHES = (1, 8)
ROUNDS, CALLS = 15, 60

ITEM_ID = Feature(name="item_id", kind="id", dimension=WIDTH, size=ITEMS + 1)
USER = tuple(Feature(name=name, kind="categorical", dimension=WIDTH, size=1000) for name in ("a", "b", "c"))
SPECS = {
    "SASRec 2 x 64, 50 items": ModelSpec(
        item_features=(ITEM_ID,),
        items=ITEMS,
        sequence=SequenceSpec(kind="sasrec", length=LENGTH, width=WIDTH, blocks=BLOCKS),
    ),
    "mean of 50 items, 3 features, MLP 256": ModelSpec(
        item_features=(ITEM_ID,),
        user_features=USER,
        items=ITEMS,
        sequence=SequenceSpec(kind="mean", length=LENGTH, width=WIDTH),
        hidden=(256,),
    ),
}


def queries(n: int, seed: int = 0) -> EncodedUsers:
    """Return n random queries with full histories."""
    rng = np.random.default_rng(seed)
    return EncodedUsers(
        rng.integers(0, 1000, (n, 3)).astype(np.int32),
        (),
        np.empty((n, 0), np.float32),
        rng.integers(1, ITEMS + 1, (n, LENGTH)).astype(np.int32),
        np.full(n, LENGTH, np.int32),
    )


def microseconds(call: Callable[[], Any]) -> float:
    """Return the CPU time of one call: the least over rounds of calls."""
    call()
    best = np.inf
    for _ in range(ROUNDS):
        began = time.process_time()
        for _ in range(CALLS):
            call()
        best = min(best, (time.process_time() - began) / CALLS)
    return float(best * 1e6)


class OnnxTower:
    """The same tower as a graph, written node by node; histories are full, so nothing is masked but the future."""

    def __init__(self, spec: ModelSpec, arrays: dict[str, Float32Array]) -> None:
        import onnx
        import onnxruntime

        self._nodes: list[Any] = []
        self._constants: dict[str, AnyArray] = {}
        self._helper = onnx.helper
        self._arrays = arrays
        self._constant("items", arrays["item.embeddings.0.weight"])
        embedded = self._node("Gather", "items", "sequence")
        if spec.sequence.kind == "mean":
            fields = [
                self._node("Gather", self._weight(f"embeddings.{at}.weight"), f"code{at}") for at in range(3)
            ]
            mean = self._node("ReduceMean", embedded, axes=[1], keepdims=0)
            x = self._node("Concat", *fields, mean, axis=1)
            x = self._node("Relu", self._linear("layers.0", x))
            x = self._linear("layers.1", x)
        else:
            x = self._sasrec(spec, embedded)
        self._node("LpNormalization", x, axis=1, p=2, out="vectors")
        shapes: dict[str, list[Any]] = {"sequence": ["n", LENGTH], **{f"code{at}": ["n"] for at in range(3)}}
        graph = self._helper.make_graph(
            self._nodes,
            "tower",
            [
                self._helper.make_tensor_value_info(name, onnx.TensorProto.INT32, shape)
                for name, shape in shapes.items()
                if any(name in node.input for node in self._nodes)
            ],
            [self._helper.make_tensor_value_info("vectors", onnx.TensorProto.FLOAT, ["n", WIDTH])],
            [onnx.numpy_helper.from_array(array, name) for name, array in self._constants.items()],
        )
        model = self._helper.make_model(graph, opset_imports=[self._helper.make_opsetid("", 17)])
        model.ir_version = 8
        onnx.checker.check_model(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._inputs = [each.name for each in self._session.get_inputs()]

    def vectors(self, users: EncodedUsers) -> Float32Array:
        """float32[n, dimension]."""
        given = {"sequence": users.sequence}
        given |= {f"code{at}": users.codes[:, at] for at in range(3)}
        answer: Float32Array = self._session.run(None, {name: given[name] for name in self._inputs})[0]
        return answer

    def _sasrec(self, spec: ModelSpec, x: str) -> str:
        positions = self._arrays["user.sequence.positions.weight"][::-1].copy()
        scale = self._constant("scale", np.array(np.sqrt(WIDTH), np.float32))
        x = self._node("Add", self._node("Mul", x, scale), self._constant("positions", positions))
        future = np.where(np.tri(LENGTH, dtype=np.bool_), 0, -1e9).astype(np.float32)
        sharpness = self._constant("sharpness", np.array(1 / np.sqrt(WIDTH), np.float32))
        for b in range(spec.sequence.blocks):
            block = f"sequence.blocks.{b}"
            normed = self._norm(f"{block}.attention_norm", x)
            wide = self._weight(f"{block}.attention.in_proj_weight", transposed=True)
            pairs = self._node("MatMul", normed, wide)
            pairs = self._node("Add", pairs, self._weight(f"{block}.attention.in_proj_bias"))
            q, k, v = (f"{block}.{part}" for part in "qkv")
            self._nodes.append(self._helper.make_node("Split", [pairs], [q, k, v], axis=2))
            logits = self._node("MatMul", q, self._node("Transpose", k, perm=[0, 2, 1]))
            logits = self._node("Add", self._node("Mul", logits, sharpness), self._constant("future", future))
            mixed = self._node("MatMul", self._node("Softmax", logits, axis=2), v)
            x = self._node("Add", x, self._linear(f"{block}.attention.out_proj", mixed))
            inner = self._node("Relu", self._linear(f"{block}.inner", self._norm(f"{block}.feed_norm", x)))
            x = self._node("Add", x, self._linear(f"{block}.outer", inner))
        last = self._constant("last", np.array(LENGTH - 1, np.int64))
        return self._norm("sequence.norm", self._node("Gather", x, last, axis=1))

    def _node(self, kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        name = out or f"{kind}.{len(self._nodes)}"
        self._nodes.append(self._helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def _constant(self, name: str, array: AnyArray) -> str:
        self._constants[name] = array
        return name

    def _weight(self, name: str, transposed: bool = False) -> str:
        array = self._arrays[f"user.{name}"]
        return self._constant(name, np.ascontiguousarray(array.T) if transposed else array)

    def _linear(self, name: str, x: str) -> str:
        product = self._node("MatMul", x, self._weight(f"{name}.weight", transposed=True))
        return self._node("Add", product, self._weight(f"{name}.bias"))

    def _norm(self, name: str, x: str) -> str:
        parts = (self._weight(f"{name}.weight"), self._weight(f"{name}.bias"))
        return self._node("LayerNormalization", x, *parts, axis=-1, epsilon=1e-8)


def main() -> None:
    """Time both and print a table."""
    rows = console.table(
        "tower", ("batch", "right"), ("NumPy, µs a request", "right"), ("ONNX Runtime", "right")
    )
    for name, spec in SPECS.items():
        arrays = random_weights(spec)
        own = UserTower.load(spec, arrays)
        try:
            other = OnnxTower(spec, arrays)
        except ModuleNotFoundError as error:
            console.errors().print(f"{error.name} is not installed: timed without")
            other = None
        for n in BATCHES:
            users = queries(n)
            mine = microseconds(lambda own=own, users=users: own.vectors(users)) / n  # type: ignore[misc]
            theirs = "-"
            if other is not None:
                np.testing.assert_allclose(own.vectors(users), other.vectors(users), atol=1e-3)
                spent = microseconds(lambda other=other, users=users: other.vectors(users))  # type: ignore[misc]
                theirs = f"{spent / n:.0f}"
            rows.add_row(name, str(n), f"{mine:.0f}", theirs)
    console.output().print(rows)


if __name__ == "__main__":
    main()
