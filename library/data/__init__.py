"""From image folders to the training batch."""
