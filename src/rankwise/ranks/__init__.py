"""Whole ranks under an exact parameter budget, and the plan that records them; no model in sight."""
