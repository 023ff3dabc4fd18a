"""RecTools' SASRecModel, trained and asked in a process of its own: `python -I rectools_sasrec.py IN.npz OUT.npz`.

Imports nothing of the project, so that it runs in any environment with `rectools[torch]`. -I keeps the modules beside it,
whose names are those of the standard library's, off the path. IN.npz: `users` and `items`
int64[n], the known pairs, those of a user oldest first, and `settings`, JSON as uint8. OUT.npz: `users` and `items`
int64[m], best first per user, and `cpu` and `wall`, the seconds of the training alone.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import pandas as pd
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel


def main(given: str, made: str) -> None:
    """Train on what a file says, recommend to all its users, write the lists."""
    arrays = np.load(given)
    settings = json.loads(bytes(arrays["settings"]))
    frame = pd.DataFrame({Columns.User: arrays["users"], Columns.Item: arrays["items"], Columns.Weight: 1.0})
    # The order is what counts: a second per event, so that no two of a user are at one time.
    frame[Columns.Datetime] = pd.to_datetime(np.arange(len(frame)), unit="s")
    dataset = Dataset.construct(frame)
    model = SASRecModel(
        n_factors=settings["width"],
        n_blocks=settings["blocks"],
        n_heads=settings["heads"],
        session_max_len=settings["length"],
        dropout_rate=settings["dropout"],
        batch_size=settings["batch"],
        epochs=settings["epochs"],
        lr=settings["learning_rate"],
        loss="softmax",
        dataloader_num_workers=0,
        verbose=0,
        recommend_torch_device="cpu",
    )
    seed_everything(settings["seed"])
    cpu, wall = time.process_time(), time.monotonic()
    model.fit(dataset)
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    users = np.unique(arrays["users"])
    found = model.recommend(users, dataset, k=settings["k"], filter_viewed=True)
    found = found.sort_values([Columns.User, Columns.Rank])
    np.savez(
        made, users=found[Columns.User].to_numpy(), items=found[Columns.Item].to_numpy(), cpu=cpu, wall=wall
    )


def seed_everything(seed: int) -> None:
    """Seed what RecTools draws from."""
    from pytorch_lightning import seed_everything as seed_all

    seed_all(seed)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
