"""Commands of `headrace`, one file each."""
