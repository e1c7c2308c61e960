"""Shared rooms of the training and generation scripts."""
