"""What trades time for memory."""
