"""Exits: a text skips the later layers if the prediction after an early layer is confident.

After a layer, a small network (the head) predicts the logits from the hidden states of neighbouring tokens. If its
confidence reaches the threshold for all texts of the batch, an `If` node skips the remaining nodes. Otherwise a branch
of the `If` node gathers the rows of the other texts, and computes the next layers for these rows only. It then replaces
the head's logits of these rows. The branch can contain the next exit. DeeBERT (https://arxiv.org/abs/2004.12993) and
PABEE (https://arxiv.org/abs/2006.04152) describe exits of encoders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from toolchain.errors import GraphError
from toolchain.passes.graph import MASK, adder, array_of, constant

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from toolchain.passes import Context

# Each encoder layer has exactly one of these nodes.
ATTENTION = ("MultiHeadAttention", "Attention", "QAttention", "Softmax")
# Name of the stored confidence threshold
CONFIDENCE = "exits/confidence"
# These nodes read the shape of a value, not its content.
SHAPE_READERS = ("Shape", "Size")


@dataclass(frozen=True)
class ExitHead:
    """A small convolutional network that predicts logits from a text's hidden states.

    A linear layer reads the hidden states of each token and of its two neighbours. ReLU follows. The largest value and
    the mean of each unit over all tokens of the text are the input of the second linear layer. Kim 2014,
    "Convolutional Neural Networks for Sentence Classification" (https://arxiv.org/abs/1408.5882), is the paper.

    Attributes:
        layer: Number of encoder layers before the exit; 0 for an exit after the embeddings.
        weights: Weights of the two linear layers, of shape [3 * width, units] and [2 * units, labels]. The rows of the
            first weights belong to the token before, the token itself, and the token after.
        biases: Biases of the two linear layers, of shape [units] and [labels].
        confidence: Confidence threshold, the smallest confidence with which a text exits. The confidence is the
            probability of the predicted label. If a text can have several labels, it is the smallest over all labels.
        several_labels: Whether a text can have several labels.
    """

    layer: int
    weights: tuple[np.ndarray, np.ndarray]
    biases: tuple[np.ndarray, np.ndarray]
    confidence: float
    several_labels: bool = False


def hidden_states(model: ir.Model) -> list[ir.Value]:
    """Returns the hidden states after the embeddings and after each encoder layer but the last, first to last.

    A hidden state is a value on every path from the tokens to the logits. The later layers therefore need no other
    value that depends on the tokens.

    Raises:
        GraphError: The graph has no attention that the function knows, or no such value between its layers.
    """
    states: dict[int, ir.Value] = {}
    layers = 0
    live: set[ir.Value] = set()
    nodes = _text_nodes(model)
    uses = Counter(value for node in nodes for value in set(node.inputs))
    for node in nodes:
        layers += node.op_type in ATTENTION
        for value in set(node.inputs):
            uses[value] -= 1
            if not uses[value]:
                live.discard(value)
        live.update(output for output in node.outputs if uses[output])
        if len(live) == 1:
            states[layers] = next(iter(live))
    if not layers or not set(range(layers)) <= set(states):
        raise GraphError("The graph has no hidden states between its layers that exits could read.", "Leave exits out.")
    return [states[layer] for layer in range(layers)]


def layer_weights(model: ir.Model) -> tuple[int, ...]:
    """Returns the number of stored weights that each encoder layer reads; the classifier counts as the last layer's.

    Raises:
        GraphError: As in `hidden_states`.
    """
    states = hidden_states(model)
    counts = [0] * (len(states) + 1)
    passed = 0
    for node in _text_nodes(model):
        weights = (value for value in node.inputs if value is not None and value.is_initializer())
        counts[passed] += sum(array_of(value).size for value in weights)
        passed += passed < len(states) and states[passed] in node.outputs
    return tuple(counts[1:])


def _text_nodes(model: ir.Model) -> list[ir.Node]:
    """Returns the nodes on the paths from the tokens to the logits, in order; a path leads through no shape."""
    reached = {value for value in model.graph.inputs if value.name != MASK}
    nodes = []
    for node in model.graph:
        if node.op_type not in SHAPE_READERS and not reached.isdisjoint(node.inputs):
            reached.update(node.outputs)
            nodes.append(node)
    wanted = set(model.graph.outputs)
    on_path = []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.outputs):
            wanted.update(value for value in node.inputs if value in reached)
            on_path.append(node)
    return on_path[::-1]


def keep_state(model: ir.Model, layer: int) -> None:
    """Makes the hidden state before encoder layer `layer` the only output of the graph; `layer` counts from 0.

    The output is float32 and has the shape [batch, sequence, width].

    Raises:
        GraphError: As in `hidden_states`.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common

    state = hidden_states(model)[layer]
    state.dtype, state.shape = ir.DataType.FLOAT, ir.Shape(["batch", "sequence", "width"])
    model.graph.outputs[:] = [state]
    common.RemoveUnusedNodesPass()(model)


def exits(model: ir.Model, context: Context) -> tuple[ir.Model, int]:
    """Adds an exit after the hidden state of each head in `context.exits`, by ascending layer; counts the exits.

    The graph must be that of a text classifier, with logits of shape [batch, labels] as its only output.

    Raises:
        GraphError: As in `hidden_states`.
    """
    from onnx_ir.passes import common

    states = hidden_states(model)
    logits = model.graph.outputs[0]
    targets = [*(states[head.layer] for head in context.exits), logits]
    scope = _Scope(model, "exit0")
    result = _exit(scope, targets, context.exits)
    result.shape, result.type = logits.shape, logits.type
    result.name, logits.name = logits.name, f"{logits.name}/last"
    model.graph.extend(scope.nodes)
    model.graph.outputs[0] = result
    common.RemoveUnusedNodesPass()(model)
    _move_weights(model)
    return model, len(context.exits)


def change_confidence(model: ir.Model, change: Callable[[float], float]) -> None:
    """Changes the confidence threshold of all exits of a graph; `change` maps the old value to the new one."""
    import numpy as np
    import onnx_ir as ir

    stored = model.graph.initializers[CONFIDENCE]
    confidence = np.float32(change(float(array_of(stored))))
    stored.const_value = ir.tensor(np.array(confidence), name=CONFIDENCE)


def _move_weights(model: ir.Model) -> None:
    """Moves each weight that only one branch reads into this branch.

    When ONNX Runtime loads a branch, it prepacks the weights of the branch, but not weights of the outer graph. The
    option `toolchain.backends.ort.EXACT_PRODUCTS` also changes only the weights of the branch. ONNX Runtime needs more
    memory for weights in a branch, because each `If` node around them keeps a copy.
    """
    for name, weight in list(model.graph.initializers.items()):
        graphs = {node.graph for node in weight.consumers()}
        if len(graphs) == 1 and (graph := graphs.pop()) is not model.graph and graph is not None:
            del model.graph.initializers[name]
            graph.register_initializer(weight)


@dataclass
class _Scope:
    """The new nodes of a graph or of a branch.

    Attributes:
        model: The model, whose main graph has the weights of all branches.
        name: Prefix for the names of new nodes.
        values: Maps values of the original graph to their values in the branch.
        nodes: The new nodes, in order.
    """

    model: ir.Model
    name: str
    values: dict[ir.Value, ir.Value] = field(default_factory=dict)
    nodes: list[ir.Node] = field(default_factory=list)

    def add(self, operator: str, inputs: Sequence[ir.Value], suffix: str, **attributes: Any) -> ir.Value:
        """Adds a node with one output, and returns the output; see `adder`."""
        return adder(self.name, self.nodes)(operator, inputs, suffix, **attributes)

    def number(self, value: int, is_list: bool = False) -> ir.Value:
        """Returns a stored integer, or a list of this integer."""
        import numpy as np

        shape = "list" if is_list else "number"
        return constant(self.model, f"exits/{shape}/{value}", np.array([value] if is_list else value, np.int64))

    def find(self, value: ir.Value) -> ir.Value:
        """Returns the copy of a value in this branch; returns the value itself if the branch has no copy."""
        return self.values.get(value, value)

    def compute(self, target: ir.Value) -> ir.Value:
        """Copies the nodes that compute `target` into the branch, and returns the copy of `target`."""
        missing = _nodes_between(self.values, target)
        depends = set(self.model.graph.inputs)
        for node in self.model.graph:
            if not depends.isdisjoint(node.inputs):
                depends.update(node.outputs)
                if node in missing:  # a branch can read all other values from the outer graph
                    self._copy(node)
        return self.find(target)

    def _copy(self, node: ir.Node) -> None:
        import onnx_ir as ir

        inputs = [None if value is None else self.find(value) for value in node.inputs]
        attributes = list(node.attributes.values())
        if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in attributes):
            raise GraphError(f"The layers contain a node {node.op_type} with a graph of its own.", "Leave exits out.")
        name = f"{self.name}/{node.name}"
        copy = ir.Node(node.domain, node.op_type, inputs, attributes, num_outputs=len(node.outputs), name=name)
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            if old.name:
                new.name = f"{self.name}/{old.name}"
            self.values[old] = new
        self.nodes.append(copy)


