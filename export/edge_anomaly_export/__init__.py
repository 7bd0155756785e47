"""From a trained run to a bundle: ONNX graph, INT8, targets, parity check."""
