"""Tests of rankwise.adapters."""
