"""What the entry scripts share: arguments, clock, schedules, data, models, checkpoints, reports."""
