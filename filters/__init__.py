"""The filters that ship with the engine, one module each."""
