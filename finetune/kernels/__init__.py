"""Numerical building blocks; torch only."""
