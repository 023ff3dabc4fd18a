"""Features of users and items: columns of the catalogue and of the request as codes and floats.

A build learns an `Encoder` per side from the columns of the catalogue: which code each value has, where the quantiles of
a number lie. It is written into the model's snapshot, and encodes while serving as it did in training. Whatever a build
did not see is code 0, or the missing flag of a number.
"""

from engine.models.features.codes import hash_codes, hour_codes, moved_codes
from engine.models.features.encoder import Encoder
from engine.models.features.live import encode_live, item_columns_of
from engine.models.features.queries import QueryEncoder, encode_histories, encode_histories_reference
from engine.models.features.table import load_encoded, save_encoded, take_encoded, take_users

__all__ = [
    "Encoder",
    "QueryEncoder",
    "encode_histories",
    "encode_histories_reference",
    "encode_live",
    "hash_codes",
    "hour_codes",
    "item_columns_of",
    "load_encoded",
    "moved_codes",
    "save_encoded",
    "take_encoded",
    "take_users",
]
