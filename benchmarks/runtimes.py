"""One runtime in a process of its own: ``python -m benchmarks.runtimes NAME`` obeys a line of JSON at a time.

Each answer is a line of JSON too. networks.py sends the commands; ONNX Runtime and OpenVINO run without torch in
their process. What a network is stands in a folder: weights.pt, network.onnx, images.npy, expected.npy.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

LAYOUTS = ("nchw", "channels_last")
Run = Callable[[], np.ndarray]


class Runtime:
    """`ready` returns a call of the network on the folder's first images; `set_threads` holds for all calls.

    Calls are made and run in `inference()`: gradients are off for all of them, as in a server; to switch them off at
    each call takes 2.4 us.
    """

    layouts: tuple[str, ...] = ("nchw",)

    def ready(self, folder: Path, images: np.ndarray, threads: int, layout: str) -> Run:
        raise NotImplementedError

    def inference(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def set_threads(self, threads: int) -> None:
        pass

    def forget(self) -> None:
        pass


class OnnxRuntime(Runtime):
    """Its defaults, among them that its threads spin while they wait."""

    def ready(self, folder: Path, images: np.ndarray, threads: int, layout: str) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_free_dimension_override_by_name("batch", len(images))
        session = onnxruntime.InferenceSession(folder / "network.onnx", options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: images}
        return lambda: session.run(None, feed)[0]


class OpenVino(Runtime):
    """In float32: where the processor has bfloat16 products, its own default is to round to them."""

    def ready(self, folder: Path, images: np.ndarray, threads: int, layout: str) -> Run:
        import openvino

        model = openvino.Core().read_model(folder / "network.onnx")
        model.reshape(list(images.shape))
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
        return lambda: request.infer([images], share_inputs=True, share_outputs=True)[0]


class Torch(Runtime):
    """Eager torch, and what all that is made of a torch module shares."""

    layouts = LAYOUTS

    def __init__(self) -> None:
        self.made: dict[tuple, Callable] = {}

    def make(self, model, images):
        return model

    def ready(self, folder: Path, images: np.ndarray, threads: int, layout: str) -> Run:
        import torch

        from . import models

        format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        placed = torch.from_numpy(images).contiguous(memory_format=format)
        key = (folder, layout, len(images), threads)
        if key not in self.made:
            if (folder / "module.pt").exists():  # a single layer
                model = torch.load(folder / "module.pt", weights_only=False)
            else:
                model = models.build(models.name_of(folder.name)).eval()
                model.load_state_dict(torch.load(folder / "weights.pt"))
            self.made[key] = self.make(model.to(memory_format=format), placed)
        made = self.made[key]
        return lambda: made(placed).numpy()

    def inference(self) -> contextlib.AbstractContextManager:
        import torch

        return torch.no_grad()

    def set_threads(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)

    def forget(self) -> None:
        import torch

        self.made = {}
        torch.compiler.reset()


class OneDnn(Torch):
    """oneDNN's convolution called by name, of a single layer: it packs the weight at each call."""

    def make(self, model, images):
        import torch

        where = (model.padding, model.stride, model.dilation, model.groups)
        return lambda x: torch.ops.aten.mkldnn_convolution(x, model.weight, model.bias, *where)


class Compiled(Torch):
    """torch.compile with freezing, for one size of batch and one number of threads."""

    def make(self, model, images):
        import torch

        torch._dynamo.config.recompile_limit = 64  # each model here is an object of its own, but of one class
        torch._inductor.config.freezing = True
        return torch.compile(model, dynamic=False)


class Frozen(Torch):
    """sepconv_ext.freeze."""

    def make(self, model, images):
        import sepconv_ext

        return sepconv_ext.freeze(model, images)


class Converted(Compiled):
    """sepconv_ext.convert_, then compiled as above."""

    def make(self, model, images):
        import sepconv_ext

        sepconv_ext.convert_(model)
        return super().make(model, images)


PEERS = {"torch": Torch, "compile": Compiled, "onnxruntime": OnnxRuntime, "openvino": OpenVino}
OURS = {"sepconv freeze": Frozen, "sepconv convert": Converted}
LAYER_PEERS = {"onednn": OneDnn}
RUNTIMES = PEERS | LAYER_PEERS | OURS
PACKAGES = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}

TOLERANCE = 1e-3  # of the largest logit: float32 against float64, through some fifty layers


def agreement(result: np.ndarray, exact: np.ndarray) -> dict:
    """Logits within rounding of those of the float64 network, and the same five best of each image, in order.

    Two logits that are closer than the rounding may change their places. Of images there are no best."""
    if result.shape != exact.shape or not np.isfinite(result).all():
        return {"difference": float("inf"), "same_top5": False, "agrees": False}
    apart = np.abs(result - exact).max()
    difference = float(apart / np.abs(exact).max())
    if exact.ndim > 2:
        return {"difference": difference, "same_top5": True, "agrees": difference <= TOLERANCE}
    best, expected = (np.argsort(-logits, axis=-1, kind="stable")[:, :5] for logits in (result, exact))
    swapped = np.abs(np.take_along_axis(exact, best, -1) - np.take_along_axis(exact, expected, -1))
    same = bool((swapped <= 2 * apart).all())
    return {"difference": difference, "same_top5": same, "agrees": same and difference <= TOLERANCE}


def sample(run: Run, seconds: float) -> list[float]:
    """Seconds of each call for about that long, after calls that wake the threads and fill the caches."""
    began = time.perf_counter()
    run()
    once = time.perf_counter() - began
    if once < seconds / 4:
        run()
    samples = []
    while not samples or sum(samples) + 0.5 * once < seconds:
        began = time.perf_counter()
        run()
        samples.append(time.perf_counter() - began)
    return samples


class Worker:
    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.calls: dict[tuple, Run] = {}

    def ready(self, folder: str, batch: int, threads: int, layout: str) -> dict:
        """Makes a call and compares what it returns; the call is kept for `time`."""
        images, exact = (np.load(Path(folder) / f"{name}.npy")[:batch] for name in ("images", "expected"))
        self.runtime.set_threads(threads)
        began = time.perf_counter()
        with self.runtime.inference():
            run = self.runtime.ready(Path(folder), np.ascontiguousarray(images), threads, layout)
            result = run()
        self.calls[batch, threads, layout] = run
        return {"prepare_seconds": time.perf_counter() - began, **agreement(np.array(result), exact)}

    def time(self, batch: int, threads: int, layout: str, seconds: float) -> dict:
        self.runtime.set_threads(threads)
        with self.runtime.inference():
            return {"samples": sample(self.calls[batch, threads, layout], seconds)}

    def forget(self) -> dict:
        self.calls = {}
        self.runtime.forget()
        return {}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    worker = Worker(RUNTIMES[sys.argv[1]]())
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(worker, command.pop("do"))(**command)
        except Exception as error:
            text = str(error).strip().splitlines()
            answer = {"error": f"{type(error).__name__}: {text[0] if text else ''}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
