"""Tests of the measures by teacher forcing."""
