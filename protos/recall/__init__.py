"""Wire messages of the recall service; `recall.v1` is the current version."""
