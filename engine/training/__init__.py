"""Training of vector models with PyTorch. Nothing that serves imports it."""