def _exit(scope: _Scope, targets: Sequence[ir.Value], heads: Sequence[ExitHead]) -> ir.Value:
    """Adds the nodes of an exit and all later nodes; returns the logits of all texts of the scope.

    Args:
        scope: The graph or branch, which contains the first target already.
        targets: Values of the original graph: the hidden state of each head, and the logits.
        heads: The head of this exit, and all later heads.
    """
    import onnx_ir as ir

    model, head = scope.model, heads[0]
    state, mask = scope.find(targets[0]), scope.find(_mask(model))
    logits = _head_logits(scope, state, mask, head)
    rows = _remaining_rows(scope, logits, head)
    all_sure = scope.add("Equal", [scope.add("Size", [rows], "unsure"), scope.number(0)], "all_sure")

    then, rest = _Scope(model, f"{scope.name}/done"), _Scope(model, f"after{head.layer}")
    done = then.add("Identity", [logits], "logits")
    index = rest.add("Unsqueeze", [rows, rest.number(1, is_list=True)], "index")
    for value in (targets[0], *model.graph.inputs, *_shape_sources(model, targets)):
        rest.values[value] = rest.add("Gather", [scope.find(value), rows], f"rows/{value.name}", axis=0)
    deeper = rest.compute(targets[1])
    if len(heads) > 1:
        deeper = _exit(rest, targets[1:], heads[1:])
    merged = rest.add("ScatterND", [logits, index, deeper], "logits")
    branches = {
        name: ir.Graph([], [output], nodes=part.nodes, name=f"{part.name}/{name}")
        for name, part, output in (("then_branch", then, done), ("else_branch", rest, merged))
    }
    return scope.add("If", [all_sure], "logits", **branches)


