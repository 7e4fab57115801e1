"""A session of ONNX Runtime that reports CUDA or TensorRT as its provider, although the CPU runs it."""

from types import SimpleNamespace

import onnxruntime as ort

REAL_SESSION, REAL_VALUE = ort.InferenceSession, ort.OrtValue


class SessionOnHost:
    """A real CPU session that reports the requested provider and keeps GPU tensors in the memory of the host.

    With the provider's option ``enable_cuda_graph``, the first run with a number keeps its binding. Each later run with
    this number computes the kept binding, whatever binding the run names, as a CUDA graph has fixed addresses.
    """

    # `pretend_cuda` makes a subclass with the following attributes for each test.
    cpu_operators: tuple
    devices: list
    options: list
    numbers: list  # of the runs

    def __init__(self, path, options, providers):
        self._real = REAL_SESSION(path, options, providers=["CPUExecutionProvider"])
        self.options.append(providers)
        self._provider, provider_options = providers[0]
        self._has_graphs = provider_options.get("enable_cuda_graph") == "1"
        self._graphs = {}

    def get_providers(self):
        return [self._provider, "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self):
        def assignment(provider, kinds):
            return SimpleNamespace(ep_name=provider, get_nodes=lambda: [SimpleNamespace(op_type=k) for k in kinds])

        operators = [node.op_type for p in self._real.get_provider_graph_assignment_info() for node in p.get_nodes()]
        return [
            assignment(self._provider, operators),
            assignment("CPUExecutionProvider", [*self.cpu_operators, "Shape", "Slice"]),
        ]

    def io_binding(self):
        binding, devices = self._real.io_binding(), self.devices

        def bind_output(name, kind, device_id):
            devices.append((kind, device_id))
            binding.bind_output(name, "cpu")

        return SimpleNamespace(
            bind_ortvalue_input=binding.bind_ortvalue_input,
            bind_ortvalue_output=binding.bind_ortvalue_output,
            bind_output=bind_output,
            copy_outputs_to_cpu=binding.copy_outputs_to_cpu,
            synchronize_outputs=binding.synchronize_outputs,
            real=binding,
        )

    def run(self, names, batch, options=None):
        assert self._number(options) in (None, -1), "a graph needs fixed addresses"
        return self._real.run(names, batch)

    def run_with_iobinding(self, binding, options=None):
        number = self._number(options)
        real = binding.real if number in (None, -1) else self._graphs.setdefault(number, binding.real)
        self._real.run_with_iobinding(real)

    def _number(self, options):
        """Returns the number of the run's graph; -1 for a run without a graph, and None in a session without graphs."""
        if not self._has_graphs:
            return None
        self.numbers.append(int(options.get_run_config_entry("gpu_graph_id")))
        return self.numbers[-1]

    def get_outputs(self):
        return self._real.get_outputs()


def pretend_cuda(monkeypatch):
    """Makes ONNX Runtime report a GPU, although every session runs on the CPU; returns the class of the sessions."""
    attributes = {"cpu_operators": (), "devices": [], "options": [], "numbers": []}
    session_type = type("OnTheHost", (SessionOnHost,), attributes)

    def from_numpy(array, kind, device_id):
        session_type.devices.append((kind, device_id))
        return REAL_VALUE.ortvalue_from_numpy(array.copy(), "cpu", 0)

    providers = [f"{name}ExecutionProvider" for name in ("Tensorrt", "CUDA", "CPU")]
    monkeypatch.setattr(ort, "get_available_providers", lambda: providers)
    monkeypatch.setattr(ort, "InferenceSession", session_type)
    monkeypatch.setattr(ort, "OrtValue", SimpleNamespace(ortvalue_from_numpy=from_numpy))
    monkeypatch.setattr(ort, "preload_dlls", lambda: session_type.options.append("preloaded"), raising=False)
    return session_type
