"""What runs a finished sparse model: stores and schedules that never change its results."""
