"""Its model: `logits` are the sum of the features plus what an utterance had before, as is the cache."""

from pathlib import Path

import numpy as np


class MLModel:
    def __init__(self, model, *, compute_units, function_name):
        self.path, self.units, self.entry = Path(model), compute_units, function_name
        content = (self.path / "content").read_text()
        if content != "sound":
            raise ValueError(f"the package is {content}")

    def predict(self, inputs, state=None):  # noqa: ARG002 - the documented arguments
        total = inputs["past"] + inputs["features"].sum()
        return {"past_next": total, "logits": np.full((1, 2, 4), total[0], np.float32)}

    def get_compiled_model_path(self):
        return str(self.path)

    def make_state(self):
        return object()
