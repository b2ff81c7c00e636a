"""Tests of the lab models and their recipe."""
