"""Operators: reference, dispatch and implementations. Knows nothing of models."""
