"""A multi-channel recall server: one `Recall` request in, merged candidates of many channels out."""

__version__ = "0.1.0"
