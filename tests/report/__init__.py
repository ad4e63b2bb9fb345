"""Tests of the report, and the sample runs that the terminal and browser tests share."""
