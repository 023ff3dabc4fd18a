"""Contract suites that authors of channels and filters inherit."""
