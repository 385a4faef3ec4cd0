"""Names in a run's directory that several commands know; the others stand with what writes them."""

POLICY, TENSORBOARD = "policy.onnx", "tensorboard"
