"""Synthetic data sets of any size with planted structure: what is planted, in which law, and where it is written."""

from engine.offline.synth.plan import Plan
from engine.offline.synth.write import PLANTED, synthesize

__all__ = ["PLANTED", "Plan", "synthesize"]
