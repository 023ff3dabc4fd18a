"""Send malformed requests to a real server: each must be refused as INVALID_ARGUMENT, or answered.

    python -m loadtest.fuzz --cases 1000000 --json fuzz.json

A server process of its own, the four RPCs, several processes that send over several connections with many calls under way
on each. Case n of a seed is always the same bytes, whatever ran before it: `--first N --cases 1` sends it again. A case
fails where the status is anything but OK or INVALID_ARGUMENT, where an answer cannot be read or does not add up, or where
the server is gone. One that a busy server refuses is sent again. The bytes of cases that fail are written to the folder
`--failures`.
"""

from loadtest.fuzz.cases import MAX_BYTES, METHODS, Case, case
from loadtest.fuzz.judging import OUTCOMES, Tally, judge
from loadtest.fuzz.running import passed, run, small_data

__all__ = [
    "MAX_BYTES",
    "METHODS",
    "OUTCOMES",
    "Case",
    "Tally",
    "case",
    "judge",
    "passed",
    "run",
    "small_data",
]
