"""A fused model as one graph, by transformers' exporters, says what it says in Python."""

import pytest
import torch
from torch.export import Dim

from tests.support.mixes import fuse
from tests.support.tiny import specialist, stir_gate


exporters = pytest.importorskip("transformers.exporters")
FORMATS = {"torch.export": ("DynamoExporter", "DynamoConfig"), "ONNX": ("OnnxExporter", "OnnxConfig")}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("torch.export", marks=pytest.mark.e2e),
        # needs onnx, onnxscript and onnxruntime
        pytest.param("ONNX", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_exported_logits_are_those_of_the_model_at_lengths_that_it_was_not_exported_with(name, tmp_path):
    if name == "ONNX":
        for package in ("onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    model = fuse({"a": specialist(layers=1), "b": specialist("mistral", layers=1, sliding_window=4)})
    stir_gate(model)
    model.eval()
    ids = torch.arange(3, 21).view(2, 9)
    length = {"input_ids": {1: Dim.AUTO}, "attention_mask": {1: Dim.AUTO}}
    exporter, config = (getattr(exporters, part) for part in FORMATS[name])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    exported = exporter().export(model, inputs, config=config(dynamic_shapes=length, dynamic=True))
    exported.save_pretrained(tmp_path)
    for graph in (exported, exporters.ExportedModel.from_pretrained(tmp_path)):
        for width in (9, 14, 3):
            ids = torch.arange(3, 3 + 2 * width).view(2, width)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            found, wanted = graph(**inputs), model(**inputs, use_cache=False)
            torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-5, atol=1e-5)