def _shape_sources(model: ir.Model, targets: Sequence[ir.Value]) -> list[ir.Value]:
    """Returns the values before the first target whose shape a node after the first target reads."""
    before = _nodes_between(set(), targets[0])
    texts = {value for node in _text_nodes(model) if node in before for value in node.outputs}
    after = _nodes_between(texts, targets[-1])
    measured = {value for node in after for value in node.inputs if value is not None and value in texts}
    return sorted(measured - {targets[0]}, key=lambda value: value.name or "")


def _nodes_between(starts: Container[ir.Value], end: ir.Value) -> set[ir.Node]:
    """Returns the nodes that compute `end` from weights, inputs of the graph and `starts`."""
    nodes: set[ir.Node] = set()
    stack = [end]
    while stack:
        value = stack.pop()
        producer = value.producer()
        if value not in starts and producer is not None and producer not in nodes:
            nodes.add(producer)
            stack += [each for each in producer.inputs if each is not None]
    return nodes


def _mask(model: ir.Model) -> ir.Value:
    """Returns the attention mask, an input of the graph.

    Raises:
        GraphError: The graph has no such input.
    """
    mask = next((value for value in model.graph.inputs if value.name == MASK), None)
    if mask is None:
        raise GraphError(f"The graph has no input {MASK}.", "Leave exits out.")
    return mask


