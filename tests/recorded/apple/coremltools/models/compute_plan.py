"""Its plan: two linears and a matmul on the Neural Engine, a softmax on the CPU, and a constant nowhere."""

from types import SimpleNamespace

PLAN = {
    "const": None,
    "ios18.linear": ("MLNeuralEngineComputeDevice", 0.3),
    "ios18.matmul": ("MLNeuralEngineComputeDevice", 0.25),
    "ios18.softmax": ("MLCPUComputeDevice", 0.1),
}


class MLComputePlan:
    @classmethod
    def load_from_path(cls, path, compute_units):  # noqa: ARG003 - the documented arguments
        return cls()

    @property
    def model_structure(self):
        operations = [SimpleNamespace(operator_name=name) for name in (*PLAN, "ios18.linear")]
        block = SimpleNamespace(operations=operations)
        return SimpleNamespace(program=SimpleNamespace(functions={"stream": SimpleNamespace(block=block)}))

    def get_compute_device_usage_for_mlprogram_operation(self, operation):
        told = PLAN[operation.operator_name]
        return told and SimpleNamespace(preferred_compute_device=type(told[0], (), {})())

    def get_estimated_cost_for_mlprogram_operation(self, operation):
        told = PLAN[operation.operator_name]
        return told and SimpleNamespace(weight=told[1])
