"""Faults of what a server stands on, made for real while it is under load: what happens, and whether promises hold.

python -m loadtest.faults store-killed --seconds 30
python -m loadtest.faults store-hanging store-read-only store-out-of-memory
python -m loadtest.faults state-disk-full build-disk-full clock-jump
"""
