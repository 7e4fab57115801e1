"""Builds graphs that process texts, with operators of onnxruntime-extensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from toolchain.ship.targets.releases import EXTENSIONS, ML

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

# Opset 20 is the first opset with StringSplit. ONNX Runtime reads opset 20 from release 1.17 on.
OPSET = {"": 20, EXTENSIONS: 1, ML: 2}


class Nodes:
    """The nodes of a graph in the order in which they were added, and the constants that these nodes use."""

    def __init__(self) -> None:
        from onnx_ir import tape

        self.tape = tape.Tape()
        self._constants: dict[tuple[str, ...], ir.Value] = {}

    def texts(self, *values: str) -> ir.Value:
        """Returns a constant of dtype string and shape [values] that holds the texts."""
        import onnx_ir as ir

        key = ("texts", *values)
        if key not in self._constants:
            tensor = ir.StringTensor([value.encode() for value in values], shape=ir.Shape([len(values)]))
            self._constants[key] = self.tape.initializer(tensor, f"tokenizer_texts_{len(self._constants)}")
        return self._constants[key]

    def numbers(self, value: int | Sequence[int]) -> ir.Value:
        """Returns an int64 constant: a scalar for a number, or a vector for a sequence of numbers."""
        import numpy as np

        return self._constant(np.array(value, np.int64))

    def boolean(self, value: bool) -> ir.Value:
        """Returns a constant of dtype bool and shape [1] that holds the value."""
        import numpy as np

        return self._constant(np.array([value]))

    def _constant(self, array: np.ndarray) -> ir.Value:
        import onnx_ir as ir

        key = (array.dtype.name, str(array.shape), *map(str, array.ravel()))
        if key not in self._constants:
            self._constants[key] = self.tape.initializer(ir.tensor(array), f"tokenizer_{len(self._constants)}")
        return self._constants[key]

    def add(self, operator: str, *inputs: ir.Value, domain: str = "", **attributes: Any) -> ir.Value:
        """Adds a node with one output and returns the output."""
        return self.tape.op(operator, inputs, attributes, domain=domain)

    def add_with_outputs(
        self, operator: str, count: int, *inputs: ir.Value, domain: str = "", **attributes: Any
    ) -> Any:
        """Adds a node with `count` outputs and returns the outputs."""
        return self.tape.op_multi_out(operator, inputs, attributes, num_outputs=count, domain=domain)

    def replace(self, texts: ir.Value, pattern: str, replacement: str) -> ir.Value:
        """Adds a node that replaces every match of `pattern`, a regular expression of RE2, in the texts."""
        constants = [self.texts(pattern), self.texts(replacement)]
        return self.add("StringRegexReplace", texts, *constants, domain=EXTENSIONS, global_replace=1)

    def zeros_like(self, values: ir.Value) -> ir.Value:
        """Adds nodes that compute int64 zeros in the shape of `values`."""
        import numpy as np
        import onnx_ir as ir

        return self.add("ConstantOfShape", self.add("Shape", values), value=ir.tensor(np.zeros(1, np.int64)))
