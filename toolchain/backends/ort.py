"""The ONNX Runtime backend, with default options, so that results match an app that loads the same file."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import DeviceMemoryError, GraphError, ProviderError, ToolchainError
from toolchain.results.providers import CUDA_GRAPHS, TENSORRT
from toolchain.results.session_settings import DEFAULT, SessionSettings
from toolchain.system.extras import install_hint

if TYPE_CHECKING:
    import numpy as np

    from toolchain.backends import Place

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    CUDA_GRAPHS: "CUDAExecutionProvider",
    TENSORRT: "TensorrtExecutionProvider",
}
# Hides ONNX Runtime's log: an error is also an exception, and this module checks the causes of warnings itself.
_FATAL_ONLY = 4
# An x86 processor without VNNI adds two U8 × S8 products in 16 bits, and this sum can saturate. `EXACT_PRODUCTS` is the
# session option with which ONNX Runtime converts the weights to unsigned integers, so that 8-bit products are exact.
# On a processor whose sums cannot saturate, `EXACT_PRODUCTS` only makes int8 slower.
EXACT_PRODUCTS = ("session.x64quantprecision", "1")
# Session options that say whether idle threads keep their processors busy.
SPINNING = ("session.intra_op.allow_spinning", "session.inter_op.allow_spinning")
# Operators that compute shapes and masks. Even in a session on CUDA, ONNX Runtime runs shape operators on the CPU,
# because they process only a few integers.
SHAPE_OPERATORS = {
    *("Shape", "Size", "Gather", "Unsqueeze", "Squeeze", "Slice", "Concat", "Cast", "Range", "ConstantOfShape"),
    *("Constant", "Equal", "Where", "Expand", "Reshape", "Add", "Sub", "Mul", "Div"),
}
# Inner dimension, activation value and weight value of the matrix product in `extreme_product`.
_INNER, _ACTIVATION, _WEIGHT = 4, 255, 127
# The parts of a message for an operator that fails: its type, the name of its node, and the fault.
_OPERATOR_FAULT = re.compile(r"running (\w+) node\. Name:'([^']*)'.*?Status Message: (.*)", re.S)
_SOURCE_PLACE = re.compile(r"^\S+:\d+ .*?(?:was false\. |$)")  # file, line, function and condition in the source
_MEMORY_SIZE = re.compile(
    r"(?:requested buffer of size|Available memory of \d+ is smaller than requested bytes of) (\d+)"
)


def session_options(threads: int, settings: SessionSettings = DEFAULT, *, exact: bool = True) -> Any:
    """Returns the options of a session.

    Args:
        threads: Number of threads within an operator.
        settings: The other settings of the session.
        exact: True prevents saturation of int8 products; False allows saturation.
    """
    options = _plain_options(threads)
    _apply(settings, options)
    if exact and saturates():
        options.add_session_config_entry(*EXACT_PRODUCTS)
    return options


def _plain_options(threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL_ONLY
    return options


def _apply(settings: SessionSettings, options: Any) -> None:
    """Translates settings to options of ONNX Runtime; an option that has its default value remains unset."""
    import onnxruntime as ort

    options.execution_mode = getattr(ort.ExecutionMode, f"ORT_{settings.execution_mode.upper()}")
    options.inter_op_num_threads = settings.inter_op_threads
    level = f"ORT_ENABLE_{settings.graph_optimization.upper()}"
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.enable_cpu_mem_arena = settings.memory_arena
    options.enable_mem_pattern = settings.memory_pattern
    if not settings.spinning:
        for key in SPINNING:
            options.add_session_config_entry(key, "0")


@functools.cache
def saturates(*, exact: bool = False) -> bool:
    """Computes one 8-bit product with ONNX Runtime and returns whether it saturates on this processor.

    Args:
        exact: Whether the session computes with the option `EXACT_PRODUCTS`; False keeps the default options.
    """
    import numpy as np
    import onnxruntime as ort

    options = _plain_options(1)
    if exact:
        options.add_session_config_entry(*EXACT_PRODUCTS)
    session = ort.InferenceSession(extreme_product(), options, providers=[PROVIDERS["cpu"]])
    product = session.run(None, {"activations": np.full((1, _INNER), _ACTIVATION, np.uint8)})[0]
    return bool((product != _INNER * _ACTIVATION * _WEIGHT).any())


def extreme_product() -> bytes:
    """Returns an ONNX model that multiplies uint8 activations by int8 weights, with every weight equal to 127.

    The model has a single node, whose operator is MatMulInteger. The value 127 is the largest int8 value.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    weights = {
        "weights": np.full((_INNER, 1), _WEIGHT, np.int8),
        "zero_point": np.array(0, np.uint8),
        "weight_zero_point": np.array(0, np.int8),
    }
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["activations", "weights", "zero_point", "weight_zero_point"], ["product"])],
        "extreme_product",
        [helper.make_tensor_value_info("activations", TensorProto.UINT8, [1, _INNER])],
        [helper.make_tensor_value_info("product", TensorProto.INT32, [1, 1])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def exact_model(path: Path, *, exact: bool) -> str | bytes:
    """Returns the path of the model file; if the model must change to be exact, returns the changed model as bytes.

    An .onnx model must change if `exact` is true, its layers share int8 weights, and 8-bit products saturate on this
    processor. The function then converts the weights to unsigned integers, because 8-bit products of unsigned integers
    never saturate. Without shared weights, the session option `EXACT_PRODUCTS` is enough: ONNX Runtime itself converts
    the weights. ONNX Runtime refuses `EXACT_PRODUCTS` for layers that share weights.
    """
    if not exact or path.suffix != ".onnx" or not saturates():
        return str(path)
    import onnx_ir as ir

    from toolchain.passes import read
    from toolchain.passes.unsigned_weights import shares_int8_weights, unsigned_weights

    model = read(path)
    if not shares_int8_weights(model):
        return str(path)
    unsigned_weights(model)
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


class OrtSession:
    """A `Session` that runs on ONNX Runtime."""

    _run_options: Any = None  # options of a run; None for the default options
    _start_hint = (
        "Install the CUDA and cuDNN versions that ONNX Runtime was built for (`toolchain doctor` names them), or leave "
        "out --provider cuda."
    )

    def __init__(self, folder: Path, place: Place) -> None:
        import onnxruntime as ort
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        provider = PROVIDERS[place.provider]
        if provider not in ort.get_available_providers():
            raise ProviderError(
                f"ONNX Runtime {ort.__version__} is installed without {provider}.",
                "Install onnxruntime-gpu instead of onnxruntime (never both, because they share one folder): "
                "`make install RUNTIME=gpu`, or RUNTIME=cuda12 for an older GPU or driver.",
            )
        self._place = place
        options = session_options(place.threads, place.settings, exact=place.exact)
        # With the option `record_ep_graph_assignment_info`, ONNX Runtime records each node's provider while it creates
        # the session. `record_ep_graph_assignment_info` does not slow later calls of the session.
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if place.provider != "cpu" and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # pip installs CUDA and cuDNN in folders that the system's loader does not search.
        # A model file in a bundle may have another name than model.onnx, and phones use files in .ort format.
        path = folder if folder.suffix in (".onnx", ".ort") else folder / "model.onnx"
        try:
            self._session = ort.InferenceSession(
                exact_model(path, exact=place.exact), options, providers=[(provider, self._provider_options())]
            )
        except state.NotImplemented as error:
            raise GraphError(
                f"ONNX Runtime has no kernel for an operator of {path}: {describe(error)}.", "Build the variant again."
            ) from error
        except failures() as error:
            check_memory(error)
            raise self._load_error(path, describe(error)) from error
        self._output = self._session.get_outputs()[0].name
        self._check_provider(provider)
        # If a fallback is allowed, all nodes may run on the CPU; then inputs and outputs must stay in host memory.
        self._on_host = self._session.get_providers()[0] == PROVIDERS["cpu"]

    def _provider_options(self) -> dict[str, str]:
        """Returns the options of the execution provider."""
        return {} if self._place.provider == "cpu" else {"device_id": str(self._place.device_id)}

    def _load_error(self, path: Path, cause: str) -> ToolchainError:
        """Returns the error for a model that ONNX Runtime cannot load."""
        return GraphError(f"ONNX Runtime cannot load {path}: {cause}.", "Build the variant again.")

    def _check_provider(self, provider: str) -> None:
        """Raises `ProviderError` if the session, or a node outside `SHAPE_OPERATORS`, does not run on `provider`.

        ONNX Runtime drops a provider that cannot start, logs one line and runs the session on the CPU. If the
        provider has no kernel for a node, ONNX Runtime runs the node on the CPU and logs nothing.
        """
        if self._place.allow_fallback:
            return
        providers = self._session.get_providers()
        if providers[0] != provider:
            raise ProviderError(
                f"ONNX Runtime could not start {provider} and uses {', '.join(providers)} instead.", self._start_hint
            )
        if misplaced := self._misplaced_nodes(provider):
            operators = ", ".join(f"{count} {kind}" for kind, count in sorted(misplaced.items()))
            raise ProviderError(
                f"{provider} has no kernel for {operators}, so ONNX Runtime would run these operators on the CPU and "
                "copy their data between CPU and GPU.",
                "Measure onnx-fp16 on the GPU, or allow operators on the CPU with --provider cuda --allow-fallback.",
            )

    def _count_nodes(self) -> dict[str, Counter[str]]:
        """Returns the number of nodes by provider and operator type; empty if ONNX Runtime records no providers."""
        counts: dict[str, Counter[str]] = {}
        if hasattr(self._session, "get_provider_graph_assignment_info"):
            for part in self._session.get_provider_graph_assignment_info():
                counts.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
        return counts

    def _misplaced_nodes(self, provider: str) -> Counter[str]:
        """Returns the number of nodes that do not run on `provider`, by operator type and without `SHAPE_OPERATORS`."""
        other_counts = [kinds for name, kinds in self._count_nodes().items() if name != provider]
        return Counter({k: n for kinds in other_counts for k, n in kinds.items() if k not in SHAPE_OPERATORS})

    def run(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """See `Session.run`; on a GPU, I/O binding copies each input and the logits only once."""
        with translate_errors(batch):
            if self._on_host:
                logits: np.ndarray = self._session.run(None, batch)[0]
            else:
                binding = self._bind(batch)
                self._session.run_with_iobinding(binding, self._run_options)
                logits = binding.copy_outputs_to_cpu()[0]
        return logits

    def outputs(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns every output of the graph for one batch, by output name; the batch is as in `Session.run`."""
        names = [output.name for output in self._session.get_outputs()]
        with translate_errors(batch):
            return dict(zip(names, self._session.run(names, batch, self._run_options), strict=True))

    def resident(self, batch: dict[str, np.ndarray]) -> Callable[[], object]:
        """See `Session.resident`."""
        binding = self._bind(batch)

        def run_model() -> None:
            self._session.run_with_iobinding(binding, self._run_options)
            binding.synchronize_outputs()

        return run_model

    def _bind(self, batch: dict[str, np.ndarray]) -> Any:
        """Returns an I/O binding that holds the batch on the session's device and leaves the logits there."""
        import onnxruntime as ort

        device = ("cpu", 0) if self._on_host else ("cuda", self._place.device_id)
        binding = self._session.io_binding()
        for name, array in batch.items():
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, *device))
        binding.bind_output(self._output, *device)
        return binding

    def facts(self) -> dict[str, Any]:
        """Returns the provider in use, the threads, and the number of nodes on each provider.

        The fact ``fallback`` exists only if nodes outside `SHAPE_OPERATORS` do not run on the requested provider. The
        fact ``option`` is the session option that this processor needs for exact 8-bit products.
        """
        provider, actual_provider = PROVIDERS[self._place.provider], self._session.get_providers()[0]
        nodes = {name: kinds.total() for name, kinds in self._count_nodes().items()}
        facts: dict[str, Any] = {"provider": actual_provider, "threads": self._place.threads, "nodes": nodes}
        if actual_provider == PROVIDERS["cpu"] and self._place.exact and saturates():
            facts["option"] = EXACT_PRODUCTS
        misplaced_count = self._misplaced_nodes(provider).total()
        if actual_provider != provider:
            facts["fallback"] = f"runs on {actual_provider}, not on {provider}"
        elif misplaced_count:
            facts["fallback"] = f"{misplaced_count} of {sum(nodes.values())} nodes run on the CPU"
        return facts

    def close(self) -> None:
        """See `Session.close`."""
        del self._session


@contextmanager
def translate_errors(batch: dict[str, np.ndarray]) -> Iterator[None]:
    """Converts the errors of ONNX Runtime for a batch to `GraphError` or `DeviceMemoryError`."""
    try:
        yield
    except failures() as error:
        check_memory(error)
        shape = " × ".join(map(str, batch["input_ids"].shape))
        raise GraphError(
            f"The graph fails on a batch of {shape} tokens: {describe(error)}.", "Build the variant again."
        ) from error


def add_extensions(options: Any) -> None:
    """Adds the operators of onnxruntime-extensions to the session options `options`.

    Raises:
        ProviderError: onnxruntime-extensions is not installed.
    """
    try:
        import onnxruntime_extensions as extensions
    except ImportError as error:
        raise ProviderError(
            "A tokenizer in the graph needs onnxruntime-extensions, which is not installed.",
            install_hint("text"),
        ) from error
    options.register_custom_ops_library(extensions.get_library_path())


def describe(error: Exception) -> str:
    """Returns one of ONNX Runtime's errors as a line, without its code and the place in ONNX Runtime's source."""
    message = " ".join(re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error)).replace("\\n", " ").split())
    if match := _OPERATOR_FAULT.search(message):
        fault = _SOURCE_PLACE.sub("", match[3]) or match[3]
        message = f"the operator {match[1]} ({match[2]}) fails: {fault}"
    return message.rstrip(".")


def failures() -> tuple[type[Exception], ...]:
    """Returns the exception classes that ONNX Runtime raises for an unusable file, batch or device."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        state.InvalidProtobuf,
        state.InvalidGraph,
        state.NoSuchFile,
        state.Fail,
        state.InvalidArgument,
        state.RuntimeException,
        state.NotImplemented,
        state.EPFail,
    )


def check_memory(error: Exception) -> None:
    """Raises `DeviceMemoryError` if the device ran out of memory."""
    match = _MEMORY_SIZE.search(str(error))
    if match or "out of memory" in str(error):
        raise DeviceMemoryError.failed_allocation(int(match[1]) if match else None) from error
