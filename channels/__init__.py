"""The channels that ship with the engine, one module each, offline and online half together."""
