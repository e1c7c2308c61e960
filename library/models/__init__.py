"""Network modules and what is common to them; no files, no options."""
