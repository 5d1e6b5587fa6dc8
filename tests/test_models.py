"""Whole networks on photographs: converted, each gives what it gave before.

Seeded random weights, with BatchNorm statistics taken from the photographs (no weights are downloaded); and one trained
network, which ships inside a package: PP-OCR's text detector.
"""

from __future__ import annotations

import copy
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.models import build, calibrate, photographs
from harness import only_our_kernels
from sepconv_ext import convert_, freeze, revert_

pytest.importorskip("torchvision", reason="torchvision is an extra")
timm = pytest.importorskip("timm", reason="timm is an extra")
pytest.importorskip("skimage", reason="scikit-image is an extra")
pytest.importorskip("sklearn", reason="scikit-learn is an extra")

# Convolutions, and how many are replaced: all but the dense ones.
MODELS = {
    "mobilenet_v2": (52, 51),
    "mobilenet_v3_large": (62, 61),
    "efficientnet_b0": (81, 80),
    "convnext_tiny": (22, 18),
    "shufflenet_v2_x1_0": (56, 55),
    "mnasnet1_0": (52, 51),
    "resnext50_32x4d": (53, 52),
    "regnet_y_400mf": (85, 84),
    "mobilenetv1_100": (27, 26),
    "legacy_xception": (74, 72),
    "ghostnet_100": (95, 94),
    "mixnet_s": (123, 122),
}
TIMM = ("mobilenetv1_100", "legacy_xception", "ghostnet_100", "mixnet_s")


def network(name: str, pictures: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name) if name in TIMM else build(name)
    calibrate(model, pictures)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_network_says_what_it_said(name: str) -> None:
    """As close to the float64 network as torch's own float32 layers are, and the same five best in the same order."""
    convolutions, replaced = MODELS[name]
    pictures, _ = photographs(2, 64)
    model = network(name, pictures)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == convolutions
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(pictures.double())
        expected = model(pictures)

        report = convert_(model)
        assert len(report) == replaced
        assert {entry.reason.split(":")[0] for entry in report.skipped} == {"dense"}
        with only_our_kernels(at_least=replaced):
            y = model(pictures)

        error, torchs = (y - exact).abs().max(), (expected - exact).abs().max()
        floor = 16 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert error <= 3 * torchs + floor, f"error {error:.3g}, torch's {torchs:.3g}, floor {floor:.3g}"
        assert torch.equal(y.topk(5).indices, expected.topk(5).indices)

        assert revert_(model) == replaced
        assert torch.equal(model(pictures), expected)


def test_a_converted_network_in_channels_last() -> None:
    pictures, _ = photographs(2, 64)
    model = network("mobilenet_v2", pictures)
    with torch.no_grad():
        expected = model(pictures)
        convert_(model)
        model.to(memory_format=torch.channels_last)
        y = model(pictures.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert torch.equal(y.topk(5).indices, expected.topk(5).indices)


# --- trained networks: PP-OCR's, as onnxruntime runs them ---


@pytest.fixture(scope="module")
def reader():
    """RapidOCR with its networks in onnxruntime."""
    pytest.importorskip("onnx2torch", reason="onnx2torch is an extra")
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError as error:  # also where OpenCV lacks a library of the system
        pytest.skip(f"rapidocr-onnxruntime, an extra, cannot be imported: {error}")
    return RapidOCR()


def from_onnx(name: str) -> nn.Module:
    """A network of the installed wheel as torch modules. onnx2torch knows constants as initializers, not as nodes."""
    import onnx
    import onnx2torch

    (file,) = [file for file in metadata.files("rapidocr-onnxruntime") if Path(file).name == name]
    model = onnx.load(file.locate())
    for node in [node for node in model.graph.node if node.op_type == "Constant"]:
        constant = node.attribute[0].t
        constant.name = node.output[0]
        model.graph.initializer.append(constant)
        model.graph.node.remove(node)
    return onnx2torch.convert(model).eval()


def run_by(model: nn.Module):
    """What RapidOCR calls in place of its onnxruntime session."""

    @torch.no_grad()
    def infer(image):
        return [model(torch.from_numpy(image)).numpy()]

    return infer


def page(*lines: str, size: tuple[int, int]):
    """Black text on white, as RapidOCR takes it: [H, W, BGR]."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(28)
    for i, line in enumerate(lines):
        draw.text((24 + 20 * i, 12 + 70 * i), line, font=font, fill="black")
    return np.asarray(image)[:, :, ::-1].copy()


def test_the_text_detector_finds_the_same_boxes(reader) -> None:
    detector = reader.text_det
    detector.limit_side_len = 320
    text = page(
        "Depthwise, then pointwise:", "two steps, one pass.", "Nothing in between", "reaches memory.", size=(480, 320)
    )
    expected, _ = detector(text)
    blob = detector.get_preprocess(480)(text)
    probabilities = torch.from_numpy(detector.infer(blob)[0])

    model = from_onnx("ch_PP-OCRv4_det_infer.onnx")
    report = convert_(model)
    families = [entry.family for entry in report]
    skipped = 6 + 2  # dense convolutions, and dense transposed ones
    assert (families.count("depthwise"), families.count("pointwise"), len(report.skipped)) == (14, 42, skipped)
    session, detector.infer = detector.infer, run_by(model)
    try:
        with only_our_kernels(at_least=56):
            boxes, _ = detector(text)
        torch.testing.assert_close(torch.from_numpy(detector.infer(blob)[0]), probabilities, rtol=1e-3, atol=1e-3)
    finally:
        detector.infer = session
    assert len(expected) == 4  # a box for each line
    assert (boxes == expected).all()


def test_the_direction_classifier_reads_the_same_directions(reader) -> None:
    """A MobileNetV3."""
    classifier = reader.text_cls
    lines = [page(line, size=(400, 56)) for line in ("the right way up", "convolution 3x3", "Xception 2017")]
    lines += [line[::-1, ::-1].copy() for line in lines]
    _, expected, _ = classifier([line.copy() for line in lines])
    assert [label for label, _ in expected] == ["0"] * 3 + ["180"] * 3

    model = from_onnx("ch_ppocr_mobile_v2.0_cls_infer.onnx")
    report = convert_(model)
    assert len(report) == 52
    session, classifier.infer = classifier.infer, run_by(model)
    try:
        with only_our_kernels(at_least=52):
            _, result, _ = classifier([line.copy() for line in lines])
    finally:
        classifier.infer = session
    assert [label for label, _ in result] == [label for label, _ in expected]
    scores = [torch.tensor([float(score) for _, score in scored]) for scored in (result, expected)]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)


PP_OCR = {"ch_PP-OCRv4_det_infer.onnx": (64, 96), "ch_ppocr_mobile_v2.0_cls_infer.onnx": (48, 192)}


@pytest.mark.slow
@pytest.mark.parametrize("name", PP_OCR)
def test_frozen(reader, name: str) -> None:
    """As converted from ONNX they reshape by sizes that they compute as tensors: part by part, for any batch."""
    model, size = from_onnx(name), PP_OCR[name]
    frozen = freeze(model, torch.randn(1, 3, *size))
    assert len(frozen.report) > 50
    exact = copy.deepcopy(model).double()
    for n in (1, 3):
        pictures = torch.randn(n, 3, *size)
        with torch.no_grad():
            expected, torchs, y = exact(pictures.double()), model(pictures), frozen(pictures)
        error, usual = ((t - expected).abs().max() for t in (y, torchs))
        assert error <= 3 * usual + 16 * torch.finfo(torch.float32).eps * expected.abs().max()
        assert torch.equal(y.flatten(1).topk(2).indices, expected.flatten(1).topk(2).indices)
