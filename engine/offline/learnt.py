"""The channels that came with a data set, trained: `engine/data/learnt.py`."""

from __future__ import annotations

from pathlib import Path

from engine.config import Config
from engine.data.dataset import Dataset
from engine.data.learnt import learnt_channels
from engine.models.streaming_options import StreamingOptions


def with_learnt(config: Config, source: Path) -> Config:
    """Return the configuration with the channels in the default scene that came with the data set, trained.

    They are asked for as much as the scene's first channel. Where one learns from a stream, what is reported is written
    down for its trainer.

    Raises:
        DatasetError: a file is damaged.
    """
    found = learnt_channels(source)
    data = Dataset.open(source).fingerprint() if found else ""
    for name, made_of in found.items():
        if made_of["dataset"] != data:
            continue
        config = config.with_channel_options({name: made_of["options"]}, f"{name}.model.npz")
        scene = config.scenes["default"]
        quotas = {**scene.quotas, name: max(scene.quotas.values())}
        config = config.model_copy(
            update={"scenes": {**config.scenes, "default": scene.model_copy(update={"quotas": quotas})}}
        )
        if isinstance(getattr(config.channel(name)[1], "training", None), StreamingOptions):
            ingest = config.ingest.model_copy(update={"event_log": True})
            config = config.model_copy(update={"ingest": ingest})
    return config
