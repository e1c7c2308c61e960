"""Bytes on disk and key-name tables: what a checkpoint file holds, in which layout, and how to write one."""