def _head_logits(scope: _Scope, state: ir.Value, mask: ir.Value, head: ExitHead) -> ir.Value:
    """Returns the logits that the head predicts, of shape [batch, labels]."""
    import numpy as np

    (filters, bias), (last_weight, last_bias) = (
        (
            constant(scope.model, f"exit{head.layer}/weight{index}", weight),
            constant(scope.model, f"exit{head.layer}/bias{index}", bias),
        )
        for index, (weight, bias) in enumerate(zip(head.weights, head.biases, strict=True))
    )
    second, last = scope.number(1, is_list=True), scope.number(-1, is_list=True)
    real = scope.add("Cast", [mask], "exit/real", to=1)
    real_tokens = scope.add("Unsqueeze", [real, last], "exit/real_tokens")
    # Padding counts as zeros, like the neighbours that the first and the last token of a text lack.
    tokens = scope.add("Mul", [state, real_tokens], "exit/tokens")
    # A negative number removes tokens.
    moved = {"before": [0, 1, 0, 0, -1, 0], "after": [0, -1, 0, 0, 1, 0]}
    before, after = (
        scope.add(
            "Pad", [tokens, constant(scope.model, f"exits/{name}", np.array(pads, np.int64))], f"exit/tokens_{name}"
        )
        for name, pads in moved.items()
    )
    neighbours = scope.add("Concat", [before, tokens, after], "exit/neighbours", axis=-1)
    product = scope.add("MatMul", [neighbours, filters], "exit/product")
    units = scope.add("Relu", [scope.add("Add", [product, bias], "exit/sum")], "exit/relu")
    real_units = scope.add("Mul", [units, real_tokens], "exit/units")
    count = scope.add("ReduceSum", [real, second], "exit/count", keepdims=1)
    mean = scope.add(
        "Div", [scope.add("ReduceSum", [real_units, second], "exit/total", keepdims=0), count], "exit/mean"
    )
    pooled = scope.add("Concat", [_reduce(scope, "ReduceMax", real_units, 1, "largest"), mean], "exit/pooled", axis=-1)
    return scope.add("Gemm", [pooled, last_weight, last_bias], "exit/linear")


def _remaining_rows(scope: _Scope, logits: ir.Value, head: ExitHead) -> ir.Value:
    """Returns the indices of the texts whose confidence is below the threshold, of shape [texts]."""
    import numpy as np

    if head.several_labels:  # a label is as certain as its logit is far from 0
        certainty = scope.add("Sigmoid", [scope.add("Abs", [logits], "exit/distance")], "exit/probabilities")
        confidence = _reduce(scope, "ReduceMin", certainty, -1, "confidence")
    else:
        probabilities = scope.add("Softmax", [logits], "exit/probabilities", axis=-1)
        confidence = _reduce(scope, "ReduceMax", probabilities, -1, "confidence")
    threshold = constant(scope.model, CONFIDENCE, np.array(head.confidence, np.float32))
    is_unsure = scope.add("Less", [confidence, threshold], "exit/is_unsure")
    rows = scope.add("NonZero", [is_unsure], "exit/unsure_rows")
    return scope.add("Squeeze", [rows, scope.number(0, is_list=True)], "exit/rows")


def _reduce(scope: _Scope, operator: str, value: ir.Value, axis: int, name: str) -> ir.Value:
    """Reduces one axis; before opset 18, the axes are an attribute."""
    if scope.model.opset_imports[""] < 18:
        return scope.add(operator, [value], f"exit/{name}", axes=[axis], keepdims=0)
    axes = scope.number(axis, is_list=True)
    return scope.add(operator, [value, axes], f"exit/{name}", keepdims=0)
