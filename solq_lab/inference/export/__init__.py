"""A trained model as one file for others: ONNX, checked against the original, or safetensors to share."""
