"""Everything done beforehand: building, evaluating, tuning."""
