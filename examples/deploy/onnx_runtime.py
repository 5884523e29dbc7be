"""Run an exported shield in ONNX Runtime at 1 kHz, without PyTorch and without Gymnasium.

    pip install onnxruntime numpy
    safeshield export shield.safetensors -o shield.onnx
    python onnx_runtime.py shield.onnx --seconds 10

The program imports ONNX Runtime, NumPy and Python's standard library alone. It proposes a random
action every millisecond, executes what the graph returns, and prints a histogram of the time of a
decision. A controller of your own takes the place of `sense` and `propose`.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from typing import Any

import numpy as np
import onnxruntime


class Shield:
    """An exported shield, for one observation at a time.

    Args:
        path: File that `safeshield export` wrote.

    Attributes:
        contents: What the graph says of itself, such as its "promise".
    """

    outputs = ("action_executed", "value", "accepted", "certified", "valid")

    def __init__(self, path: str) -> None:
        options = onnxruntime.SessionOptions()
        # One thread: for networks of this size, waking others takes longer than the products.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self.contents: dict[str, Any] = json.loads(
            self._session.get_modelmeta().custom_metadata_map["safeshield"]
        )
        self.inputs = {one.name: one for one in self._session.get_inputs()}

    def filter(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Return the outputs for one row of inputs, given as arrays (1, ...) by name."""
        return dict(zip(self.outputs, self._session.run(self.outputs, inputs), strict=True))


def main() -> None:
    """Decide every millisecond, and print how long a decision takes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("graph")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=1000.0, help="decisions a second")
    arguments = parser.parse_args()
    shield = Shield(arguments.graph)
    print(f"inputs: {list(shield.inputs)}")
    print(f"promise: {shield.contents['promise']}")

    rng = np.random.default_rng(0)
    kinds = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(int64)": np.int64}

    def row(name: str) -> np.ndarray:
        shape = [size if isinstance(size, int) else 1 for size in shield.inputs[name].shape]
        return rng.uniform(-1.0, 1.0, shape).astype(kinds[shield.inputs[name].type])

    for _ in range(200):  # The first calls allocate memory.
        shield.filter(**{name: row(name) for name in shield.inputs})
    gc.collect()
    gc.disable()  # A collection takes milliseconds.
    times, late, replaced = [], 0, 0
    period, start = 1.0 / arguments.rate, time.perf_counter()
    for step in range(int(arguments.seconds * arguments.rate)):
        while (now := time.perf_counter()) < start + step * period:
            time.sleep(0)
        late += now > start + (step + 1) * period
        given = {name: row(name) for name in shield.inputs}  # sense() and propose() of your own
        before = time.perf_counter()
        told = shield.filter(**given)
        times.append(time.perf_counter() - before)
        replaced += not told["accepted"][0]
        # Send told["action_executed"][0] to the plant. Where told["valid"][0] is False, the
        # observation or the proposal could not be used, and the fallback acts.
    micros = np.array(times) * 1e6
    print(f"{len(micros)} decisions, {replaced} replaced, {late} began a period or more late")
    for share in (50, 90, 99, 99.9, 100):
        print(f"{share:5g}%: {np.percentile(micros, share):8.1f} us")
    edges = np.geomspace(10.0, 10_000.0, 16)
    counts, _ = np.histogram(micros, np.concatenate([[0.0], edges, [np.inf]]))
    for low, count in zip(np.concatenate([[0.0], edges]), counts, strict=True):
        if count:
            print(f"from {low:7.0f} us {'#' * int(np.ceil(50 * count / len(micros)))} {count}")


if __name__ == "__main__":
    main()
