"""Figures: functions that take data and return a matplotlib Figure."""
