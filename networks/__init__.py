"""Trainable networks (LoRA and relatives) that are hooked into a frozen model, and the tools around their files."""
